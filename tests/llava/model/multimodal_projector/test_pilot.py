"""Pilot's connector: the formulas, what trains in each stage, and its way through files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import gelu

from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.multimodal_projector.connector import TRAINED
from llava.model.multimodal_projector.pilot import PilotConnector, PilotSettings
from llava.model.multimodal_projector.pilot_losses import (
    balance_loss,
    difference_loss,
    router_z_loss,
)
from llava.state import load, save
from llava.train.train import train

TASKS = ["vqa", "caption", "text"]
CLIENT_PARTS = ("pilot.client.", "pilot.cross.", "pilot.router.")


def make(seed: int = 0, **settings) -> PilotConnector:
    """One with the published router, unless `settings` say otherwise."""
    torch.manual_seed(seed)
    settings = {"tasks": TASKS, "router_own": 0.0, **settings}
    connector = PilotConnector(6, 8, PilotSettings(**settings))
    connector.derive()
    return connector


def scattered(**settings) -> PilotConnector:
    """One whose adapters all differ."""
    connector = make(**settings)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return connector


def mlp(connector, prefix, x):
    w = connector.state_dict()
    hidden = gelu(x @ w[f"{prefix}0.weight"].T + w[f"{prefix}0.bias"])
    return hidden @ w[f"{prefix}2.weight"].T + w[f"{prefix}2.bias"]


def literal_difference(a, b):
    """||X1^T X2||_F^2 with the D × D matrix."""
    a, b = (x.flatten(1) / (x.flatten(1).norm(dim=1, keepdim=True) + 1e-6) for x in (a, b))
    return (a.T @ b).square()


def test_stage_1_is_the_sum_of_task_and_client_adapter():
    connector, x = scattered(stage=1), torch.randn(2, 5, 6)
    expected = mlp(connector, "", x) + mlp(connector, "pilot.client.", x)
    torch.testing.assert_close(connector(x), expected)
    literal = literal_difference(mlp(connector, "", x), mlp(connector, "pilot.client.", x))
    torch.testing.assert_close(connector.aux_loss(), 0.1 * literal.sum() / 4)
    assert connector.aux_loss() is None  # it is of one forward


def test_stage_2_mixes_adapters_on_adapters_per_token():
    connector, x = scattered(stage=2), torch.randn(2, 5, 6)
    logits = x @ connector.state_dict()["pilot.router.weight"].T
    gates = logits.softmax(-1)
    experts = [mlp(connector, "", x)] + [
        mlp(connector, f"pilot.others.{i}.", x) + mlp(connector, f"pilot.cross.{i}.", x)
        for i in range(2)
    ]
    expected = sum(gates[..., i, None] * expert for i, expert in enumerate(experts))
    torch.testing.assert_close(connector(x), expected)
    aux = 0.1 * balance_loss(gates) + 0.01 * router_z_loss(logits)
    torch.testing.assert_close(connector.aux_loss(), aux)
    connector.eval()
    connector(x)
    assert connector.aux_loss() is None


def test_the_router_may_begin_at_the_own_adapter():
    x = torch.randn(2, 5, 6)
    connector, plain = make(router_own=4.0), make()
    assert connector.state_dict()["pilot.router.bias"].tolist() == [4.0, 0.0, 0.0]
    assert "pilot.router.bias" not in plain.state_dict()
    logits = x @ connector.state_dict()["pilot.router.weight"].T + torch.tensor([4.0, 0, 0])
    gates = logits.softmax(-1)
    assert gates[..., 0].min() > 0.8
    connector.train_groups(*TRAINED)
    out = connector(x)
    torch.testing.assert_close(
        connector.aux_loss(), 0.1 * balance_loss(gates) + 0.01 * router_z_loss(logits)
    )
    out.square().sum().backward()
    assert connector.pilot["router"].bias.grad.abs().max() > 0  # it is learnt from there
    assert "pilot.router.bias" in connector.private()


def test_top_k_keeps_the_largest_gates_of_each_token():
    connector, x = scattered(stage=2, top_k=2), torch.randn(2, 5, 6)
    gates = (x @ connector.state_dict()["pilot.router.weight"].T).softmax(-1)
    gates = gates.masked_fill(gates == gates.amin(-1, keepdim=True), 0.0)
    gates = gates / gates.sum(-1, keepdim=True)
    dense = scattered(stage=2)
    kept = connector._chosen((x @ dense.state_dict()["pilot.router.weight"].T).softmax(-1))
    torch.testing.assert_close(kept, gates)
    assert not torch.allclose(connector(x), dense(x))
    every = scattered(stage=2, top_k=3)
    torch.testing.assert_close(every(x), dense(x))


@pytest.mark.parametrize(("batch", "over"), [(1, "sum"), (3, "sum"), (4, "mean"), (4, "pairs")])
def test_the_difference_loss_is_the_literal_one_without_its_matrix(batch, over):
    torch.manual_seed(batch)
    a, b = torch.randn(2, batch, 4, 7, dtype=torch.float64)
    literal = literal_difference(a, b)
    expected = {"sum": literal.sum(), "mean": literal.mean(), "pairs": literal.sum() / batch**2}
    found = difference_loss(a, b, over)
    torch.testing.assert_close(found, expected[over].float())
    zero = difference_loss(a, torch.zeros_like(b), over)
    assert zero == 0


def test_the_difference_loss_takes_no_gradient_through_the_lengths():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 2, 5)
    a.requires_grad_()
    difference_loss(a, b, "sum").backward()
    rows = a.detach().flatten(1)
    length = rows.norm(dim=1, keepdim=True)
    unit_b = b.flatten(1) / b.flatten(1).norm(dim=1, keepdim=True)
    expected = 2 * (unit_b @ unit_b.T) @ (rows / length) / length
    torch.testing.assert_close(a.grad.flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_the_balance_loss_is_1_where_experts_share_and_t_where_one_has_all():
    even = torch.eye(3).repeat(4, 1) * 0.4 + 0.2
    torch.testing.assert_close(balance_loss(even.view(2, 6, 3)), torch.tensor(1.0))
    one = torch.tensor([[1.0, 0.0, 0.0]]).repeat(5, 1)
    torch.testing.assert_close(balance_loss(one), torch.tensor(3.0))


@pytest.mark.parametrize("init", ["copy", "split"])
def test_both_stages_start_at_the_scale_that_the_docstring_says(init):
    connector, x = make(init=init, stage=1).eval(), torch.randn(2, 5, 6)
    projected = mlp(connector, "", x)
    factor = {"copy": 2, "split": 1}[init]
    torch.testing.assert_close(connector(x), factor * projected)
    connector.settings.stage = 2
    own = (x @ connector.state_dict()["pilot.router.weight"].T).softmax(-1)[..., :1]
    expected = projected if init == "split" else own * projected + (1 - own) * 2 * projected
    torch.testing.assert_close(connector(x), expected)


def test_copies_stay_alike_through_stage_1_which_is_why_split_is_the_default():
    assert PilotSettings().init == "split"
    connector = make(init="copy", stage=1)
    optimizer = torch.optim.Adam(connector.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 5, 6)
        (connector(x).square().mean() + connector.aux_loss()).backward()
        optimizer.step()
    weights = connector.state_dict()
    for name in connector.groups()["task"]:
        torch.testing.assert_close(weights[name], weights[f"pilot.client.{name}"])


def test_split_adapters_learn():
    connector = make(init="split", stage=1)
    connector.train_groups("task", "client")
    optimizer = torch.optim.SGD(connector.parameters(), lr=0.1)
    x, start = torch.randn(4, 5, 6), {n: t.clone() for n, t in connector.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        (connector(x).square().mean() + connector.aux_loss()).backward()
        optimizer.step()
    moved = {n for n, t in connector.state_dict().items() if not torch.equal(t, start[n])}
    own = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert moved == own | {f"pilot.client.{name}" for name in own}


@pytest.mark.parametrize("stage", [1, 2])
def test_groups_say_what_trains_and_everything_is_in_just_one(stage):
    connector = make(stage=stage)
    groups = connector.groups()
    assert sorted(sum(groups.values(), [])) == sorted(connector.state_dict())
    assert groups["task"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not groups["shared"]
    mine = CLIENT_PARTS[:1] if stage == 1 else CLIENT_PARTS[1:]
    assert groups["client"]
    assert all(name.startswith(mine) for name in groups["client"])
    connector.train_groups("task", "client")
    trained = {n for n, p in connector.named_parameters() if p.requires_grad}
    assert trained == {*groups["task"], *groups["client"]}
    (connector(torch.randn(2, 5, 6)).sum() + connector.aux_loss()).backward()
    assert trained == {n for n, p in connector.named_parameters() if p.grad is not None}
    assert set(connector.private()) == {
        name for name in connector.state_dict() if name.startswith(CLIENT_PARTS)
    }


def test_parts_may_be_left_out():
    x = torch.randn(2, 5, 6)
    plain = make(mixture=False)
    torch.testing.assert_close(plain(x), mlp(plain, "", x))
    assert plain.aux_loss() is None
    alone = make(client_adapter=False, stage=1)
    torch.testing.assert_close(alone(x), mlp(alone, "", x))
    assert not alone.groups()["client"]
    one = make(tasks=["only"])  # a mixture of one
    torch.testing.assert_close(one(x), mlp(one, "", x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 3}, "pilot_stage is 3; known are 1, 2"),
        ({"init": "zero"}, "pilot_init is 'zero'; known are copy, split"),
        ({"top_k": 4}, r"pilot_top_k is 4, expected 0 \(all\) to 3"),
        ({"top_k": 1}, r"pilot_top_k is 1: .* expected 0 \(all\) or 2 to 3"),
        ({"tasks": ["a", "a"]}, "pilot_tasks are .*expected different names"),
        ({"balance": -1.0}, "pilot_balance is -1.0, expected 0 or more"),
        ({"difference_over": "tokens"}, "pilot_difference_over is 'tokens'"),
        ({"routers": 2}, "mm_pilot has unknown key 'routers'"),
    ],
)
def test_bad_settings(settings, message):
    config = SimpleNamespace(mm_projector_type="pilot", mm_hidden_size=6, hidden_size=8)
    config.mm_pilot = {"tasks": TASKS, **settings}
    with pytest.raises(InputError, match=message):
        build_vision_projector(config)


# -- through the trainer and the files ------------------------------------------------------------


@pytest.fixture
def start(tiny, flags, tmp_path):
    """A pre-trained projector."""
    train(argv=flags(data_path=tiny / "a.json", output_dir=tmp_path / "plain"))
    return tmp_path / "plain" / "mm_projector.bin"


def pilot_flags(flags, tiny, start, **changes):
    """A Pilot run; `lora` of the changes decides whether the language model has LoRA."""
    changes = {"data_path": tiny / "b.json", "mm_projector_type": "pilot",
               "pretrain_mm_mlp_adapter": start, **changes}  # fmt: skip
    tasks = [] if not (names := changes.pop("tasks", TASKS)) else ["--pilot_tasks", *names]
    if changes.pop("lora", False):
        changes |= {"tune_mm_mlp_adapter": False, "lora_enable": True, "lora_r": 4}
    return [*flags(**changes), *tasks]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_projector_only_run_leaves_what_upstream_reads_and_comes_back_whole(
    flags, tiny, start, tmp_path, stage
):
    train(argv=pilot_flags(flags, tiny, start, pilot_stage=stage))
    found = torch.load(tmp_path / "out/mm_projector.bin", weights_only=True)
    base, before = {n: t for n, t in found.items() if "mm_projector" in n}, load(start)
    assert base.keys() == before.keys()  # all that upstream's own loader picks
    assert all(not torch.equal(t, before[n]) for n, t in base.items())
    others = [n for n in found if n.startswith("model.pilot.others.")]
    assert len(others) == 8
    for name in others:  # frozen copies of the start
        assert torch.equal(found[name], before[_base_name(name)])
    settings = json.loads((tmp_path / "out/config.json").read_text())["mm_pilot"]
    assert settings["tasks"] == TASKS
    assert settings["stage"] == stage
    _, model, _, _ = load_pretrained_model(
        str(tmp_path / "out"), str(tiny / "llm"), "llava", device="cpu"
    )
    connector = model.get_model().mm_projector
    assert connector.settings.stage == stage
    for name, tensor in connector.state_dict().items():
        on_disk = f"model.{name}" if name.startswith("pilot.") else f"model.mm_projector.{name}"
        assert torch.equal(tensor, found[on_disk])
    # Its own task's adapter serves as a plain projector.
    train(argv=flags(data_path=tiny / "a.json", output_dir=tmp_path / "on", max_steps=1,
                     pretrain_mm_mlp_adapter=tmp_path / "out/mm_projector.bin"))  # fmt: skip
    cut = {name: t for name, t in found.items() if "router" not in name}
    save(cut, tmp_path / "out/mm_projector.bin")
    with pytest.raises(InputError, match="pilot.router.weight"):
        load_pretrained_model(str(tmp_path / "out"), str(tiny / "llm"), "llava", device="cpu")


def _base_name(name: str) -> str:
    """The base's name of an adapter's tensor: its last two parts."""
    return "model.mm_projector." + ".".join(name.split(".")[-2:])


@pytest.mark.parametrize("bits", [16, 4])
def test_a_lora_run_resumes_to_the_bit_and_comes_back_whole(flags, tiny, start, tmp_path, bits):
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    saving = {"lora": True, "bits": bits, "save_strategy": "steps", "save_steps": 2}
    train(argv=pilot_flags(flags, tiny, start, **saving, output_dir=tmp_path / "whole"))
    cut = tmp_path / "cut"
    cut.mkdir()
    (tmp_path / "whole/checkpoint-2").rename(cut / "checkpoint-2")
    train(argv=pilot_flags(flags, tiny, start, **saving, output_dir=cut))
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        assert (tmp_path / "whole" / name).read_bytes() == (cut / name).read_bytes()
    found = torch.load(cut / "non_lora_trainables.bin", weights_only=True)
    assert len(found) == 4 * 6 + 2  # own, client, two others, two cross, and the router's
    _, model, _, _ = load_pretrained_model(str(cut), str(tiny / "llm"), "llava", device="cpu")
    for name, tensor in model.get_model().mm_projector.state_dict().items():
        assert torch.equal(tensor, found[f"base_model.model.model.mm_projector.{name}"])


def test_pilot_flags_are_for_pilot(flags, tiny):
    with pytest.raises(InputError, match="--pilot_stage is for --mm_projector_type pilot"):
        train(argv=flags(data_path=tiny / "a.json", pilot_stage=1))
