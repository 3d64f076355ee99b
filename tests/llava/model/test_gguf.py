"""GGUF files that the test writes itself: read as the model that they were made of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from fed.remote.hello import model_fingerprint
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates, template_of
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.gguf import convert, find_gguf, gguf_config, gguf_tokenizer, gguf_weights, main
from llava.model.shards import Shards, local_folder
from llava.serve.demo import base_of, named
from llava.train.arguments import parse
from llava.train.preprocess import render, tokenize
from llava.train.train import train

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "a red circle on a white ground",
    "What is this?",
    "This is a blue square.",
    "user assistant",
]


def bpe() -> Tokenizer:
    """A byte-level BPE of some words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=bpe().get_vocab_size(), hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as GGUF orders those of queries and keys: the halves of a rotation interleaved."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def write(
    model: LlamaForCausalLM, path: Path, quantised: bool = False, arch: str = "llama"
) -> Path:
    """The model as a GGUF; `quantised`: matrices as Q8_0."""
    import gguf

    config, tokenizer = model.config, bpe()
    out = gguf.GGUFWriter(str(path), arch)
    out.add_context_length(256)
    out.add_embedding_length(64)
    out.add_block_count(2)
    out.add_feed_forward_length(96)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(16)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    out.add_token_list(vocabulary)
    out.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_chat_template(CHATML)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {"token_embd.weight": model.model.embed_tokens.weight}
    tensors["output_norm.weight"] = model.model.norm.weight
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                weight = permuted(weight, 4 if theirs == "attn_q" else 2)
            tensors[f"blk.{i}.{theirs}.weight"] = weight
    for name, tensor in tensors.items():
        array = tensor.detach().numpy().astype(numpy.float32)
        if quantised and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            out.add_tensor(name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory) -> Path:
    """A folder with one GGUF in it, of float32."""
    return write(source, tmp_path_factory.mktemp("gguf") / "model.gguf").parent


def logits_of(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_gguf_is_the_model_that_it_was_made_of(source, plain, tmp_path):
    ids = torch.tensor([[5, 17, 80, 200, 3]])
    expected = logits_of(source, ids)
    tokenizer, model, processor, _ = load_pretrained_model(str(plain), None, "", device="cpu")
    assert processor is None
    assert type(model) is LlamaForCausalLM
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-5, rtol=1e-4)
    for text in TEXT:
        assert tokenizer(text).input_ids == bpe().encode(text).ids
    write(source, tmp_path / "q8.gguf", quantised=True)
    weights = gguf_weights(tmp_path / "q8.gguf")
    for name, tensor in source.state_dict().items():
        step = tensor.abs().max() / 127  # Q8_0 has steps of a block's greatest value / 127
        assert (weights[name] - tensor).abs().max() <= 0.51 * step + 1e-3 * tensor.abs().max()


def test_its_own_chat_template_is_the_one_that_is_used(plain):
    tokenizer = gguf_tokenizer(plain / "model.gguf")
    assert template_of(tokenizer) == "smollm2"
    chat = conv_templates["smollm2"].copy()
    said = []
    for question, answer in (("What is this?", "A circle."), ("Why?", "It is round.")):
        for role, name, text in zip(
            chat.roles, ("user", "assistant"), (question, answer), strict=True
        ):
            chat.append_message(role, text)
            said.append({"role": name, "content": text})
    assert chat.get_prompt() == tokenizer.apply_chat_template(said, tokenize=False)
    turns = [f"<image>\n{said[0]['content']}", *(turn["content"] for turn in said[1:])]
    ids, labels = tokenize(render(turns, conv_templates["smollm2"]), tokenizer)
    learnt = tokenizer.decode(labels[labels != -100])
    assert learnt == "A circle.<|im_end|>\nIt is round.<|im_end|>\n"
    wanted = tokenizer(chat.get_prompt()).input_ids
    whole = tokenizer(chat.get_prompt().replace("What", "\nWhat", 1)).input_ids
    assert [token for token in ids.tolist() if token != IMAGE_TOKEN_INDEX] == whole
    assert wanted == tokenizer.apply_chat_template(said, return_dict=False)
    assert tokenizer.eos_token == "<|im_end|>"
    _, model, _, _ = load_pretrained_model(str(plain), None, "", device="cpu")
    assert model.config.conversation_template == "smollm2"


def flags_for(flags, model, **changes) -> list[str]:
    return flags(model_name_or_path=model, max_steps=2, **changes)


def test_a_projector_trains_on_it_and_loads_on_it(flags, plain, tiny, tmp_path):
    out = tmp_path / "out"
    train(argv=flags_for(flags, plain, data_path=tiny / "a.json", output_dir=out))
    assert {"mm_projector.bin", "config.json"} <= {file.name for file in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["conversation_template"] == "smollm2"  # to ask in; it trained with `plain`
    assert base_of(str(out)) == str(plain)
    for base in (plain, plain / "model.gguf"):
        tokenizer, model, processor, _ = load_pretrained_model(
            str(out), str(base), "", device="cpu"
        )
        assert processor is not None
        assert model.get_model().mm_projector[0].weight.isfinite().all()
    assert model.config.conversation_template == "smollm2"
    # A copy with another GGUF beside it: which one, is to be said.
    both = tmp_path / "both"
    shutil.copytree(plain, both)
    shutil.copy(both / "model.gguf", both / "other.gguf")
    with pytest.raises(InputError, match=r"holds several GGUF files \(model.gguf, other.gguf\)"):
        load_pretrained_model(str(out), str(both), "", device="cpu")
    load_pretrained_model(str(out), str(both), "", device="cpu", gguf_file="other.gguf")
    args, *_ = parse(flags_for(flags, both, gguf_file="other.gguf"))
    assert args.model_name_or_path == str(both / "other.gguf")


def test_all_of_it_trains_and_is_an_ordinary_folder_afterwards(flags, plain, tiny, tmp_path):
    out = tmp_path / "full"
    train(argv=flags_for(flags, plain, data_path=tiny / "a.json", output_dir=out,
                         tune_mm_mlp_adapter=False, version=None))  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["conversation_template"] == "smollm2"
    assert not {"quantization_config", "gguf_file"} & config.keys()
    assert (out / "model.safetensors").is_file()
    assert not list(out.glob("*.gguf"))
    tokenizer, model, processor, _ = load_pretrained_model(str(out), None, "", device="cpu")
    assert processor is not None
    assert tokenizer("a red circle").input_ids == bpe().encode("a red circle").ids
    lora = tmp_path / "lora"
    train(argv=flags_for(flags, plain, data_path=tiny / "a.json", output_dir=lora,
                         tune_mm_mlp_adapter=False, lora_enable=True, lora_r=4,
                         version=None))  # fmt: skip
    load_pretrained_model(str(lora), None, "", device="cpu")  # it names its base


def test_the_command_writes_an_ordinary_folder(source, plain, tmp_path, capsys):
    main([str(plain), str(tmp_path / "new" / "llm")])
    folder = tmp_path / "new" / "llm"
    assert "wrote" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == ["llm"]
    found = LlamaForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 17, 80]])
    torch.testing.assert_close(logits_of(found, ids), logits_of(source, ids), atol=1e-5, rtol=1e-4)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert find_gguf(folder) is None
    with pytest.raises(InputError, match="is there already"):
        convert(plain, folder)
    with pytest.raises(InputError, match="holds no GGUF file"):
        convert(folder, tmp_path / "again")


def test_a_site_knows_it_by_its_bytes(source, plain, tmp_path):
    other = write(source, tmp_path / "model.gguf", quantised=True)
    cache = tmp_path / "known.json"
    first = model_fingerprint(str(plain), cache)
    assert len(first) == 16
    assert model_fingerprint(str(plain / "model.gguf"), cache) == first
    assert model_fingerprint(str(other), cache) != first


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.2, 0.6, 0.99])
def test_one_that_is_cut_short_is_refused(plain, tmp_path, share):
    data = (plain / "model.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"cut\.gguf: ") as error:
        convert(file, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def flipped(file: Path, out: Path, at: bytes, bit: int = 1, skip: int = 0) -> Path:
    """A copy in which one bit differs, of the byte `skip` after the first `at`."""
    data = bytearray(file.read_bytes())
    data[data.index(at) + skip] ^= bit
    out.write_bytes(data)
    return out


@pytest.mark.parametrize(
    ("at", "skip"),
    [
        (b"GGUF", 0),
        (b"GGUF", 4),  # the version
        (b"GGUF", 8),  # how many tensors
        (b"GGUF", 22),  # how many values
        (b"general.architecture", 2),
        (b"llama.block_count", 6),
        (b"tokenizer.ggml.tokens", 21),  # an array's kind
        (b"blk.1.ffn_up.weight", 6),  # a tensor of another name, which the model then lacks
        (b"blk.1.attn_norm.weight", 23),  # how many dimensions it has
        (b"output_norm.weight", 32),  # its kind: one that nobody knows
    ],
)
def test_a_damaged_header_is_refused(plain, tmp_path, at, skip):
    file = flipped(plain / "model.gguf", tmp_path / "bad.gguf", at, bit=64, skip=skip)
    with pytest.raises(InputError, match=r"bad\.gguf: ") as error:
        convert(file, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_programs_find_it_or_say_what_to_do(plain):
    file = plain / "model.gguf"
    assert named([f"chat={file}"]) == {"chat": str(file)}
    for read in (local_folder, Shards):
        with pytest.raises(InputError, match=r"python -m llava\.model\.gguf makes a folder"):
            read(plain if read is Shards else file)


def test_what_is_none_or_of_no_known_kind_is_refused(source, plain, tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("GGML")
    with pytest.raises(InputError, match=r"text\.gguf: is no GGUF, .* found b'GGML'"):
        convert(text, tmp_path / "out")
    odd = write(source, tmp_path / "odd.gguf", arch="oddarch")
    with pytest.raises(
        InputError, match=r"odd\.gguf: transformers cannot read this GGUF .*oddarch"
    ):
        gguf_config(odd)
    with pytest.raises(InputError, match=r"there\.gguf: cannot be read"):
        find_gguf(tmp_path / "there.gguf")
    with pytest.raises(InputError, match="--gguf_file nothing.gguf: there is no such file"):
        load_pretrained_model(str(plain), None, "", device="cpu", gguf_file="nothing.gguf")


def test_without_the_package_the_extra_is_named(plain):
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from llava.model.gguf import find_gguf; from llava.errors import InputError\n"
        f"try: find_gguf({str(plain)!r})\nexcept InputError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'fedllava[gguf]'" in said.stdout
