"""Attention in float32 within a model in bfloat16: where it is taken, and what it changes."""

from __future__ import annotations

import copy

import pytest
import torch

from llava.model.attention_float32 import NAME, train_in_float32
from llava.model.attention_impl import attention_of, eager_attention
from llava.model.builder import from_pretrained
from llava.model.checkpoint import read_config
from llava.train.arguments import parse
from llava.train.session import load_session


def load(tiny, dtype=torch.bfloat16, **options):
    return from_pretrained(str(tiny / "llm"), read_config(tiny / "llm"), dtype=dtype, **options)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0  # padded on the left: a mask is needed
    return {"input_ids": torch.randint(3, 60, (3, 9)), "attention_mask": mask}


@pytest.fixture
def computed_in(monkeypatch):
    """The types that torch's attention is called with."""
    types, inner = [], torch.nn.functional.scaled_dot_product_attention

    def noting(query, *args, **kwargs):
        types.append(query.dtype)
        return inner(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    return types


def gradients(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters()}


def test_training_takes_it_in_float32_and_evaluation_does_not(tiny, batch, computed_in):
    plain = load(tiny)
    model = copy.deepcopy(plain)
    assert train_in_float32(model)
    found = gradients(model.train(), batch)
    assert set(computed_in) == {torch.float32}
    computed_in.clear()
    expected = gradients(plain.train(), batch)
    assert set(computed_in) == {torch.bfloat16}
    for name, gradient in expected.items():
        bound = 0.03 * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0.1, atol=bound)
    computed_in.clear()
    with torch.no_grad():
        logits = [one.eval()(**batch).logits for one in (model, plain)]
    assert set(computed_in) == {torch.bfloat16}
    assert torch.equal(*logits)


def test_it_is_as_near_to_a_model_in_float32_as_bfloat16_allows(tiny, batch):
    exact = load(tiny, torch.float32)
    model = copy.deepcopy(exact).bfloat16()
    train_in_float32(model)
    with torch.no_grad():
        near, far = model.train()(**batch).logits.float(), exact.train()(**batch).logits
    assert (near - far).abs().max() < 0.05 * far.abs().max()


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "sdpa"), (torch.bfloat16, "eager"), (torch.float16, "sdpa")]
)
def test_other_types_and_kinds_are_left_as_they_are(tiny, dtype, kind):
    model = load(tiny, dtype, attn_implementation=kind)
    assert not train_in_float32(model)
    assert attention_of(model) == kind


def test_eager_attention_gives_it_back(tiny):
    model = load(tiny)
    train_in_float32(model)
    with eager_attention(model):
        assert attention_of(model) == "eager"
    assert attention_of(model) == NAME


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"bf16": True}, NAME),
        ({"bf16": True, "attn_implementation": "sdpa"}, "sdpa"),
        ({"bf16": False}, "sdpa"),
    ],
)
def test_a_session_takes_it_unless_a_kind_is_named(flags, changes, kind):
    session = load_session(*parse(flags(**changes)))
    assert attention_of(session.model) == kind
