"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; Lite: Google 2020) up to its last map.

Inverted residual blocks (Sandler et al. 2018, arXiv 1801.04381) without squeeze-and-excitation,
ReLU6 throughout. Batch norms are gone: `convert.py` folds them into the convolutions before them,
whose names are those of the published weights. Padding is TensorFlow's "SAME", one more at the end
than at the beginning where it is odd.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

# Blocks, kernel, stride of the first, expansion, channels out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, WIDTH = 32, 1280


class SameConv(nn.Conv2d):
    """A convolution with a bias, whose output has ceil(side / stride) places along a side."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(channels, out, kernel, stride, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (
            max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]
        )
        if height % 2 or width % 2:
            begin, above = width // 2, height // 2
            x = functional.pad(x, (begin, width - begin, above, height - above))
            height = width = 0
        padding = height // 2, width // 2
        return functional.conv2d(x, self.weight, self.bias, stride, padding, groups=self.groups)


class Block(nn.Module):
    """Expansion to `expand` times as many channels, a filter for each, and projection."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expand: int):
        super().__init__()
        inner = channels * expand
        self._expand_conv = SameConv(channels, inner) if expand > 1 else None
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner)
        self._project_conv = SameConv(inner, out)
        self.skip = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = x if self._expand_conv is None else relu6(self._expand_conv(x))
        out = self._project_conv(relu6(self._depthwise_conv(inner)))
        return out + x if self.skip else out


class EfficientNetLite(nn.Module):
    """Pixels (B, 3, H, W) → the last map (B, 1280, ceil(H / 32), ceil(W / 32)), in [0, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, STEM, 3, 2)
        self._blocks = nn.ModuleList(_blocks())
        self._conv_head = SameConv(STAGES[-1][-1], WIDTH)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = relu6(self._conv_stem(pixels))
        for block in self._blocks:
            x = block(x)
        return relu6(self._conv_head(x))


def _blocks() -> Iterator[Block]:
    channels = STEM
    for repeats, kernel, stride, expand, out in STAGES:
        for i in range(repeats):
            yield Block(channels, out, kernel, stride if i == 0 else 1, expand)
            channels = out


def relu6(x: torch.Tensor) -> torch.Tensor:
    return functional.hardtanh(x, 0.0, 6.0)
