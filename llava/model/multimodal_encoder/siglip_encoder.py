"""The SigLIP vision tower: as CLIP's, without a class token."""

from __future__ import annotations

from typing import Any

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


class SigLipVisionTower(CLIPVisionTower):
    """A SigLIP vision encoder; `patch` and `cls_patch` are the same, there being no class token."""

    class_tokens = 0

    @staticmethod
    def _classes() -> tuple[type[Any], type[Any]]:
        from transformers import SiglipImageProcessorPil, SiglipVisionModel

        return SiglipImageProcessorPil, SiglipVisionModel
