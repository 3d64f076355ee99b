"""The CLIP vision tower: pictures in, one feature vector per patch out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from llava.errors import InputError, reason
from llava.model.hf_logging import quiet
from llava.model.shards import check_hub_name, not_found
from llava.state import check
from llava.transformers_private import without_zero3


class CLIPVisionTower(nn.Module):
    """A CLIP vision encoder by local path or hub name, frozen unless `requires_grad_` is called.

    Args:
        name: a folder or hub name with a CLIP (vision) model and its preprocessor.
        args: reads `mm_vision_select_layer` (which hidden state, default −2) and
            `mm_vision_select_feature` (`patch`: without the class token, or `cls_patch`).
        delay_load: read the config only; weights come with `load_model`.
        config: the encoder's config, if not that of `name`.
    """

    class_tokens = 1  # in front of the patches

    def __init__(self, name: str, args: Any, delay_load: bool = False, config: Any = None):
        super().__init__()
        self.vision_tower_name = name
        self.config = config or vision_config(name)
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
        self.is_loaded = False
        if not delay_load:
            self.load_model()

    def load_model(
        self, device_map: Any = None, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Load picture processor and weights (float32 until `.to(dtype)`); does nothing twice.

        `weights` are a checkpoint's own, named as in `vision_tower`, in place of those that lie
        under the tower's name; what it has no place for is passed over.
        """
        if self.is_loaded:
            return
        try:
            self._load(device_map, weights)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"vision tower {self.vision_tower_name}: it does not load ({reason(error)})"
            ) from None
        self.requires_grad_(False).eval()
        self.is_loaded = True

    def _load(self, device_map: Any, weights: Mapping[str, torch.Tensor] | None) -> None:
        processor, model = self._classes()
        self.image_processor = processor.from_pretrained(self.vision_tower_name)
        with without_zero3(), quiet():
            if weights is None:
                self.vision_tower = model.from_pretrained(
                    self.vision_tower_name, device_map=device_map, dtype=torch.float32
                )
            else:
                self.vision_tower = model(self.config).float()
                self._take(weights)

    @staticmethod
    def _classes() -> tuple[type[Any], type[Any]]:
        from transformers import CLIPImageProcessorPil, CLIPVisionModel

        # The Pillow backend gives upstream's pixels to the bit; torchvision's does not.
        return CLIPImageProcessorPil, CLIPVisionModel

    def _take(self, weights: Mapping[str, torch.Tensor]) -> None:
        expected = self.vision_tower.state_dict()
        own = {name: weights[name] for name in weights if name in expected}
        check(own, expected, who="the checkpoint's vision tower")
        self.vision_tower.load_state_dict(own)

    @property
    def is_tuned(self) -> bool:
        """Whether it is being trained."""
        return self.is_loaded and any(p.requires_grad for p in self.parameters())

    def train(self, mode: bool = True) -> CLIPVisionTower:
        return super().train(mode and self.is_tuned)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, 3, H, W) → features (batch, num_patches, hidden_size), in their dtype."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_tuned):
            features = self._selected_state(images.to(device=self.device, dtype=self.dtype))
            if self.select_feature == "patch":
                features = features[:, self.class_tokens :]
            return features.to(images.dtype)

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

    def fingerprint(self) -> str:
        """Hex digest of what decides the features: weights, their dtype, and the selection."""
        digest = hashlib.sha256(f"{self.select_layer} {self.select_feature} {self.dtype}".encode())
        for name, tensor in sorted(self.vision_tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros (1, hidden_size): upstream's stand-in where there is no picture."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Feature vectors per picture, the class token included when it is selected."""
        extra = self.class_tokens if self.select_feature == "cls_patch" else 0
        return self.num_patches_per_side**2 + extra


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
