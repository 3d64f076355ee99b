"""Upstream's layout ↔ transformers' own LLaVA: ids, pixels and prompts bit for bit, and logits.

The checkpoints are those that upstream itself wrote (`tests/golden/upstream`), and random ones of
other language models and towers.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.conversation import conv_templates, get_template
from llava.errors import InputError
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import model_class, save_full
from llava.model.convert import main, rename_to_hf, rename_to_llava, to_hf, to_llava
from llava.model.hf_processor import chat_template, with_image_token
from llava.model.shards import Shards

UPSTREAM = Path(__file__).parents[2] / "golden" / "upstream"
TOWER = UPSTREAM / "tower"
LLM = UPSTREAM / "llm"
TALK = ["What is this?", "A cat.", "Why?"]


def with_config(folder: Path, out: Path, **changes) -> Path:
    """A copy of a LLaVA whose tower is where it is on this machine, and other settings changed."""
    shutil.copytree(folder, out)
    file = out / "config.json"
    values = json.loads(file.read_text()) | {"mm_vision_tower": str(TOWER)} | changes
    file.write_text(json.dumps(values))
    return out


def make_llava(out: Path, kind: str, dtype: torch.dtype, tower: Path = TOWER, **values) -> Path:
    """A random LLaVA on another language model, as a full folder of upstream's layout."""
    from transformers import AutoConfig, AutoTokenizer

    torch.manual_seed(3)
    settings = dict(
        vocab_size=1200, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        pad_token_id=None, mm_vision_tower=str(tower), mm_hidden_size=16, use_mm_proj=True,
        mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_use_im_patch_token=False,
        image_aspect_ratio="square", dtype=dtype,
    )  # fmt: skip
    config = AutoConfig.for_model(kind, **settings | values)
    model = model_class(config)(config).to(dtype)
    tokenizer = AutoTokenizer.from_pretrained(LLM)
    if values.get("mm_use_im_start_end"):
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    save_full(model, tokenizer, out)
    return out


def make_siglip(out: Path) -> Path:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(4)
    config = SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_attention_heads=2, image_size=16, patch_size=8)  # fmt: skip
    SiglipVisionModel(config).save_pretrained(out)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(out)
    return out


MADE = {
    "mistral, square, fp16": ("mistral", torch.float16, {}),
    "qwen2, tied, pad, bf16": (
        "qwen2",
        torch.bfloat16,
        {"tie_word_embeddings": True, "image_aspect_ratio": "pad"},
    ),
    "gemma": ("gemma", torch.float32, {"tie_word_embeddings": True}),
    "class token, start and end": (
        "llama",
        torch.float32,
        {
            "mm_vision_select_feature": "cls_patch",
            "mm_vision_select_layer": -1,
            "mm_use_im_start_end": True,
            "vocab_size": 1210,
            "conversation_template": "llava_llama_2",
        },
    ),
    "siglip, pad": ("llama", torch.float32, {"image_aspect_ratio": "pad"}),
}


@pytest.fixture(scope="module", params=["full", "projector", "lora", *MADE])
def pair(request, tmp_path_factory) -> tuple[Path, Path | None, Path]:
    """A LLaVA, its base, and the same in transformers' layout."""
    folder = tmp_path_factory.mktemp("pair")
    base = None
    if request.param in MADE:
        kind, dtype, values = MADE[request.param]
        tower = make_siglip(folder / "siglip") if "siglip" in request.param else TOWER
        source = make_llava(folder / "llava", kind, dtype, tower, **values)
    else:
        source = with_config(UPSTREAM / f"llava-{request.param}", folder / "llava")
        base = None if request.param == "full" else LLM
    # The base is in float16; the LoRA is to be merged in the type in which it is compared.
    dtype = "float32" if request.param == "lora" else None
    to_hf(str(source), str(folder / "hf"), model_base=base and str(base), dtype=dtype)
    return source, base, folder / "hf"


def pictures() -> list[Image.Image]:
    noise = torch.randint(0, 256, (20, 33, 3), generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(noise.to(torch.uint8).numpy())]


def test_logits_ids_pixels_and_prompt_are_the_same(pair):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    source, base, hf = pair
    tokenizer, ours, image_processor, _ = load_pretrained_model(
        str(source), base and str(base), "any", device="cpu"
    )
    theirs, info = LlavaForConditionalGeneration.from_pretrained(
        hf, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(hf, backend="pil")

    template = get_template(getattr(ours.config, "conversation_template", None) or "vicuna_v1")
    mark = "<image>"
    if getattr(ours.config, "mm_use_im_start_end", False):
        mark = "<im_start><image><im_end>"
    messages = []
    for i, text in enumerate(TALK):
        template.append_message(template.roles[i % 2], text if i else f"{mark}\n{text}")
        content = [{"type": "text", "text": text}, *([] if i else [{"type": "image"}])]
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    template.append_message(template.roles[1], None)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == template.get_prompt()
    assert processor.tokenizer.chat_template == processor.chat_template

    inputs = processor(text=prompt, images=pictures(), return_tensors="pt")
    pixels = process_images(pictures(), image_processor, ours.config)
    assert torch.equal(inputs["pixel_values"], pixels)
    ids = tokenizer_image_token(prompt, tokenizer, processor.image_token_id)
    per_picture = theirs.config.image_seq_length
    expanded = [[i] * (per_picture if i == processor.image_token_id else 1) for i in ids]
    assert inputs["input_ids"][0].tolist() == sum(expanded, [])
    with torch.no_grad():
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
        a = ours(ids, images=pixels).logits
        b = theirs.eval()(**inputs).logits
    rows = ours.config.vocab_size
    torch.testing.assert_close(a, b[..., :rows], rtol=1e-5, atol=1e-5)
    # A token that is new is never the answer.
    assert (b[..., rows:].max(-1).values < a.max(-1).values).all()


@pytest.mark.parametrize("legacy", ["false", "true"])
def test_the_tokenizer_with_image_gives_upstreams_ids(legacy, upstream_tokenizer):
    golden = json.loads((UPSTREAM.parent / "upstream_tokens.json").read_text())
    theirs = with_image_token(upstream_tokenizer(legacy), "<image>")
    again = with_image_token(theirs, "<image>")
    image = theirs.convert_tokens_to_ids("<image>")
    for prompt, ids in zip(golden["prompts"], golden["legacy"][legacy], strict=True):
        # Where a prompt begins, transformers cannot express a second space.
        if legacy == "true" or not prompt.startswith((" ", "\u2581")):
            expected = [image if i == -200 else i for i in ids]
            assert theirs(prompt).input_ids == again(prompt).input_ids == expected, prompt


def test_there_and_back_gives_the_same_tensors(pair, tmp_path):
    source, base, hf = pair
    to_llava(str(hf), str(tmp_path / "back"))
    back = Shards(tmp_path / "back")
    if base is None:
        old = {n: t for n in Shards(source) if wanted(n) for t in [Shards(source)[n]]}
        assert set(back) == set(old)
        for name, tensor in old.items():
            assert back[name].dtype == tensor.dtype, name
            assert torch.equal(back[name], tensor), name
        a, b = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back"))
        moved = {
            "mm_vision_tower",
            "transformers_version",
            "_name_or_path",
            "unfreeze_mm_vision_tower",
        }
        assert {key: b.get(key) for key in a.keys() - moved} == {
            key: a[key] for key in a.keys() - moved
        }
    tokens = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    for name in tokens:
        if ((base or source) / name).is_file():
            assert ((base or source) / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    with torch.no_grad():
        logits = []
        for path, on in ((source, base), (tmp_path / "back", None)):
            tokenizer, model, image_processor, _ = load_pretrained_model(
                str(path), on and str(on), "any", device="cpu"
            )
            ids = tokenizer_image_token("USER: <image>\nWhat?", tokenizer, return_tensors="pt")
            pixels = process_images(pictures(), image_processor, model.config)
            logits.append(model(ids[None], images=pixels).logits)
    assert torch.equal(*logits)


def wanted(name: str) -> bool:
    return "vision_tower" not in name and not name.endswith("inv_freq")


# -- the other ways in ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return with_config(UPSTREAM / "llava-full", tmp_path_factory.mktemp("full") / "llava")


@pytest.fixture(scope="module")
def hf(full, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "hf"
    to_hf(str(full), str(out))
    return out


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


IN_MEMORY = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^(vision_tower|multi_modal_projector)\.": r"model.\1.",
}
FLAT_TOWER = {r"^model\.vision_tower\.vision_model\.": "model.vision_tower."}


@pytest.mark.parametrize("changes", [IN_MEMORY, IN_MEMORY | FLAT_TOWER], ids=["4.57", "5"])
def test_the_names_that_transformers_has_in_memory_are_read(changes, hf, full, tmp_path):
    shutil.copytree(hf, tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    for pattern, new in changes.items():
        tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    assert "model.language_model.norm.weight" in tensors
    assert "lm_head.weight" in tensors
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    to_llava(str(tmp_path / "hf"), str(tmp_path / "back"))
    back, old = Shards(tmp_path / "back"), Shards(full)
    assert all(torch.equal(back[name], old[name]) for name in old if wanted(name))


def test_what_transformers_itself_saved_keeps_its_vocabulary(hf, full, tmp_path):
    """Its folder lacks upstream's tokenizer, so `<image>` and `<pad>` stay tokens."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(hf, dtype=torch.float32)
    model.save_pretrained(tmp_path / "hf")
    AutoProcessor.from_pretrained(hf, backend="pil").save_pretrained(tmp_path / "hf")
    to_llava(str(tmp_path / "hf"), str(tmp_path / "llava"))
    tokenizer, ours, processor, _ = load_pretrained_model(
        str(tmp_path / "llava"), None, "any", device="cpu"
    )
    assert ours.config.vocab_size == 1216
    assert tokenizer.pad_token == "<pad>"
    assert ours.config.image_aspect_ratio == "pad"
    before = load_pretrained_model(str(full), None, "any", device="cpu")
    prompt = "USER: <image>\nWhat? ASSISTANT:"
    a, b = (
        tokenizer_image_token(prompt, t, return_tensors="pt")[None] for t in (before[0], tokenizer)
    )
    assert torch.equal(a, b)
    with torch.no_grad():
        pixels = process_images(pictures(), processor, ours.config)
        expected = before[1](a, images=pixels).logits
        found = ours(a, images=pixels).logits[..., :1200]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    to_hf(str(tmp_path / "llava"), str(tmp_path / "again"))
    again, first = (load_file(f / "model.safetensors") for f in (tmp_path / "again", hf))
    assert all(torch.equal(again[name], first[name].float()) for name in first)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"]) == (1200, 1201)


def test_shards_are_written_and_read(full, hf, tmp_path):
    to_hf(str(full), str(tmp_path / "hf"), shard_bytes=40_000)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    whole = load_file(hf / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    parts = Shards(tmp_path / "hf")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    to_llava(str(tmp_path / "hf"), str(tmp_path / "back"), shard_bytes=40_000)
    back, old = Shards(tmp_path / "back"), Shards(full)
    assert all(torch.equal(back[name], old[name]) for name in old if wanted(name))


def test_a_tower_of_the_folder_comes_before_the_one_that_is_named(full, tmp_path):
    """The folder of v1.6's training has a tower of its own, here moved."""
    llava = with_config(full, tmp_path / "llava", unfreeze_mm_vision_tower=True)
    tensors = dict(Shards(llava))
    key = "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"
    tensors[key] = tensors[key] + 1
    for file in llava.glob("pytorch_model*"):
        file.unlink()
    save_file(tensors, llava / "model.safetensors")
    to_hf(str(llava), str(tmp_path / "hf"))
    to_llava(str(tmp_path / "hf"), str(tmp_path / "back"))
    tower = load_file(tmp_path / "back" / "vision_tower" / "model.safetensors")
    assert torch.equal(tower["vision_model.post_layernorm.bias"], tensors[key])
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["mm_vision_tower"] == str(tmp_path / "back" / "vision_tower")

    with pytest.raises(InputError, match="post_layernorm.bias is not that of .*another tower"):
        to_llava(str(tmp_path / "hf"), str(tmp_path / "x"), vision_tower=str(TOWER))
    for name in [name for name in tensors if "vision_tower" in name]:
        del tensors[name]
    save_file(tensors, llava / "model.safetensors")
    with pytest.raises(InputError, match="tuned but is not in the weights"):
        to_hf(str(llava), str(tmp_path / "x"))


def test_the_tower_may_be_named_instead_of_written(hf, tmp_path, capsys):
    main(["--to", "llava", "--model-path", str(hf), "--output", str(tmp_path / "named"),
          "--vision-tower", str(TOWER), "--dtype", "bfloat16"])  # fmt: skip
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    assert config["mm_vision_tower"] == str(TOWER)
    assert config["torch_dtype"] == "bfloat16"
    assert not (tmp_path / "named" / "vision_tower").exists()
    weights = Shards(tmp_path / "named")
    assert {weights[name].dtype for name in weights} == {torch.bfloat16}
    assert not capsys.readouterr().out
    to_llava(str(hf), str(tmp_path / "trusted"), vision_tower="nobody/a-tower-that-is-not-here")
    assert "taken on trust" in capsys.readouterr().out


# -- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_the_chat_template_renders_the_conversation(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template(conv_templates[name])
    texts = ["one", 'two "quoted" {{ braces }}', "three\n", "four", "five"]
    for turns in range(1, 6):
        for open_turn in (False, True) if turns % 2 else (False,):
            talk, messages = get_template(name), []
            for i, text in enumerate(texts[:turns]):
                talk.append_message(talk.roles[i % 2], text if i else f"<image>\n<image>\n{text}")
                content = [{"type": "text", "text": text}] + [{"type": "image"}] * (0 if i else 2)
                role = ("user", "assistant")[i % 2]
                messages.append({"role": role, "content": text if i == 1 else content})
            if open_turn:
                talk.append_message(talk.roles[1], None)
            (rendered,), _ = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=open_turn
            )
            assert rendered == talk.get_prompt()


def test_a_system_message_takes_the_place_of_the_templates_own():
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(name, messages):
        return render_jinja_template(
            [messages], chat_template=chat_template(conv_templates[name]),
            add_generation_prompt=True,
        )[0][0]  # fmt: skip

    ask = {"role": "user", "content": "hi"}
    be_brief = {"role": "system", "content": "Be brief."}
    assert render("v1", [be_brief, ask]) == "Be brief. USER: hi ASSISTANT:"
    assert render("chatml_direct", [be_brief, ask]) == (
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nhi<|im_end|>"
        "<|im_start|>assistant\n"
    )
    assert render("llava_llama_2", [be_brief, ask]) == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST]"
    )
    with pytest.raises(Exception, match="take turns"):
        render("v1", [ask, ask])


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'.*cannot express"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"mm_vision_tower": None}, "no mm_vision_tower, so this is no LLaVA"),
        ({"mm_vision_tower": "/no/such/tower"}, "/no/such/tower: no such folder"),
        ({"text_config": {}}, "transformers' layout already"),
        ({"conversation_template": "vicuna"}, "'vicuna' is no conversation template"),
        ({"mm_use_im_start_end": True}, "the tokenizer has no <im_start>"),
        ({"num_hidden_layers": 3}, "layers.2.*is nothing, its config makes it"),
        ({"hidden_size": 8}, r"is \(.*16\), its config makes it \(.*8\)"),
    ],
)
def test_what_transformers_cannot_express_is_refused(changes, message, full, tmp_path):
    llava = with_config(full, tmp_path / "llava", **changes)
    with pytest.raises(InputError, match=message):
        to_hf(str(llava), str(tmp_path / "hf"))
    assert [p.name for p in tmp_path.iterdir()] == ["llava"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_next"}, "model_type is 'llava_next'"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
    ],
)
def test_what_upstream_cannot_express_is_refused(changes, message, hf, tmp_path):
    shutil.copytree(hf, tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        to_llava(str(tmp_path / "hf"), str(tmp_path / "llava"))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_broken_folders_are_refused_and_leave_nothing(full, hf, tmp_path):
    llava = with_config(full, tmp_path / "llava")
    out = str(tmp_path / "out")
    (llava / "pytorch_model-00002-of-00003.bin").rename(tmp_path / "shard")
    with pytest.raises(InputError, match="pytorch_model-00002-of-00003.bin, which is not there"):
        to_hf(str(llava), out)
    (llava / "pytorch_model-00002-of-00003.bin").write_bytes(
        (tmp_path / "shard").read_bytes()[:1000]
    )
    with pytest.raises(InputError, match="00002-of-00003.bin: empty, cut short"):
        to_hf(str(llava), out)
    shutil.copy(
        llava / "pytorch_model-00003-of-00003.bin", llava / "pytorch_model-00002-of-00003.bin"
    )
    with pytest.raises(InputError, match="has no tensor .*, which the index puts there"):
        to_hf(str(llava), out)

    broken = shutil.copytree(hf, tmp_path / "hf")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cut short or not safetensors"):
        to_llava(str(broken), out)
    tensors = load_file(hf / "model.safetensors") | {"audio_tower.weight": torch.zeros(1)}
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(InputError, match="audio_tower.weight is no part of"):
        to_llava(str(broken), out)

    with pytest.raises(InputError, match="name its language model with --model-base"):
        to_hf(str(UPSTREAM / "llava-projector"), out, vision_tower=str(TOWER))
    with pytest.raises(InputError, match="is there already"):
        to_hf(str(full), str(tmp_path))
    with pytest.raises(InputError, match="--conv-mode has no meaning"):
        main(["--to", "llava", "--model-path", "x", "--output", "y", "--conv-mode", "v1"])
    assert not any(p.name.startswith((".", "out")) for p in tmp_path.iterdir())


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(full, tmp_path):
    from transformers import AutoTokenizer

    llava = with_config(full, tmp_path / "llava")
    tokenizer = AutoTokenizer.from_pretrained(llava)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(llava)
    with pytest.raises(InputError, match="has 1201 tokens, the embedding .* only 1200 rows"):
        to_hf(str(llava), str(tmp_path / "hf"))


def test_names_go_there_and_back():
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.mm_projector.2.bias",
                 "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"):  # fmt: skip
        assert rename_to_llava(rename_to_hf(name)) == name
    assert rename_to_hf("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    with pytest.raises(InputError, match="mm_projector.4.weight has no place"):
        rename_to_hf("model.mm_projector.4.weight")
