"""Samples' gradients and their clipped sum, against a backward pass of each sample by itself."""

from __future__ import annotations

import json
import types

import pytest
import torch
from torch import nn

from llava.errors import InputError
from llava.train.arguments import parse
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.private_gradients import PerSampleGradients
from llava.train.private_model import check_model
from llava.train.private_rows import Rows
from llava.train.private_trainer import sample_losses
from llava.train.session import load_session

LORA = {"tune_mm_mlp_adapter": False, "lora_enable": True, "lora_r": 3, "lora_dropout": 0.0,
        "version": "v1"}  # fmt: skip
KINDS = {
    "projector": {},
    "linear": {"mm_projector_type": "linear"},
    "lora": LORA,
    "biases": {**LORA, "lora_bias": "all"},
    "tiles": {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(32, 16), (16, 32)]"},
}
CAPTIONS = [
    "red",
    "a green picture that is quite long",
    "blue and blue and blue again",
    "a picture",
]


def records(tiny, texts: bool) -> list[dict]:
    known = json.loads((tiny / "a.json").read_text())
    found = []
    for i, caption in enumerate(CAPTIONS):
        turns = [{"from": "human", "value": "<image>\nWhat is this?"},
                 {"from": "gpt", "value": caption}]  # fmt: skip
        found.append({"id": str(i), "image": known[i]["image"], "conversations": turns})
    if texts:
        for place in (1, 3):
            found[place].pop("image")
            found[place]["conversations"][0]["value"] = "What is red?"
    return found


@pytest.fixture
def make(flags, tiny):
    """`make(kind)`: a model whose parts that train are not near zero, and `batch(places)`."""

    def build(**changes):
        args = parse(flags(**changes))
        session = load_session(*args)
        draw = torch.Generator().manual_seed(3)
        for parameter in session.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        texts = bool(changes.get("lora_enable"))
        data = LazySupervisedDataset(
            records(tiny, texts), session.tokenizer, args[1], sample_format=session.sample_format
        )
        collate = DataCollatorForSupervisedDataset(session.tokenizer)
        return session.model.train(), lambda places: collate([data[i] for i in places])

    return build


def alone(model, batch) -> dict[str, torch.Tensor]:
    """The gradient of a sample's own loss, as the model itself has it."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def length(gradient) -> float:
    return float(torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt())


def backward(model, gradients, batch) -> Rows:
    rows = Rows.of_batch(batch)
    with gradients.recording(rows):
        logits = model(**batch).logits
        losses = sample_losses(logits, batch["labels"], batch["label_positions"])
        losses.sum().backward()
    return rows


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_each_sample_by_itself(make, kind, checkpointing):
    model, batch = make(**KINDS[kind])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    each = [alone(model, batch([i])) for i in range(4)]
    clip = sorted(map(length, each))[1] * 1.01  # two are clipped, two are not
    gradients = PerSampleGradients(model, clip)
    rows = backward(model, gradients, batch(range(4)))
    gradients.check_sum(rows, in_16_bits=False)
    lengths = gradients.add(rows)
    assert lengths.tolist() == pytest.approx([length(of) for of in each], rel=1e-4)
    assert sum(of > clip for of in lengths.tolist()) == 2
    for name, total in gradients.sums.items():
        parts = [of[name] * min(1, clip / length(of)) for of in each if name in of]
        expected = torch.stack(parts).sum(0)
        assert expected.norm() > 0, name
        torch.testing.assert_close(total.double(), expected, rtol=1e-3, atol=1e-4 * clip)


@pytest.mark.parametrize("kind", ["projector", "lora"])
def test_in_accumulated_batches_the_sum_is_the_same(make, kind):
    model, batch = make(**KINDS[kind])
    sums = []
    for parts in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 0], [3, 1]]):
        gradients = PerSampleGradients(model, 0.5)
        for places in parts:
            gradients.add(backward(model, gradients, batch(places)))
        sums.append(gradients.sums)
    for other in sums[1:]:
        for name, total in sums[0].items():
            torch.testing.assert_close(other[name], total, rtol=1e-4, atol=1e-6)


def test_the_longest_gradient_moves_the_sum_by_no_more_than_the_clip(make):
    model, batch = make()
    both, clip = batch([0, 1]), 1e-3
    gradients = PerSampleGradients(model, clip)
    gradients.add(backward(model, gradients, batch([0])))
    before = gradients.sums
    huge = {**both, "images": both["images"].clone()}
    huge["images"][1] *= 1e4
    gradients = PerSampleGradients(model, clip)
    lengths = gradients.add(backward(model, gradients, huge))
    assert lengths[1] > 100 * clip
    moved = length({n: (gradients.sums[n] - before[n]).double() for n in before})
    assert moved == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_counts_as_zero_and_leaves_the_others(make, value):
    model, batch = make()
    both = batch([0, 1])
    gradients = PerSampleGradients(model, 0.5)
    gradients.add(backward(model, gradients, batch([0])))
    alone_in_it = gradients.sums
    broken = {**both, "images": both["images"].clone()}
    broken["images"][1] = value
    gradients = PerSampleGradients(model, 0.5)
    gradients.add(backward(model, gradients, broken))
    for name, total in alone_in_it.items():
        torch.testing.assert_close(gradients.sums[name], total, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_they_are_near(make):
    model, batch = make(bf16=True)
    exact, _ = make()
    gradients = PerSampleGradients(model, 1e9)
    with torch.autocast("cpu", torch.bfloat16):
        losses_of = backward(model, gradients, batch(range(4)))
    gradients.check_sum(losses_of, in_16_bits=True)
    found = gradients.add(losses_of)
    reference = PerSampleGradients(exact, 1e9)
    expected = reference.add(backward(exact, reference, batch(range(4))))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=0.1)


def test_the_loss_of_one_sample_moves_its_own_rows_alone(make):
    model, batch = make(**LORA)
    gradients = PerSampleGradients(model, 1.0)
    four = batch(range(4))
    rows = Rows.of_batch(four)
    with gradients.recording(rows):
        logits = model(**four).logits
        sample_losses(logits, four["labels"], four["label_positions"])[2].backward()
    gradients.check_grouping(rows, 2)
    with pytest.raises(InputError, match="loss of a sample depends on other samples"):
        gradients.check_grouping(rows, 0)


def test_a_connector_that_mixes_pictures_is_found(make):
    model, batch = make()
    connector = model.get_model().mm_projector
    plain = connector.forward

    def mixed(self, input, **context):
        return plain(input - input.mean(0, keepdim=True)) + plain(input).mean(0, keepdim=True)

    connector.forward = types.MethodType(mixed, connector)
    gradients = PerSampleGradients(model, 1.0)
    four = batch(range(4))
    with gradients.recording(Rows.of_batch(four)):
        logits = model(**four).logits
        sample_losses(logits, four["labels"], four["label_positions"])[0].backward()
    with pytest.raises(InputError, match=r"mm_projector.*depends on other samples of its batch"):
        gradients.check_grouping(Rows.of_batch(four), 0)


def test_a_tensor_used_beside_its_layer_is_found(make):
    model, batch = make(mm_projector_type="linear")
    connector = model.get_model().mm_projector
    plain = connector.forward

    def twice(self, input, **context):
        return plain(input) + self.weight.sum()

    connector.forward = types.MethodType(twice, connector)
    gradients = PerSampleGradients(model, 1.0)
    rows = backward(model, gradients, batch(range(4)))
    with pytest.raises(InputError, match=r"mm_projector.weight: its gradient is not the sum"):
        gradients.check_sum(rows, in_16_bits=False)


def test_what_enters_a_connector_must_have_a_row_for_each_picture():
    rows = Rows(2, torch.tensor([0, 1]), torch.tensor([0, 0, 1]))
    assert rows.entering(torch.Size([2, 3, 5]), True, "x").tolist() == [0, 0, 0, 1, 1, 1]
    assert rows.entering(torch.Size([1, 3, 5]), False, "x").tolist() == [0, 0, 1]
    assert rows.entering(torch.Size([2, 2, 5]), False, "x").tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match="x: 6 rows enter it for 2 pictures"):
        rows.entering(torch.Size([6, 5]), True, "x")
    with pytest.raises(InputError, match="x: what enters it, .*has no row for each of 2 samples"):
        rows.entering(torch.Size([7, 5]), False, "x")


def test_layer_norms_in_a_connector_have_samples_gradients(make):
    model, batch = make()
    model.get_model().mm_projector.append(nn.LayerNorm(48))
    each = [alone(model, batch([i])) for i in range(4)]
    gradients = PerSampleGradients(model, 1e9)
    lengths = gradients.add(backward(model, gradients, batch(range(4))))
    assert lengths.tolist() == pytest.approx([length(of) for of in each], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_use_im_start_end": True}, r"embed_tokens.picture_rows trains in a Embedding"),
        ({"tune_mm_mlp_adapter": False}, r"embed_tokens.weight trains in a Embedding"),
        ({"mm_projector_type": "pilot"}, "PilotConnector adds a loss over the pictures"),
        ({"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"},
         "model.image_newline trains in a"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused_by_name(make, changes, message):
    model, _ = make(**changes)
    with pytest.raises(InputError, match=message):
        check_model(model)


def test_dropout_and_tied_tensors_are_refused(make):
    model, _ = make()
    attention = model.get_model().layers[1].self_attn
    attention.attention_dropout = 0.1
    with pytest.raises(InputError, match=r"layers.1.self_attn drops 0.1 of its values"):
        check_model(model)
    attention.attention_dropout = 0.0
    connector = model.get_model().mm_projector
    connector[2].bias = connector[0].bias
    with pytest.raises(InputError, match=r"2.bias is model.mm_projector.0.bias, too"):
        check_model(model)
