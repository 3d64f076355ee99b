"""Measures of a frozen LLaVA against literal computations of the same."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from fed import methods
from fed.clients.measures import EvaluationSet, evaluate
from fed.merging.calibration import load_calibration, spread
from fed.state import StateError
from llava.errors import InputError
from llava.model.checkpoint import load_projector, projector_state
from llava.train.arguments import parse
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.train import load_session, train


@pytest.fixture(scope="module")
def aligned(tiny, tmp_path_factory):
    """A projector-only LLaVA, and a session on it that knows nothing of calibration."""
    out = tmp_path_factory.mktemp("aligned")
    argv = ["--model_name_or_path", str(tiny / "llm"), "--vision_tower", str(tiny / "vision_tower"),
            "--version", "plain", "--mm_projector_type", "mlp2x_gelu", "--mm_use_im_patch_token",
            "False", "--mm_vision_select_layer", "-2", "--image_folder", str(tiny / "images"),
            "--output_dir", str(out), "--save_strategy", "no", "--report_to", "none",
            "--tune_mm_mlp_adapter", "True", "--data_path", str(tiny / "a.json"),
            "--learning_rate", "1e-2", "--model_max_length", "256"]  # fmt: skip
    train(argv=argv)
    projector = ["--pretrain_mm_mlp_adapter", str(out / "mm_projector.bin")]
    model_args, data_args, training_args = parse(argv + projector)
    session = load_session(model_args, data_args, training_args)
    session.model.eval()
    dataset = LazySupervisedDataset(
        str(tiny / "heldout.json"),
        session.tokenizer,
        data_args,
        sample_format=session.sample_format,
    )
    return out, session, dataset, DataCollatorForSupervisedDataset(session.tokenizer)


def load(tiny, folder, files=("heldout.json",), **arguments):
    data = [str(tiny / file) for file in files]
    return load_calibration(str(folder), str(tiny / "llm"), data, str(tiny / "images"), **arguments)


@pytest.fixture(scope="module")
def calibration(tiny, aligned):
    return load(tiny, aligned[0], batch_size=4)[0]


def moved(state, seed):
    torch.manual_seed(seed)
    return {name: t + 0.1 * torch.randn_like(t) for name, t in state.items()}


def test_loss_is_that_of_evaluate_whatever_was_measured_before(aligned, calibration):
    _, session, dataset, collate = aligned
    own = projector_state(session.model)
    states = [own, moved(own, 1), moved(own, 2), own]
    measured = [calibration.loss(state) for state in states]
    assert measured[0] == measured[3] != measured[1]
    for state, loss in zip(states, measured, strict=True):
        load_projector(session.model, state, "test")
        expected = evaluate(session.model, EvaluationSet("x", dataset), collate, 3)["loss"]
        assert loss == pytest.approx(expected, rel=1e-5)
    load_projector(session.model, own, "test")


def test_explained_is_that_of_evaluate(aligned, calibration):
    _, session, dataset, collate = aligned
    own = projector_state(session.model)
    for state in (own, moved(own, 5)):
        found = calibration.explained(state)
        load_projector(session.model, state, "test")
        data = EvaluationSet("x", dataset)
        expected = evaluate(session.model, data, collate, 3, explained=True)
        assert found.share == pytest.approx(expected["explained"], rel=1e-4, abs=1e-5)
        assert found.samples == len(dataset)
    load_projector(session.model, own, "test")


def test_no_picture_passes_the_tower_again(aligned, calibration, monkeypatch):
    def refuse(pixels):
        raise AssertionError("the tower was asked")

    tower = calibration.model.get_vision_tower()
    monkeypatch.setattr(tower, "forward", refuse)
    state = projector_state(aligned[1].model)
    assert calibration.loss(state) > 0
    calibration.gram(state), calibration.fisher(state), calibration.explained(state)


def test_gram_is_that_of_the_inputs(aligned, calibration):
    _, session, dataset, _ = aligned
    state = moved(projector_state(session.model), 3)
    tower = session.model.get_vision_tower()
    with torch.no_grad():
        x = torch.cat([tower(dataset[i]["images"][0][None])[0] for i in range(len(dataset))])
        hidden = functional.gelu(
            x @ state["model.mm_projector.0.weight"].T + state["model.mm_projector.0.bias"]
        )
    found = calibration.gram(state)
    assert list(found) == ["model.mm_projector.0", "model.mm_projector.2"]
    for gram, inputs in zip(found.values(), (x, hidden), strict=True):
        rows = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
        assert gram.dtype == torch.float64
        assert torch.allclose(gram, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        assert gram[-1, -1].item() == pytest.approx(1)


def test_fisher_is_autograd_sample_by_sample(aligned, calibration):
    _, session, dataset, collate = aligned
    state = moved(projector_state(session.model), 4)
    load_projector(session.model, state, "test")
    projector = session.model.get_model().mm_projector
    expected = {name: 0.0 for name in state}
    for i in range(len(dataset)):
        batch = collate([dataset[i]])
        session.model.zero_grad()
        output = session.model(**batch)
        (output.loss * len(batch["label_positions"])).backward()
        for name, p in projector.named_parameters():
            expected[f"model.mm_projector.{name}"] += p.grad.square() / len(dataset)
    found = calibration.fisher(state)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == state[name].shape
        assert torch.allclose(found[name], value, rtol=1e-3, atol=float(1e-5 * value.max())), name
    assert max(float(v.max()) for v in expected.values()) > 0


def test_one_model_for_all_files_and_samples_spread(tiny, aligned):
    a, b = load(tiny, aligned[0], ["a.json", "b.json"], samples=5)
    assert a.model is b.model
    assert a.samples == b.samples == 5
    state = projector_state(aligned[1].model)
    assert a.loss(state) != b.loss(state)
    other = load(tiny, aligned[0], ["a.json"], samples=5)[0]
    assert other.loss(state) == pytest.approx(a.loss(state), rel=1e-6)


def test_spread():
    assert spread(4, 9, seed=0) == [0, 1, 2, 3]
    for seed in range(5):
        chosen = spread(1000, 30, seed)
        assert len(set(chosen)) == 30
        assert chosen == sorted(chosen)
        assert max(b - a for a, b in zip(chosen[:-1], chosen[1:], strict=True)) < 68
    assert spread(1000, 30, 0) != spread(1000, 30, 1)


def test_methods_that_need_data_run_on_it(aligned, calibration):
    base = projector_state(aligned[1].model)
    states = [moved(base, seed) for seed in (5, 6)]
    given = dict(weights=[1, 1], base=base, calibration=[calibration] * 2)
    for name in ("regmean", "fisher"):
        merged = methods.get(name)(states, **given).state
        mean = {n: (states[0][n] + states[1][n]) / 2 for n in base}
        assert any(not torch.allclose(merged[n], mean[n], atol=1e-4) for n in base)
        same = methods.get(name)([states[0]] * 2, **given).state
        assert all(torch.allclose(same[n], states[0][n], atol=1e-6) for n in base)


def test_text_alone_counts_in_the_loss_and_nowhere_else(tiny, aligned, tmp_path):
    records = json.loads((tiny / "heldout.json").read_text())
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a red"}]}
    state = projector_state(aligned[1].model)
    plain = load(tiny, aligned[0])[0]
    mixed_file, text_file = tmp_path / "mixed.json", tmp_path / "text.json"
    mixed_file.write_text(json.dumps([*records, text]))
    text_file.write_text(json.dumps([text]))
    mixed, alone = load(tiny, aligned[0], [str(mixed_file), str(text_file)], version="v1")
    for name, gram in mixed.gram(state).items():
        assert torch.allclose(gram, plain.gram(state)[name], rtol=1e-5, atol=1e-6)
    assert alone.loss(state) > 0
    assert all(not t.any() for t in alone.fisher(state).values())
    with pytest.raises(InputError, match="text.json: no record has a picture"):
        alone.gram(state)
    with pytest.raises(InputError, match="text.json: no record could be shown"):
        alone.explained(state)


def test_where_pictures_cannot_be_exchanged_nothing_is_measured(tiny, aligned, tmp_path):
    one = tmp_path / "one.json"
    one.write_text(json.dumps(json.loads((tiny / "heldout.json").read_text())[:1]))
    sound, single = load(tiny, aligned[0], ["heldout.json", str(one)])
    state = projector_state(aligned[1].model)
    with pytest.raises(InputError, match="one.json: no record could be shown with another one's"):
        methods.get("pivotmerge")(
            [state, moved(state, 1)], weights=[1, 1], base=state, calibration=[sound, single]
        )


def test_bad_input(tiny, aligned, calibration, tmp_path):
    def refused(*said, files=("heldout.json",), model=aligned[0], base=tiny / "llm", **arguments):
        data = [str(tiny / f) for f in files]
        arguments = {"image_folder": str(tiny / "images"), **arguments}
        with pytest.raises(InputError) as caught:
            load_calibration(str(model), str(base), data, **arguments)
        assert all(word in str(caught.value) for word in said), str(caught.value)

    empty, silent = tmp_path / "empty.json", tmp_path / "silent.json"
    empty.write_text("[]")
    record = json.loads((tiny / "heldout.json").read_text())[0]
    record["conversations"][1]["value"] = ""
    refused("nothing.json", "cannot be read", files=["nothing.json"])
    refused("empty.json", "no records", files=[str(empty)])
    refused("no data file", files=[])
    refused("heldout-0.png", image_folder=str(tmp_path))
    refused("0 samples", samples=0)
    refused("without pictures", model=tiny / "llm")
    silent.write_text(json.dumps([{"conversations": []}]))
    refused("silent.json", files=[str(silent)], version="v1")
    silent.write_text(json.dumps([record]))
    refused("silent.json", "nothing to learn", files=[str(silent)])

    state = projector_state(aligned[1].model)
    name = "model.mm_projector.2.weight"
    for bad, said in (
        ({**state, name: state[name][:, :-1]}, "has shape"),
        ({n: t for n, t in state.items() if n != name}, "is missing"),
        ({**state, name: state[name] * torch.nan}, "NaN"),
    ):
        for measure in (calibration.loss, calibration.gram, calibration.fisher):
            with pytest.raises(StateError, match=said) as caught:
                measure(bad)
            assert "heldout.json" in str(caught.value)
            assert name in str(caught.value)
