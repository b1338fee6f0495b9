"""A conditional normalizing flow: affine couplings conditioned on a code, with their inverse and log determinant."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The published code's numbers of one coupling: it starts near the identity, and its scales stay within e^-1.9 to e^1.9.
CLAMP = 1.9  # bound of a log scale
DAMPING = 0.1  # factor on the subnet's output
GAIN, SHARPNESS = 0.1, 0.5  # a channel's gain is 0.1 softplus(gamma), of sharpness 0.5
GAMMA_START = 2 * math.log(math.exp(5) - 1)  # where that gain is 1


class Coupling(nn.Module):
    """One invertible block on fibres (the C channels of a tap at one place), conditioned on the code of the place.

    Half of the channels pass unchanged; from them and the code a subnet makes scale and shift of the other half. Then
    each channel is given a gain and an offset, and a fixed permutation mixes the channels for the next block.
    """

    order: Tensor

    def __init__(self, channels: int, code_size: int) -> None:
        super().__init__()
        self.sizes = [channels - channels // 2, channels // 2]  # channels that stay, channels that move
        width = self.sizes[0] + code_size
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, 2 * self.sizes[1])
        self.gamma = nn.Parameter(torch.full((channels,), GAMMA_START))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("order", torch.randperm(channels))

    def forward(self, x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C) images and (...) log |det J| of (..., C) fibres; (..., E) codes are broadcast against them."""
        stay, move = torch.split(x, self.sizes, -1)
        log_scale, shift = self._scale_and_shift(stay, code)
        gain = self._gain()
        y = torch.cat([stay, move * log_scale.exp() + shift], -1) * gain + self.offset
        return y[..., self.order], log_scale.sum(-1) + gain.log().sum()

    def inverse(self, y: Tensor, code: Tensor) -> Tensor:
        """(..., C) fibres whose image is y."""
        x = (y[..., self.order.argsort()] - self.offset) / self._gain()
        stay, move = torch.split(x, self.sizes, -1)
        log_scale, shift = self._scale_and_shift(stay, code)
        return torch.cat([stay, (move - shift) * (-log_scale).exp()], -1)

    def _scale_and_shift(self, stay: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        # a Linear on [stay, code], in two parts: that of the code is computed per place instead of per fibre
        of_stay, of_code = torch.split(self.hidden.weight, [stay.shape[-1], code.shape[-1]], 1)
        hidden = F.relu(F.linear(stay, of_stay) + F.linear(code, of_code, self.hidden.bias))
        log_scale, shift = (DAMPING * self.out(hidden)).chunk(2, -1)
        return CLAMP * log_scale.tanh(), shift

    def _gain(self) -> Tensor:
        return GAIN * F.softplus(self.gamma, beta=SHARPNESS)


class Flow(nn.Module):
    """Couplings that turn the fibres of one tap into a standard normal."""

    def __init__(self, channels: int, code_size: int, n_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Coupling(channels, code_size) for _ in range(n_blocks))

    def forward(self, x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C) latents and (...) log |det J|."""
        total = x.new_zeros(())
        for block in self.blocks:
            x, log_det = block(x, code)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, code: Tensor) -> Tensor:
        """(..., C) fibres of (..., C) latents."""
        for block in reversed(self.blocks):
            z = cast(Coupling, block).inverse(z, code)
        return z

    def log_likelihood(self, x: Tensor, code: Tensor) -> Tensor:
        """(...) log p(x | code) / C."""
        z, log_det = self(x, code)
        likelihood: Tensor = (log_det - z.square().sum(-1) / 2) / x.shape[-1] - math.log(2 * math.pi) / 2
        return likelihood


def position_code(h: int, w: int, size: int) -> Tensor:
    """(h w, size) sinusoidal codes, row by row: the first half encodes the column, the second half the row.

    Of a half, entry 2 j is sin(t w_j) and entry 2 j + 1 is cos(t w_j), with w_j = 10000^(-2 j / (size / 2)).
    """
    half = size // 2
    rates = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)

    def along(n: int) -> Tensor:
        angles = torch.arange(n, dtype=torch.float64)[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)  # (n, half)

    columns, rows = along(w).expand(h, w, half), along(h)[:, None].expand(h, w, half)
    return torch.cat([columns, rows], 2).flatten(0, 1).float()
