"""The description of how pictures and text become a sample, fixed when a model is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava.conversation import default_template
from llava.mm_utils import image_pixels, open_image

if TYPE_CHECKING:
    import torch

    from llava.tiling import Tiling


@dataclass(frozen=True)
class SampleFormat:
    """The facts of a model that a data set needs to make samples for it.

    Attributes:
        version: the conversation template.
        is_multimodal: False in a run without a vision tower, where a picture is an error.
        image_processor: the vision tower's.
        image_tokens: tokens a picture takes, where it is not tiled; None: it stays one -200, to
            which the model gives its places.
        tiling: for tiled pictures, how they are cut and how many tokens each takes; else None.
        image_aspect_ratio: `square`, `pad` or `anyres`.
        image_grid_pinpoints: the resolutions that `anyres` chooses from.
        mm_use_im_start_end: whether a start and an end token surround each picture.
    """

    version: str
    is_multimodal: bool = False
    image_processor: Any = None
    image_tokens: int | None = 1
    tiling: Tiling | None = None
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: Any = None
    mm_use_im_start_end: bool = False

    @classmethod
    def of_model(cls, model: Any, version: str) -> SampleFormat:
        """The format of a loaded LLaVA, by its config, its tower and its connector."""
        config, tower = model.config, model.get_vision_tower()
        return cls(
            version=version,
            is_multimodal=True,
            image_processor=tower.image_processor,
            image_tokens=model.get_model().mm_projector.num_tokens(tower.num_patches),
            tiling=model.tiling,
            image_aspect_ratio=getattr(config, "image_aspect_ratio", None) or "square",
            image_grid_pinpoints=getattr(config, "image_grid_pinpoints", None),
            mm_use_im_start_end=bool(getattr(config, "mm_use_im_start_end", False)),
        )

    @classmethod
    def of_arguments(cls, data_args: Any) -> SampleFormat:
        """The format in `data_args` that a program fills by itself, as those for upstream do.

        Without a `version` it is that of `llava.conversation.default_conversation`.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        given = {name: getattr(data_args, name) for name in names if hasattr(data_args, name)}
        return cls(**{"version": default_template(), "image_tokens": None, **given})

    def pixels(self, path: str) -> torch.Tensor:
        """The picture at `path` as the tower takes it: (3, H, W), or tiles of that shape."""
        return image_pixels(open_image(path), self.image_processor, self)
