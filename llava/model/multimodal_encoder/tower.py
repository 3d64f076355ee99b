"""The base of all vision towers, and what a plug-in fills in.

A tower turns pictures into feature vectors, which a connector turns into tokens. A plug-in is a
subclass of `VisionTower` that a package declares (`plugins.py`; docs/towers.md has an example):

- `settings`: a dataclass of what it reads of its folder's config.json
- `build() -> nn.Module`: the network, of random weights
- `features(pixels (B, 3, H, W)) -> (B, num_patches, hidden_size)`
- `hidden_size` and `num_patches`

and, where the defaults do not do: `grid`, `read_processor` and `version`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from llava.errors import InputError, reason
from llava.json_files import read_json
from llava.model.checkpoint_names import tower_name
from llava.model.hf_logging import quiet
from llava.model.shards import Shards, local_folder
from llava.state import check
from llava.transformers_private import without_zero3


@dataclasses.dataclass
class NoSettings:
    """Of a tower that reads nothing of its config.json."""


class VisionTower(nn.Module):
    """A vision encoder by local path or hub name, frozen unless `requires_grad_` is called.

    Args:
        name: a folder or hub name with config.json, weights and preprocessor_config.json.
        args: the run's config. A tower with a choice of layers reads it there; a plug-in has its
            choices in its folder, and `mm_vision_select_layer` and `mm_vision_select_feature`,
            which every recipe and every checkpoint has, mean nothing to it.
        delay_load: read the config only; weights come with `load_model`.
        config: the tower's settings, if not those of `name`.
    """

    settings: type = NoSettings
    version = "1"  # raised when the same weights give other features
    kind: str | None = None  # a plug-in's `model_type`
    vision_tower: Any  # the network, once it is loaded

    def __init__(self, name: str, args: Any = None, delay_load: bool = False, config: Any = None):
        super().__init__()
        self.vision_tower_name = name
        self.config = config or self.read_config(name)
        self.is_loaded = False
        if not delay_load:
            self.load_model()

    # -- what a plug-in fills in -----------------------------------------------------------------

    def build(self) -> nn.Module:
        """The network, of random weights; its tensors have the names of model.safetensors."""
        raise NotImplementedError

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) of `dtype` on `device` → (B, num_patches, hidden_size).

        The network is `self.vision_tower`. Gradients are off unless the tower is being trained.
        """
        raise NotImplementedError

    @property
    def hidden_size(self) -> int:
        """The width of a feature vector; known before the weights are."""
        raise NotImplementedError

    @property
    def num_patches(self) -> int:
        """Feature vectors per picture; known before the weights are."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the patches, row by row; None if they have no place in the picture.

        By default a square, if `num_patches` makes one.
        """
        side = math.isqrt(self.num_patches)
        return (side, side) if side**2 == self.num_patches else None

    def read_processor(self) -> Any:
        """The picture processor, an image processor of transformers: the one of the folder."""
        from transformers import AutoImageProcessor

        # The Pillow backend gives the same pixels everywhere; torchvision's has others.
        return AutoImageProcessor.from_pretrained(
            self.vision_tower_name, backend="pil", trust_remote_code=False
        )

    # -- what all towers have --------------------------------------------------------------------

    @classmethod
    def read_config(cls, name: str) -> Any:
        """The `settings` in config.json; `InputError` names a key that is missing or mistyped."""
        file = local_folder(name) / "config.json"
        types = typing.get_type_hints(cls.settings)
        fields = dataclasses.fields(cls.settings)
        found = read_json(file)
        given = {field.name: found[field.name] for field in fields if field.name in found}
        for key, value in given.items():
            if types[key] in (int, float, str, bool) and not _is_a(value, types[key]):
                kind = types[key].__name__
                raise InputError(f"{file}: has {key} {value!r}, a value of type {kind} is expected")
        unset = dataclasses.MISSING
        for field in fields:
            if field.name not in given and field.default is field.default_factory is unset:
                raise InputError(f"{file}: has no {field.name}")
        return cls.settings(**given)

    @functools.cached_property
    def image_processor(self) -> Any:
        try:
            with quiet():
                return self.read_processor()
        except (OSError, ValueError) as error:
            raise InputError(
                f"vision tower {self.vision_tower_name}: it does not load "
                f"(its picture processor: {reason(error)})"
            ) from None

    def load_model(
        self, device_map: Any = None, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Load picture processor and weights (float32 until `.to(dtype)`); does nothing twice.

        `weights` are a checkpoint's own, named as in `vision_tower`, in place of those that lie
        under the tower's name; what it has no place for is passed over.
        """
        if self.is_loaded:
            return
        _ = self.image_processor
        try:
            with without_zero3(), quiet():
                if weights is None:
                    self.vision_tower = self._pretrained(device_map)
                else:
                    self.vision_tower = self.build().float()
                    self._take(weights, "the checkpoint's vision tower")
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"vision tower {self.vision_tower_name}: it does not load ({reason(error)})"
            ) from None
        self.requires_grad_(False).eval()
        self.is_loaded = True
        self._try()

    def _pretrained(self, device_map: Any) -> nn.Module:
        """The network with the weights under the tower's name."""
        self.vision_tower = self.build().float()
        self._take(Shards(local_folder(self.vision_tower_name)), self.vision_tower_name)
        return self.vision_tower

    def _take(self, weights: Mapping[str, torch.Tensor], who: str) -> None:
        # A checkpoint's names have lost the "vision_model." that some networks begin theirs with.
        places = {_bare(name): name for name in weights}
        expected = self.vision_tower.state_dict()
        own = {name: weights[places[_bare(name)]] for name in expected if _bare(name) in places}
        floats = {name: t for name, t in expected.items() if t.is_floating_point()}
        check({name: t for name, t in own.items() if name in floats}, floats, who=who)
        self.vision_tower.load_state_dict(own, strict=False)  # but for counters, checked above

    def _try(self) -> None:
        """An empty picture, before a run finds out that the class gives something else."""
        self(torch.zeros(1, *self.pixel_shape))

    @property
    def is_tuned(self) -> bool:
        """Whether it is being trained."""
        return self.is_loaded and any(p.requires_grad for p in self.parameters())

    def train(self, mode: bool = True) -> VisionTower:
        return super().train(mode and self.is_tuned)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, 3, H, W) → features (batch, num_patches, hidden_size), in their dtype."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_tuned):
            features = self.features(images.to(device=self.device, dtype=self.dtype))
        expected = (len(images), self.num_patches, self.hidden_size)
        if tuple(features.shape) != expected:
            raise InputError(
                f"vision tower {self.vision_tower_name}: {type(self).__name__}.features gives "
                f"{tuple(features.shape)}, expected {expected} (pictures, num_patches, hidden_size)"
            )
        return features.to(images.dtype)

    def fingerprint(self) -> str:
        """Hex digest of what decides the features: weights, their dtype, and the choices."""
        digest = hashlib.sha256(self._choices().encode())
        for name, tensor in sorted(self.vision_tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _choices(self) -> str:
        settings = json.dumps(dataclasses.asdict(self.config), sort_keys=True)
        return f"{type(self).__qualname__} {self.version} {settings} {self.dtype}"

    def _tensor(self) -> torch.Tensor:
        """One of the network's, if it has any."""
        tensors = itertools.chain(self.vision_tower.parameters(), self.vision_tower.buffers())
        return next((t for t in tensors if t.is_floating_point()), torch.zeros(1))

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor().dtype

    @property
    def device(self) -> torch.device:
        return self._tensor().device

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros (1, hidden_size): upstream's stand-in where there is no picture."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def num_patches_per_side(self) -> int:
        """Of a square grid; `InputError` of another."""
        grid = self.grid
        if grid is None or grid[0] != grid[1]:
            raise InputError(
                f"vision tower {self.vision_tower_name}: its {self.num_patches} feature vectors "
                "are no square of patches, which image_aspect_ratio anyres needs"
            )
        return grid[0]

    @functools.cached_property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(3, H, W): what the picture processor makes of any picture."""
        blanks = [Image.new("RGB", size) for size in ((48, 32), (32, 48))]
        made = [self.image_processor.preprocess(b, return_tensors="pt") for b in blanks]
        shapes = [tuple(pixels["pixel_values"][0].shape) for pixels in made]
        if shapes[0] != shapes[1] or len(shapes[0]) != 3:
            raise InputError(
                f"vision tower {self.vision_tower_name}: its picture processor makes {shapes[0]} "
                f"of a wide picture and {shapes[1]} of a high one, one shape (3, H, W) is expected"
            )
        return shapes[0]

    @property
    def image_size(self) -> int:
        """Pixels along a side of what it sees; `InputError` if that is no square."""
        _, height, width = self.pixel_shape
        if height != width:
            raise InputError(
                f"vision tower {self.vision_tower_name}: it sees {width} x {height} pixels, "
                "image_aspect_ratio anyres needs a square"
            )
        return height


def _bare(name: str) -> str:
    """A tensor's name within the tower, as `checkpoint_names` has it."""
    return tower_name(f"vision_tower.{name}") or name


def _is_a(value: Any, kind: type) -> bool:
    kinds = (int, float) if kind is float else (kind,)
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
