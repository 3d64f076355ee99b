"""The graft: names, pickling, what trains, and pictures in the right places."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError
from llava.model.builder import from_pretrained, load_tokenizer
from llava.model.checkpoint import load_projector, projector_state, read_config
from llava.model.llava_arch import llava_class

PATCHES = 4


@pytest.fixture(scope="module")
def model(tiny):
    torch.manual_seed(0)
    config = read_config(tiny / "llm")
    config.mm_hidden_size, config.mm_projector_type = 32, "mlp2x_gelu"
    config.mm_vision_tower, config.mm_vision_select_layer = str(tiny / "vision_tower"), -2
    model = from_pretrained(str(tiny / "llm"), config, dtype=torch.float32).eval()
    model.load_vision_tower(torch.float32, "cpu")
    return model


def test_the_class_is_made_once_named_as_upstreams_and_pickles():
    cls = llava_class(LlamaForCausalLM)
    assert cls is llava_class(LlamaForCausalLM)
    assert cls.__name__ == "LlavaLlamaForCausalLM"
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_state_dict_has_upstreams_names_and_no_tower(model):
    names = set(model.state_dict())
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias", "lm_head.weight"} <= names
    assert not any("vision_tower" in name for name in names)
    assert not any("vision_tower" in name for name, _ in model.named_parameters())
    assert model.config.model_type == "llama"


def test_without_mm_keys_it_is_the_plain_language_model(tiny):
    model = from_pretrained(str(tiny / "llm"), read_config(tiny / "llm"), dtype=torch.float32)
    assert type(model) is LlamaForCausalLM


def test_a_fresh_projector_starts_as_torchs_own_layers_do(model):
    weight = model.get_model().mm_projector[0].weight
    bound = 1 / weight.shape[1] ** 0.5  # nn.Linear draws uniformly within this
    assert 0.9 * bound < weight.abs().max() <= bound
    assert model.get_model().mm_projector[0].bias.abs().sum() > 0


def batch(model, rows):
    """Rows of ids, right-padded, with mask and labels equal to the ids where these are text."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill((mask == 0) | (ids < 0), IGNORE_INDEX)
    return ids, mask, labels


def test_one_marker_a_picture_and_expanded_markers_give_the_same(model):
    pixels = torch.randn(2, 3, 16, 16)
    image = [IMAGE_TOKEN_INDEX]
    single = batch(model, [[1, *image, 30, 31, 32], [1, 40, *image, 41]])
    full = batch(model, [[1, *image * PATCHES, 30, 31, 32], [1, 40, *image * PATCHES, 41]])
    a = model(single[0], attention_mask=single[1], labels=single[2], images=pixels)
    b = model(full[0], attention_mask=full[1], labels=full[2], images=pixels)
    assert a.logits.shape == b.logits.shape == (2, 8, 1200)
    for found, expected in ((b.logits, a.logits), (b.loss, a.loss)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(model):
    pixels = torch.randn(1, 3, 16, 16)
    image = [IMAGE_TOKEN_INDEX] * PATCHES
    alone = model(torch.tensor([[1, *image, 30, 31]]), images=pixels).logits[0]
    ids, mask, _ = batch(model, [[1, *image, 30, 31], [1, 50, 51, 52, 53, 54, 55, 56, 57]])
    together = model(ids, attention_mask=mask, images=pixels).logits[0, : len(alone)]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_features_in_place_of_pixels_give_the_same(model):
    pixels = torch.randn(2, 3, 16, 16)
    features = model.get_vision_tower()(pixels)
    assert features.shape == (2, PATCHES, 32)
    expected = model.encode_images(pixels)
    for given in (features, [features[0], features[1]], [pixels[0], features[1]]):
        found = model.encode_images(given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_too_many_or_too_few_pictures_are_an_error(model):
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 30]])
    with pytest.raises(InputError, match="2 pictures of 4 tokens .* 1 image tokens"):
        model(ids, images=torch.randn(2, 3, 16, 16))


def test_only_the_projector_gets_gradients_and_text_alone_touches_it(model):
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    ids = torch.tensor([[1, 30, 31]])
    model(ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(projector_state(model))
    assert all(not g.any() for g in grads.values())
    model.zero_grad(set_to_none=True)


def test_generation_in_a_left_padded_batch_equals_one_by_one(model, tiny):
    tokenizer = load_tokenizer(str(tiny / "llm"))
    pixels = torch.randn(2, 3, 16, 16)
    rows = [[1, IMAGE_TOKEN_INDEX, 30, 31, 32, 33], [1, IMAGE_TOKEN_INDEX, 40]]
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.unk_token_id)
    alone = [
        model.generate(torch.tensor([row]), images=pixels[i : i + 1], **options)[0].tolist()
        for i, row in enumerate(rows)
    ]
    ids, mask, _ = batch(model, rows)
    together = model.generate(ids, attention_mask=mask, images=pixels, **options)
    assert together.tolist() == alone
    assert len(alone[0]) == 5  # new tokens only


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.mm_projector.0.bias"), "0.bias is missing"),
        (
            lambda s: s.update({"model.mm_projector.0.weight": torch.zeros(3, 3)}),
            r"0.weight has shape \(3, 3\), .*\(48, 32\)",
        ),
        (
            lambda s: s.update({"model.mm_projector.0.bias": torch.full((48,), torch.nan)}),
            "0.bias .*NaN",
        ),
        (lambda s: s.update({"model.mm_projector.4.bias": torch.zeros(48)}), "4.bias"),
        (
            lambda s: s.update({"model.mm_projector.0.bias": torch.zeros(48, dtype=torch.int64)}),
            "0.bias is torch.int64",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(model, change, message):
    before = projector_state(model)
    state = {name: tensor + 1 for name, tensor in before.items()}
    change(state)
    with pytest.raises(InputError, match=message):
        load_projector(model, state, "some.bin")
    after = projector_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_frozen_tower_goes_along_to_another_device_and_keeps_its_type(model):
    moved = copy.deepcopy(model)
    moved.half()
    assert moved.get_vision_tower().dtype == torch.float32
    assert moved.dtype == torch.float16
    moved.to("meta")
    assert moved.get_vision_tower().device.type == moved.device.type == "meta"


def test_attention_weights_are_there_when_they_are_asked_for(model):
    asked = copy.deepcopy(model)
    asked.set_attn_implementation("sdpa")
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 30, 31]])
    pixels = torch.randn(1, 3, 16, 16)
    found = asked(ids, images=pixels, output_attentions=True)
    assert [a.shape for a in found.attentions] == [(1, 2, 3 + PATCHES, 3 + PATCHES)] * 2
    torch.testing.assert_close(found.logits, model(ids, images=pixels).logits)
    more = {"max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True}
    for inputs in ({"images": pixels}, {}):
        made = asked.generate(ids.clamp_min(3) if not inputs else ids, output_attentions=True,
                              pad_token_id=0, **inputs, **more)  # fmt: skip
        assert len(made.attentions) == 2
        assert made.attentions[0][0].ndim == 4


def test_attention_is_as_before_once_its_weights_were_shown(model):
    """Each part's own kind, whether the run comes to its end or not."""
    asked = copy.deepcopy(model)
    asked.set_attn_implementation("sdpa")
    asked.tune_vision_tower()
    tower = asked.get_vision_tower().vision_tower
    tower.set_attn_implementation("eager")
    ids, kinds = torch.tensor([[1, 30, 31]]), []

    def note(*_):
        kinds.append(asked.config._attn_implementation)

    handle = asked.lm_head.register_forward_hook(note)
    asked(ids, output_attentions=True)
    asked.generate(ids, output_attentions=True, max_new_tokens=1, pad_token_id=0)
    with pytest.raises(IndexError):
        asked(torch.tensor([[10**6]]), output_attentions=True)
    asked(ids)
    handle.remove()
    assert kinds == ["eager", "eager", "sdpa"]
    assert tower.config._attn_implementation == "eager"


def test_the_names_of_a_star_import():
    scope: dict = {}
    exec("from llava.model import *", scope)
    assert scope["LlavaLlamaForCausalLM"] is llava_class(LlamaForCausalLM)
