"""Training steps side by side: this package, and transformers' own LLaVA trained the usual way.

    python scripts/benchmark/train_step.py                          # the playground's, any CPU
    python scripts/benchmark/train_step.py --language_model FOLDER  # with another language model
    python scripts/benchmark/train_step.py --geometry llava-1.5-7b  # random weights, bf16, a GPU

All have the same weights (the very tensors, but for what trains), the same batch and the same
optimizer, and take turns: a step each, many times; medians are compared. Peak memory is that of a
process of its own for each: the weights, and the most that a step adds to them. "The usual way" is
`LlavaForConditionalGeneration` with everything frozen but the projector (or LoRA by peft beside
it), pixels and an attention mask in, `.loss` out; upstream's scripts ask for gradient checkpointing
besides. "cached" is this package with the frozen tower's features at hand, as from the second visit
to a picture.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[2]
MODES = ("projector", "lora")
SYSTEMS = (
    "ours",
    "ours, cached",
    "ours, checkpointing",
    "transformers",
    "transformers, checkpointing",
)


# -- models and batches ---------------------------------------------------------------------------


def playground(args: argparse.Namespace):
    """The playground's LLaVA, and a batch maker of its real pictures and captions."""
    from llava.model.builder import from_pretrained, load_tokenizer
    from llava.model.checkpoint import read_config
    from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset

    backbones, data = ROOT / "playground/backbones", ROOT / "playground/data/emoji"
    folder = args.language_model or str(backbones / "llm")
    config = read_config(folder)
    tower_of(config, str(backbones / "vision_tower"), 192)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = from_pretrained(folder, config, dtype=dtype)
    model.get_model().mm_projector.float()
    tower = model.load_vision_tower(dtype, "cpu")
    tokenizer = load_tokenizer(folder, model_max_length=2048)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def batch(mode: str, size: int) -> dict:
        data_args = SimpleNamespace(
            version="plain" if mode == "projector" else "v1",
            is_multimodal=True,
            image_folder=str(data / "images"),
            image_aspect_ratio="square",
            image_processor=tower.image_processor,
            image_tokens=tower.num_patches,
            mm_use_im_start_end=False,
        )
        dataset = LazySupervisedDataset(str(data / "heldout_dev.json"), tokenizer, data_args)
        items = [dataset[i] for i in range(size)]
        return DataCollatorForSupervisedDataset(tokenizer)(items)

    return model, batch


def llava_7b(args: argparse.Namespace):
    """LLaVA-1.5-7B's shapes with random weights on a GPU, and made-up batches of its lengths."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

    from llava.model.llava_arch import llava_class
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    config = LlamaConfig()  # its defaults are the 7B model's
    tower_of(config, "openai/clip-vit-large-patch14-336", 1024)
    config._attn_implementation = args.attention
    with torch.device(args.device):
        torch.set_default_dtype(torch.bfloat16)
        model = llava_class(LlamaForCausalLM)(config)
        tower = CLIPVisionTower(config.mm_vision_tower, config, delay_load=True, config=vision)
        tower.vision_tower = tower._classes()[1](vision)
        torch.set_default_dtype(torch.float32)
    tower.is_loaded = True
    object.__setattr__(model.get_model(), "vision_tower", tower.requires_grad_(False).eval())
    model.get_model().mm_projector.float()

    def batch(mode: str, size: int) -> dict:
        from llava.train.data import DataCollatorForSupervisedDataset

        random = torch.Generator().manual_seed(0)
        question, answer = (0, 30) if mode == "projector" else (60, 180)
        items = []
        for i in range(size):
            text = torch.randint(5, 31000, (question + answer + i,), generator=random)
            ids = torch.cat([torch.tensor([1, -200]), text])
            labels = ids.clone()
            labels[: 2 + question] = -100
            pixels = torch.randn(3, 336, 336, generator=random).bfloat16()
            items.append(
                {"input_ids": ids, "labels": labels, "images": [pixels], "image_tokens": [576]}
            )
        tokenizer = SimpleNamespace(model_max_length=2048, pad_token_id=0)
        return DataCollatorForSupervisedDataset(tokenizer)(items)

    return model, batch


def tower_of(config, name: str, width: int) -> None:
    config.mm_vision_tower, config.mm_hidden_size = name, width
    config.mm_vision_select_layer, config.mm_projector_type = -2, "mlp2x_gelu"


def twin_of(model, system: str, args: argparse.Namespace):
    """Another model with the very tensors of `model`, and a projector of its own that is equal."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from llava.model.attention_float32 import train_in_float32

    tower, ours = model.get_vision_tower(), system.startswith("ours")
    config = copy.deepcopy(model.config)
    if not ours:
        config = LlavaConfig(
            vision_config=tower.config,
            text_config=config,
            image_token_index=_image_token(model),
        )
    config._attn_implementation = args.attention
    with torch.device("meta"):
        twin = (type(model) if ours else LlavaForConditionalGeneration)(config)
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    of_tower = {**tower.vision_tower.state_dict(), **dict(tower.vision_tower.named_buffers())}
    if ours:
        object.__setattr__(twin.get_model(), "vision_tower", tower)
    else:
        tensors = {_their_name(name): tensor for name, tensor in tensors.items()}
        tensors |= {f"model.vision_tower.{name}": tensor for name, tensor in of_tower.items()}
    # Tied ones under both names.
    for name, _ in [*twin.named_parameters(remove_duplicate=False), *twin.named_buffers()]:
        holder, _, last = name.rpartition(".")
        module = twin.get_submodule(holder)
        value = tensors[name].detach()
        if last in module._parameters:
            if "projector" in name:
                value = value.clone()
            module._parameters[last] = torch.nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[last] = value
    if ours:
        train_in_float32(twin)
    return twin


def _their_name(name: str) -> str:
    for i, layer in ((0, 1), (2, 2)):
        name = name.replace(f"mm_projector.{i}", f"multi_modal_projector.linear_{layer}")
    if name.startswith("model.") and "projector" not in name:
        return name.replace("model.", "model.language_model.", 1)
    return name


# -- a system that takes steps --------------------------------------------------------------------


class Stepper:
    """One system in one mode: `step()` trains on the batch and returns the loss."""

    def __init__(self, system: str, mode: str, model, batch: dict, args: argparse.Namespace):
        self.device, self.bf16 = args.device, args.bf16
        self.system, self.args, self.tower = system, args, getattr(model, "get_vision_tower", None)
        self.model = model.requires_grad_(False).train()
        ours = system.startswith("ours")
        projector = (
            model.get_model().mm_projector if ours else model.model.multi_modal_projector
        ).requires_grad_(True)
        if mode == "lora":
            self.model = _with_lora(model, ours)
            projector.requires_grad_(True)
        if system.endswith("checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-4
        )
        self.take(batch)

    def take(self, batch: dict) -> None:
        self.real_tokens = int(batch["attention_mask"].sum())
        if not self.system.startswith("ours"):
            batch = _for_transformers(batch, _image_token(self.model))
        self.batch = {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        if self.system == "ours, cached":
            self.batch["images"] = self.tower()(self.batch["images"])

    def step(self) -> float:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(**self.batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device != "cpu":
            torch.cuda.synchronize()
        return float(loss.detach())


def _with_lora(model, ours: bool):
    from llava.model.lora import add_lora, find_all_linear_names

    torch.manual_seed(0)
    if ours:
        return add_lora(model, r=128, alpha=256, dropout=0.0)
    from peft import LoraConfig, get_peft_model

    names = "|".join(find_all_linear_names(model.model.language_model))
    config = LoraConfig(
        r=128, lora_alpha=256, lora_dropout=0.0, target_modules=rf".*language_model.*\.({names})"
    )
    return get_peft_model(model, config)


def _image_token(model) -> int:
    """A token that no text here has stands for pictures, which transformers looks up."""
    return model.get_input_embeddings().weight.shape[0] - 1


def _for_transformers(batch: dict, image_token: int) -> dict:
    ids = batch["input_ids"]
    return {
        "input_ids": ids.masked_fill(ids == -200, image_token),
        "attention_mask": batch["attention_mask"].long(),
        "labels": batch["labels"],
        "pixel_values": batch["images"],
    }


# -- measuring ------------------------------------------------------------------------------------


def memory_of_a_process(system: str, mode: str, args: argparse.Namespace) -> float:
    """Peak GB of a process that loads one system and takes three steps."""
    # What is freed goes back at once, or the peak would be that of glibc's caches.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *args.argv, "--only", system, "--mode", mode],
        capture_output=True, text=True, cwd=ROOT, env=env,
    )  # fmt: skip
    if found.returncode:
        raise SystemExit(found.stderr[-3000:])
    return json.loads(found.stdout.splitlines()[-1])


def one_process(args: argparse.Namespace) -> None:
    model, batches = GEOMETRIES[args.geometry](args)
    tower = model.get_vision_tower()
    weights = sum(t.nbytes for m in (model, tower) for t in m.state_dict().values())
    model = twin_of(model, args.only, args)
    gc.collect()
    # A small step first: what a step needs of code and buffers of the libraries is no news then.
    stepper = Stepper(args.only, args.mode, model, batches(args.mode, 2), args)
    stepper.step()
    batch = batches(args.mode, args.batch)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident()
    stepper.take(batch)
    stepper.step()
    stepper.step()
    peak = (_resident("VmHWM") - before) * 1000 + weights
    print(json.dumps((torch.cuda.max_memory_allocated() if args.device != "cpu" else peak) / 1e9))


def _resident(key: str = "VmRSS") -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def times(mode: str, args: argparse.Namespace) -> dict[str, dict]:
    """Median seconds a step, and the losses of the first steps, of all systems in turn."""
    torch.manual_seed(0)
    model, batches = GEOMETRIES[args.geometry](args)
    batch = batches(mode, args.batch)
    steppers = {s: Stepper(s, mode, twin_of(model, s, args), batch, args) for s in SYSTEMS}
    seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    losses: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(args.steps):
        for system, stepper in steppers.items():
            began = time.perf_counter()
            losses[system].append(stepper.step())
            seconds[system].append(time.perf_counter() - began)
    return {
        system: {
            "seconds": (median := statistics.median(seconds[system][3:])),
            "tokens": stepper.real_tokens / median,
            "losses": losses[system][:5],
        }
        for system, stepper in steppers.items()
    }


def main() -> None:
    args = arguments()
    if args.only:
        return one_process(args)
    print(
        f"{args.geometry}, {device_name(args)}, torch {torch.__version__}, {args.attention}, "
        f"batch {args.batch}; × is against transformers\n"
    )
    print("| step | system | s | tokens/s | speed × | peak GB | memory × | first loss |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for mode in args.modes:
        rows = times(mode, args)
        peak = {system: memory_of_a_process(system, mode, args) for system in SYSTEMS}
        reference = rows["transformers"]
        for system, row in rows.items():
            print(
                f"| {mode} | {system} | {row['seconds']:.4f} | {row['tokens']:.0f} "
                f"| {reference['seconds'] / row['seconds']:.2f} | {peak[system]:.3f} "
                f"| {peak[system] / peak['transformers']:.2f} | {row['losses'][0]:.5f} |",
                flush=True,
            )
        apart = max(
            abs(a - b)
            for row in rows.values()
            for a, b in zip(row["losses"], reference["losses"], strict=True)
        )
        print(f"\n{mode}: the losses of five steps differ by at most {apart:.1e}\n", flush=True)
        if args.language_model:  # in a deep one rounding grows from step to step
            apart = max(abs(row["losses"][0] - reference["losses"][0]) for row in rows.values())
        if not args.bf16 and apart > 1e-4:
            raise SystemExit("the losses differ: these are not the same steps")
    return None


def device_name(args: argparse.Namespace) -> str:
    if args.device != "cpu":
        return torch.cuda.get_device_name()
    return f"CPU with {torch.get_num_threads()} threads"


GEOMETRIES = {"playground": playground, "llava-1.5-7b": llava_7b}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="playground")
    parser.add_argument("--language_model", help="a folder, in place of the playground's")
    parser.add_argument("--bf16", action="store_true", help="always so with 7B")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=23, help="the first three are not counted")
    parser.add_argument("--device", default=None, help="cpu for the playground, cuda for 7B")
    parser.add_argument("--attention", default="sdpa", help="sdpa, eager or flash_attention_2")
    parser.add_argument("--only", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.argv = sys.argv[1:]
    args.bf16 |= args.geometry != "playground"
    args.device = args.device or ("cpu" if args.geometry == "playground" else "cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    return args


if __name__ == "__main__":
    main()
