"""Every language model goes through the one graft: forward, generate, train, save, load.

Small random models; what is checked does not depend on what they have learnt.
"""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import from_pretrained, load_pretrained_model, load_tokenizer
from llava.model.checkpoint import projector_state, read_config, save_full
from llava.model.language_model import NAMES
from llava.model.llava_arch import llava_class

PATCHES = 4
SMALL = dict(
    vocab_size=1216,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "gemma": {"head_dim": 24},
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tiny, tmp_path_factory):
    """A plain language model of one kind, with the toy tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(tiny / "llm", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model(request.param, **SMALL, **MODELS[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder, tiny):
    config = read_config(folder)
    config.mm_hidden_size, config.mm_projector_type = 32, "mlp2x_gelu"
    config.mm_vision_tower, config.mm_vision_select_layer = str(tiny / "vision_tower"), -2
    config.mm_use_im_patch_token = False
    torch.manual_seed(0)
    model = from_pretrained(str(folder), config, dtype=torch.float32).eval()
    model.load_vision_tower(torch.float32, "cpu")
    return model


def test_its_class_is_importable_by_upstreams_pattern(model):
    assert type(model).__name__ == f"Llava{type(model).__bases__[1].__name__}"
    assert type(model).__name__ in NAMES
    module = __import__("llava.model", fromlist=[type(model).__name__])
    assert getattr(module, type(model).__name__) is type(model)


def test_text_alone_gives_the_base_models_logits(model, folder):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 30, 31, 32]])
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, **close)
    # What the pictures come in by: embeddings that the model is handed mean the same as ids.
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, base(ids).logits, **close)


def test_a_picture_is_seen_and_only_by_what_follows(model):
    ids = torch.tensor([[1, 30, IMAGE_TOKEN_INDEX, 31, 32]])
    one, two = (model(ids, images=torch.full((1, 3, 16, 16), value)).logits for value in (0.0, 2.0))
    torch.testing.assert_close(one[:, :2], two[:, :2], rtol=1e-6, atol=1e-6)
    assert (one[:, 2:] - two[:, 2:]).abs().max() > 1e-4


def test_generation_batched_and_left_padded_equals_one_by_one(model):
    torch.manual_seed(5)
    pixels = torch.randn(3, 3, 16, 16)
    image = IMAGE_TOKEN_INDEX
    rows = [[1, image, 30, 31, 32, 33, 34], [1, image, 40], [1, 50, image, 51]]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = [
        model.generate(torch.tensor([row]), images=pixels[i : i + 1], **options)[0].tolist()
        for i, row in enumerate(rows)
    ]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    together = model.generate(ids, attention_mask=mask, images=pixels, **options)
    assert together.tolist() == alone


def test_a_step_on_labelled_positions_equals_a_step_on_all_logits(model):
    """And only the projector gets a gradient."""
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    image = [IMAGE_TOKEN_INDEX] * PATCHES
    ids = torch.tensor([[1, *image, 30, 31, 2], [1, *image, 40, 2, 0]])
    labels = ids.masked_fill((ids < 3) & (ids != 2), -100)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    places = (following != -100).flatten().nonzero().flatten()
    pictures = (ids == IMAGE_TOKEN_INDEX).flatten().nonzero().flatten()
    pixels = torch.randn(2, 3, 16, 16)
    found = {}
    for kind, more in (
        ("all", {"attention_mask": mask}),
        ("labelled", {"label_positions": places, "image_positions": pictures}),
    ):
        model.zero_grad()
        outputs = model(ids, labels=labels, images=pixels, **more)
        outputs.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[kind] = outputs.loss.detach(), grads
    assert outputs.logits.shape == (1, len(places), 1216)
    torch.testing.assert_close(found["all"][0], found["labelled"][0], rtol=1e-6, atol=1e-6)
    assert set(found["all"][1]) == set(projector_state(model))
    for name, grad in found["all"][1].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, found["labelled"][1][name], rtol=1e-4, atol=1e-6)


def test_saved_and_loaded_it_gives_the_same(model, folder, tmp_path):
    save_full(model, load_tokenizer(str(folder)), tmp_path / "full")
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 30, 31]])
    pixels = torch.randn(1, 3, 16, 16)
    _, loaded, processor, _ = load_pretrained_model(
        str(tmp_path / "full"), None, "any", device="cpu"
    )
    assert type(loaded) is type(model)
    assert processor is not None
    assert torch.equal(loaded(ids, images=pixels).logits, model(ids, images=pixels).logits)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48}),  # calls its decoder by itself
        ("gemma2", {"head_dim": 24}),  # caps its logits
        ("mixtral", {"num_local_experts": 4}),
        ("gpt_neox", {}),  # layers of other names
    ],
)
def test_labelled_positions_alone_mean_the_same_to_any_language_model(kind, more):
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **more})
    torch.manual_seed(0)
    model = llava_class(AutoModelForCausalLM._model_mapping[type(config)])(config).eval()
    ids = torch.randint(3, 1000, (2, 9))
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1, 7:] = -100
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    places = (following != -100).flatten().nonzero().flatten()
    found = model(ids, labels=labels, label_positions=places)
    expected = model(ids, labels=labels)
    assert found.logits.shape == (1, len(places), 1216)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    logits = expected.logits.flatten(0, 1)[places]
    torch.testing.assert_close(found.logits[0], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 32,
                       "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}),
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
)  # fmt: skip
def test_a_mixture_whose_routers_are_trained(kind, more):
    """Labelled logits alone, the routers' loss in the loss, and answers without it."""
    more = {"output_router_logits": True, "router_aux_loss_coef": 0.5, **more}
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **more})
    torch.manual_seed(0)
    base = AutoModelForCausalLM._model_mapping[type(config)]
    model = llava_class(base)(config).eval()
    ids, mask = torch.randint(3, 1000, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 7:] = False
    labels = ids.masked_fill(~mask, -100)
    labels[:, :5] = -100
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    places = (following != -100).flatten().nonzero().flatten()
    found = model(ids, attention_mask=mask, labels=labels, label_positions=places)
    expected = base.forward(model, ids, attention_mask=mask, labels=labels)
    assert found.logits.shape == (1, len(places), 1216)
    torch.testing.assert_close(found.logits[0], expected.logits.flatten(0, 1)[places])
    torch.testing.assert_close(found.loss, expected.loss)
    targets = labels.flatten()[places + 1]
    plain = torch.nn.functional.cross_entropy(found.logits[0], targets)
    torch.testing.assert_close(found.loss, plain + 0.5 * found.aux_loss)
    found.loss.backward()
    routers = [p.grad for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert all(grad.abs().max() > 0 for grad in routers)
    # Without a loss there is no use for it; a batch whose mask has padding fails on it in the base.
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    left = torch.tensor([[0, 0, 1], [1, 1, 1]])
    made = model.generate(torch.tensor([[0, 0, 30], [30, 31, 32]]), attention_mask=left, **options)
    model.config.output_router_logits = False
    assert made[0].tolist() == model.generate(torch.tensor([[30]]), **options)[0].tolist()
