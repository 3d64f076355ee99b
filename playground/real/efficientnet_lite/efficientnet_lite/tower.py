"""The tower: EfficientNet-Lite0's last map, pooled to a small grid of feature vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from efficientnet_lite.network import WIDTH, EfficientNetLite
from llava.errors import InputError
from llava.model.multimodal_encoder.tower import VisionTower


@dataclass
class Settings:
    """Of config.json.

    Attributes:
        side: patches along a side, to which the map is pooled.
        standardised: whether model.safetensors has a `mean` and a `spread` of each channel, by
            which features are moved and scaled.
    """

    side: int = 4
    standardised: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.side <= 7:
            raise InputError(f"efficientnet_lite: side is {self.side}, expected 1 to 7")


class EfficientNetLiteTower(VisionTower):
    """See docs/towers.md; config.json has `model_type` efficientnet_lite and the `Settings`."""

    settings = Settings

    def build(self) -> nn.Module:
        network = EfficientNetLite()
        if self.config.standardised:
            network.register_buffer("mean", torch.zeros(WIDTH))
            network.register_buffer("spread", torch.ones(WIDTH))
        return network.to(memory_format=torch.channels_last)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = self.vision_tower(pixels.contiguous(memory_format=torch.channels_last))
        rows = functional.adaptive_avg_pool2d(maps, self.config.side).flatten(2).transpose(1, 2)
        if self.config.standardised:
            rows = (rows - self.vision_tower.mean) / self.vision_tower.spread
        return rows.contiguous()

    @property
    def hidden_size(self) -> int:
        return WIDTH

    @property
    def num_patches(self) -> int:
        return self.config.side**2
