"""The network of FUN-AD, what its training remembers, and its losses; `flawsift.detectors.funad` puts them together."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of all LeakyReLUs, as the authors have it
MEMORY = 0.9  # of running values: about the last ten batches, 320 images


class Head(nn.Module):
    """Adaptor and discriminator: image vectors and patches to logits.

    The image vector meets its weights once per image: W [image; patch] = W_i image + W_p patch.
    """

    def __init__(self, n_image: int, n_patch: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.n_image, sizes = n_image, [n_image + n_patch, *hidden]
        self.adaptor = nn.Linear(sizes[0], sizes[0])
        pairs = [(nn.Linear(a, b), nn.LeakyReLU(SLOPE)) for a, b in itertools.pairwise(sizes)]
        self.discriminator = nn.Sequential(*(layer for pair in pairs for layer in pair), nn.Linear(sizes[-1], 1))

    def adapt(self, image: Tensor, patches: Tensor) -> Tensor:
        """(B, P, D) adapted features before their LeakyReLU, from (B, I) and (B, P, C) with D = I + C."""
        weight = self.adaptor.weight
        whole = F.linear(image, weight[:, : self.n_image], self.adaptor.bias)
        return whole.unsqueeze(1) + F.linear(patches, weight[:, self.n_image :])

    def judge(self, adapted: Tensor) -> Tensor:
        """(...) logits of (..., D) adapted features before their LeakyReLU."""
        found: Tensor = self.discriminator(F.leaky_relu(adapted, SLOPE))
        return found.squeeze(-1)

    def forward(self, image: Tensor, patches: Tensor) -> Tensor:
        """(B, P) logits."""
        return self.judge(self.adapt(image, patches))


class Memory(nn.Module):
    """What training remembers between steps, in buffers, so that a checkpoint has it.

    `bank`: (M, D) image vector and patch of each entry, before the adaptor, which moves on; `owners`: (M,) ids of their
    images, -1 where there is no entry; `scale`: (2,) running typical and extreme squared distance; `positive`: running
    share of patches that are taken for anomalous.
    """

    bank: Tensor
    owners: Tensor
    scale: Tensor
    positive: Tensor

    def __init__(self, size: int, width: int, *, keep: bool) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(size, width), persistent=keep)
        self.register_buffer("owners", torch.full((size,), -1), persistent=keep)
        self.register_buffer("scale", torch.full((2,), torch.nan))
        self.register_buffer("positive", torch.tensor(torch.nan))


def follow(running: Tensor, value: Tensor) -> Tensor:
    """Moves a running value, nan before the first, in place towards that of a batch; returns it."""
    return running.copy_(torch.where(running.isnan(), value, MEMORY * running + (1 - MEMORY) * value))


def spread(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values on a scale with `low` at 0 and `high` at 1; all 0 where the two are equal."""
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def balanced_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the anomalous patches plus that of the normal ones; a class without patches adds 0."""
    each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return each[labels].sum() / labels.sum().clamp_min(1) + each[~labels].sum() / (~labels).sum().clamp_min(1)


def smoothness_loss(scores: Tensor, pairs: Tensor) -> Tensor:
    """0.5 mean |s_i - s_j| over (M, 2) mutual pairs, each once; 0 without pairs."""
    return 0.5 * (scores[pairs[:, 0]] - scores[pairs[:, 1]]).abs().sum() / max(1, len(pairs))
