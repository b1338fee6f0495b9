"""Networks that detectors train: attention layers, residual blocks, and what is built of them."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flawsift.detectors.parts.maps import on_one_grid

# Sum of attention weights taken for an underflow: weights are near 1, and there is one per channel and token.
MIN_ATTENTION = 1e-6
EXPANSION = 4  # hidden channels of a feed-forward part per channel, as everywhere in the field
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which a student's pixels are normalised by
STRIDES = (4, 8, 16, 32)  # of the four stages of a ResNet-18
MULTIPLE = 32  # of its input's edge, so that every stage halves exactly
DILATIONS = (6 / 64, 12 / 64, 18 / 64)  # of the pyramid, in sides of its grid: DeSTSeg's 6, 12, 18 at 64

Levels = Mapping[int, Tensor]  # {stride: (B, C, h, w)}


class AttentionLayer(nn.Module):
    """Attentions, then a feed-forward part, each added to its input and normalised (post-norm)."""

    def __init__(self, width: int, heads: int, dropout: float, attention_dropout: float, *, n_attentions: int) -> None:
        super().__init__()
        make = partial(nn.MultiheadAttention, width, heads, attention_dropout, batch_first=True)
        self.attentions = nn.ModuleList(make() for _ in range(n_attentions))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(n_attentions + 1))
        self.drop = nn.Dropout(dropout)
        up, down = nn.Linear(width, EXPANSION * width), nn.Linear(EXPANSION * width, width)
        self.feed = nn.Sequential(up, nn.ReLU(), nn.Dropout(dropout), down)

    def forward(self, x: Tensor, sources: Sequence[Tensor], place: Tensor, mask: Tensor) -> Tensor:
        """(B, P, D) from a stream x and the (B, P, D) source that each attention looks at.

        Args:
            x: What the layer adds to; its queries.
            sources: Keys and values of each attention in turn.
            place: (P, D), added to queries and keys, never to values.
            mask: (P, P) bool, True where a query (row) may not see a key (column).
        """
        for attend, norm, source in zip(self.attentions, self.norms[:-1], sources, strict=True):
            seen, _ = attend(x + place, source + place, source, attn_mask=mask, need_weights=False)
            x = norm(x + self.drop(seen))
        output: Tensor = self.norms[-1](x + self.drop(self.feed(x)))
        return output


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without softmax, phi(q) (phi(k)^T v) / (phi(q) . sum phi(k)) with phi = elu + 1, linear in P.

    Args:
        q: (..., P, c) queries.
        k: (..., P, c) keys.
        v: (..., P, c) values.

    Returns:
        (..., P, c); 0 where every phi(q) phi(k) underflows, which the published form divides by.

    Reference: Katharopoulos et al., "Transformers are RNNs", ICML 2020, arXiv 2006.16236, equations 5 and 7.
    """
    q, k = F.elu(q) + 1, F.elu(k) + 1
    denominator = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    return q @ (k.transpose(-2, -1) @ v) / denominator.clamp_min(MIN_ATTENTION)


def conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """A convolution without bias that keeps the grid at stride 1, then batch norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def kaiming_(module: nn.Module) -> None:
    """Weights of all convolutions, but not of transposed ones, drawn anew as those of a ResNet, in place."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def resnet_conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> nn.Sequential:
    """`conv` with a ResNet's initial weights."""
    layer = conv(inputs, outputs, kernel, stride=stride)
    kaiming_(layer)
    return layer


class BasicBlock(nn.Module):
    """The basic residual block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, zero_init: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            resnet_conv(inputs, outputs, 3, stride=stride), nn.ReLU(), last := resnet_conv(outputs, outputs, 3)
        )
        if zero_init:  # starts as its shortcut
            nn.init.zeros_(last.get_parameter("1.weight"))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else resnet_conv(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class DenoisingStudent(nn.Module):
    """ResNet-18 of a width, and a decoder back to each asked stride, without skip connections."""

    def __init__(self, width: int, channels: Mapping[int, int], *, linear: bool) -> None:
        super().__init__()
        widths = {stride: width * 2**k for k, stride in enumerate(STRIDES)}
        self.stem = nn.Sequential(resnet_conv(3, width, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks, n = [], width
        for stride, w in widths.items():
            blocks += [
                BasicBlock(n, w, stride=1 if stride == 4 else 2, zero_init=True),
                BasicBlock(w, w, zero_init=True),
            ]
            n = w
        self.encoder = nn.Sequential(*blocks)
        self.decoder, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for stride in (s for s in reversed(widths) if s >= min(channels)):
            self.decoder[str(stride)] = nn.Sequential(
                BasicBlock(n, widths[stride]), BasicBlock(widths[stride], widths[stride])
            )
            n = widths[stride]
            if stride in channels:
                exact = channels[stride] == n and not linear
                self.heads[str(stride)] = nn.Identity() if exact else nn.Conv2d(n, channels[stride], 1)

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        """{stride: (B, C, h, w)} of (B, 3, H, W) pixels in [0, 1]."""
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        x = self.encoder(self.stem((pixels - mean) / std))
        levels = {}
        for stride, group in self.decoder.items():
            if stride != "32":
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = group(x)
            if stride in self.heads:
                levels[int(stride)] = self.heads[stride](x).float()  # losses are in full precision
        return levels


class WholeImage(nn.Module):
    """The mean of all places, as one more view of each: (B, C, h, w) to (B, C, 1, 1).

    Of B values that are normalised together, none is more than sqrt(B - 1) deviations from their mean. So the layers
    behind are trained up to there only; an image that is anomalous as a whole lies far beyond, where their output is
    arbitrary, "no defect" as often as not. In eval mode values are therefore held within that limit.
    """

    def __init__(self, width: int, batch_size: int) -> None:
        super().__init__()
        self.layer = conv(width, width, 1)
        self.limit = (batch_size - 1) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        mix, norm = self.layer
        assert isinstance(norm, nn.BatchNorm2d)
        mean = mix(x.mean((2, 3), keepdim=True))
        if not self.training:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            middle, reach = norm.running_mean, self.limit * (norm.running_var + norm.eps).sqrt()
            low, high = (bound.view(1, -1, 1, 1) for bound in (middle - reach, middle + reach))
            mean = torch.clamp(mean, low, high)
        return F.relu(norm(mean))


class Segmenter(nn.Module):
    """From (B, C, h, w) products of teacher and student to (B, h, w) logits of a defect.

    Its residual blocks start with a ResNet's weights, what follows with torch's, as in the authors' code.

    Args:
        channels: C, of all levels together.
        width: Channels of every layer but the last.
        side: h = w, of which dilations are shares.
        batch_size: Images in a step of the training.
    """

    def __init__(self, channels: int, width: int, side: int, batch_size: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(BasicBlock(channels, width), BasicBlock(width, width))
        self.whole = WholeImage(width, batch_size)
        reaches = [max(1, round(share * side)) for share in DILATIONS]
        self.pyramid = nn.ModuleList(nn.Sequential(conv(width, width, 3, dilation=d), nn.ReLU()) for d in reaches)
        joined = (1 + len(reaches)) * width
        self.out = nn.Sequential(
            conv(joined, width, 3), nn.ReLU(), conv(width, width, 3), nn.ReLU(), nn.Conv2d(width, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual(x)
        views = [self.whole(x).expand_as(x), *(branch(x) for branch in self.pyramid)]
        logits: Tensor = self.out(torch.cat(views, 1)).squeeze(1).float()
        return logits


def on_finest(levels: Levels) -> Tensor:
    """(B, C, h, w): all levels on the grid of the finest, one after the other."""
    return torch.cat(on_one_grid([level for _, level in sorted(levels.items())]), 1)
