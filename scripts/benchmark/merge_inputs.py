"""Models of LLaVA-1.5-7B's geometry with random weights, for scripts/benchmark/merge.py.

    python scripts/benchmark/merge_inputs.py projectors FOLDER     # base.safetensors, 0 .. 3
    python scripts/benchmark/merge_inputs.py lora FOLDER           # lora-0 .. lora-3
    python scripts/benchmark/merge_inputs.py full FOLDER           # full-0, full-1: 27 GB

All bfloat16. Values are cut out of 64 million that were drawn once: no merge's cost depends on
them, and to draw 13 billion would take longer than all that is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from llava.model.shards import write_shards  # noqa: E402
from llava.state import save  # noqa: E402

SIDE, INNER, LAYERS, WORDS, VISION, RANK = 4096, 11008, 32, 32000, 1024, 128
POOL = 2**26
LINEAR = {f"self_attn.{x}_proj": (SIDE, SIDE) for x in "qkvo"} | {
    "mlp.gate_proj": (INNER, SIDE), "mlp.up_proj": (INNER, SIDE), "mlp.down_proj": (SIDE, INNER)
}  # fmt: skip
PROJECTOR = {
    "model.mm_projector.0.weight": (SIDE, VISION), "model.mm_projector.0.bias": (SIDE,),
    "model.mm_projector.2.weight": (SIDE, SIDE), "model.mm_projector.2.bias": (SIDE,),
}  # fmt: skip
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "hidden_size": SIDE,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": WORDS, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "mm_hidden_size": VISION, "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "use_mm_proj": True,
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 256, "bias": "none",
    "lora_dropout": 0.05, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
    "target_modules": sorted(name.split(".")[1] for name in LINEAR),
}  # fmt: skip


class Pool:
    """Normal values that were drawn once; a tensor is some of them, from a place of its own."""

    def __init__(self, seed: int):
        self._draw = torch.Generator().manual_seed(seed)
        self._values = (0.02 * torch.randn(POOL, generator=self._draw)).bfloat16()

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        filled = torch.empty(shape, dtype=torch.bfloat16)
        for part in filled.view(-1).split(POOL // 2):
            start = int(torch.randint(POOL // 2, (1,), generator=self._draw))
            part.copy_(self._values[start : start + len(part)])
        return filled


def projectors(folder: Path) -> None:
    """A base, and four experts that moved from it, together and each for itself."""
    pool = Pool(0)
    base = {name: pool.tensor(shape) for name, shape in PROJECTOR.items()}
    common = {name: pool.tensor(shape) for name, shape in PROJECTOR.items()}
    save_file(base, folder / "base.safetensors")
    for k in range(4):
        own = {n: t + 0.1 * (common[n] + pool.tensor(tuple(t.shape))) for n, t in base.items()}
        save_file(own, folder / f"{k}.safetensors")


def lora(folder: Path) -> None:
    """Four adapters of rank 128 on all linear layers of the language model, with a projector."""
    for k in range(4):
        pool, tensors, out = Pool(1 + k), {}, folder / f"lora-{k}"
        out.mkdir()
        for i in range(LAYERS):
            for name, (rows, columns) in LINEAR.items():
                stem = f"base_model.model.model.layers.{i}.{name}"
                tensors[f"{stem}.lora_A.weight"] = pool.tensor((RANK, columns))
                tensors[f"{stem}.lora_B.weight"] = pool.tensor((rows, RANK))
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        beside = {f"base_model.model.{name}": pool.tensor(s) for name, s in PROJECTOR.items()}
        save(beside, out / "non_lora_trainables.bin")
        (out / "config.json").write_text(json.dumps(CONFIG))
        (out / "adapter_config.json").write_text(json.dumps(ADAPTER))


def full(folder: Path) -> None:
    """Two full checkpoints in shards, 6.8 billion values each."""
    for k in range(2):
        out = folder / f"full-{k}"
        out.mkdir()
        write_shards(out, _model(Pool(10 + k)))
        (out / "config.json").write_text(json.dumps(CONFIG))


def _model(pool: Pool) -> Iterator[tuple[str, torch.Tensor]]:
    yield "model.embed_tokens.weight", pool.tensor((WORDS, SIDE))
    for i in range(LAYERS):
        for name, shape in LINEAR.items():
            yield f"model.layers.{i}.{name}.weight", pool.tensor(shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", pool.tensor((SIDE,))
    yield "model.norm.weight", pool.tensor((SIDE,))
    for name, shape in PROJECTOR.items():
        yield name, pool.tensor(shape)
    yield "lm_head.weight", pool.tensor((WORDS, SIDE))


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    {"projectors": projectors, "lora": lora, "full": full}[kind](folder)
