"""The CLIP vision tower: pictures in, one feature vector per patch out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.errors import InputError, reason
from llava.model.hf_logging import quiet
from llava.model.multimodal_encoder.tower import VisionTower
from llava.model.shards import check_hub_name, not_found


class CLIPVisionTower(VisionTower):
    """A CLIP vision encoder.

    Args:
        name: a folder or hub name with a CLIP (vision) model and its preprocessor.
        args: reads `mm_vision_select_layer` (which hidden state, default −2) and
            `mm_vision_select_feature` (`patch`: without the class token, or `cls_patch`).
        config: the encoder's config, if not that of `name`.
    """

    class_tokens = 1  # in front of the patches

    def __init__(self, name: str, args: Any, delay_load: bool = False, config: Any = None):
        super().__init__(name, args, delay_load=True, config=config)
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        if self.select_feature not in ("patch", "cls_patch"):
            raise InputError(
                f"mm_vision_select_feature is {self.select_feature!r}; known are patch, cls_patch"
            )
        layers = self.config.num_hidden_layers
        if not -layers - 1 <= self.select_layer <= layers:
            raise InputError(
                f"--mm_vision_select_layer {self.select_layer}: {name} has {layers} layers"
            )
        if not delay_load:
            self.load_model()

    @classmethod
    def read_config(cls, name: str) -> Any:
        return vision_config(name)

    def read_processor(self) -> Any:
        return self._classes()[0].from_pretrained(self.vision_tower_name)

    def build(self) -> nn.Module:
        return self._classes()[1](self.config)

    def _pretrained(self, device_map: Any) -> nn.Module:
        return self._classes()[1].from_pretrained(
            self.vision_tower_name, device_map=device_map, dtype=torch.float32
        )

    @staticmethod
    def _classes() -> tuple[type[Any], type[Any]]:
        from transformers import CLIPImageProcessorPil, CLIPVisionModel

        # The Pillow backend gives upstream's pixels to the bit; torchvision's does not.
        return CLIPImageProcessorPil, CLIPVisionModel

    def _try(self) -> None:
        pass  # transformers' own models need no proof, and a large one takes seconds

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self._selected_state(pixels)
        return hidden[:, self.class_tokens :] if self.select_feature == "patch" else hidden

    def _selected_state(self, pixels: torch.Tensor) -> torch.Tensor:
        """The encoder's `hidden_states[select_layer]`; layers after it are not run."""
        encoder = self.vision_tower
        hidden = encoder.embeddings(pixels)
        if hasattr(encoder, "pre_layrnorm"):  # CLIP's, so spelt
            hidden = encoder.pre_layrnorm(hidden)
        layers = encoder.encoder.layers
        last = self.select_layer if self.select_layer >= 0 else len(layers) + 1 + self.select_layer
        for layer in layers[:last]:
            hidden = layer(hidden, None)  # no attention mask
        return hidden

    def _choices(self) -> str:
        return f"{self.select_layer} {self.select_feature} {self.dtype}"

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.image_size // self.config.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """Feature vectors per picture, the class token included when it is selected."""
        extra = self.class_tokens if self.select_feature == "cls_patch" else 0
        return self.num_patches_per_side**2 + extra

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size


def vision_config(name: str) -> Any:
    """The vision part of the config of a folder or hub name."""
    from transformers import AutoConfig

    is_folder = Path(name).is_dir()
    try:
        if not is_folder:
            check_hub_name(name)
        with quiet():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except InputError as error:
        raise InputError(f"vision tower {error}") from None
    except (OSError, ValueError) as error:
        why = f"no readable model there ({reason(error)})" if is_folder else not_found(error)
        raise InputError(f"vision tower {name}: {why}") from None
    return getattr(config, "vision_config", config)
