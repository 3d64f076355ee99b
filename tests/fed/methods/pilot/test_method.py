"""Pilot's server side: fake clients, and numbers worked out by hand."""

import json
import math

import pytest
import torch

from fed import merge, methods
from fed.state import StateError
from llava.errors import InputError

ADAPTER = "model.mm_projector.0.weight"
LORA = "base_model.model.x.lora_A.weight"  # without its B: one vector, averaged as it is
A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


def client(adapter, lora):
    return {ADAPTER: torch.tensor([adapter]), LORA: torch.tensor([lora])}


BASE = client([0.0], [0.0, 0.0])
# 0 and 1 are 5 apart, 0 and 2 are 1 apart, 1 and 2 are sqrt(18) apart.
STATES = [client([1.0], [0.0, 0.0]), client([4.0], [3.0, 4.0]), client([7.0], [0.0, 1.0])]
NAMES, TASKS, SAMPLES = ["sea", "hill", "town"], ["ask", "ask", "tell"], [2, 1, 1]


def pilot(states=STATES, weights=SAMPLES, base=BASE, clients=NAMES, tasks=TASKS, **more):
    given = dict(weights=weights, base=base, clients=clients, tasks=tasks)
    return methods.get("pilot")(states, **given, **more)


def lora_of(outcome):
    return torch.stack([state[LORA].double().flatten() for state in outcome.state])


def close(found, expected):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_task_adapters_by_hand():
    outcome = pilot()
    found = [state[ADAPTER].item() for state in outcome.state]
    assert found == pytest.approx([2, 2, 7])  # (2 · 1 + 4) / 3
    memory = {n: t.item() for n, t in outcome.memory.items()}
    assert memory == pytest.approx({f"ask/{ADAPTER}": 2, f"tell/{ADAPTER}": 7})
    assert outcome.facts["tasks"] == {"ask": ["sea", "hill"], "tell": ["town"]}


def test_literal_by_hand():
    far = 1 / math.sqrt(18)
    outcome = pilot(neighbours=1)
    hill = [3 / (1 + far), (4 + far) / (1 + far)]
    close(lora_of(outcome), [[0, 1 / 3], hill, [0, 1 / 2]])
    sea, two = outcome.facts["lora"]["sea"], outcome.facts["lora"]["hill"]["neighbours"]["town"]
    assert sea["neighbours"]["town"]["distance"] == pytest.approx(1)
    assert sea["own"] == pytest.approx(2 / 3)
    assert list(sea["neighbours"]) == ["town"]
    assert two["distance"] == pytest.approx(18**0.5)
    assert two["weight"] == pytest.approx(far / (1 + far))
    json.dumps(outcome.facts)
    # Three are asked for, two are there: [2 (0, 0) + (3, 4) / 5 + (0, 1) / 1] / (2 + 1/5 + 1).
    close(lora_of(pilot())[0], [0.6 / 3.2, 1.8 / 3.2])


def test_normalise_and_mean_by_hand():
    found = lora_of(pilot(neighbours=1, weighting="normalise"))
    close(found[[0, 2]], [[0, 1 / 3], [0, 1 / 3]])  # p is 2/3 of sea, 1/3 of town
    quarter = pilot(neighbours=1, weighting="normalise", own=0.25)
    close(lora_of(quarter)[0], [0, 0.75])
    # 0.4 is shared by 1/5 and 1/1: a sixth and five sixths of it.
    both = lora_of(pilot(weighting="normalise", own=0.6))
    close(both[0], [0.4 / 6 * 3, 0.4 / 6 * 4 + 0.4 * 5 / 6])
    close(lora_of(pilot(weighting="mean")), [[0.75, 1.25]] * 3)
    close(lora_of(pilot(weighting="normalise", own=1.0)), lora_of(pilot(neighbours=0)))


SHAPES = {
    "model.mm_projector.0.weight": (4, 3),
    "model.mm_projector.0.bias": (4,),
    A: (3, 20),
    B: (11, 3),
    A.replace("q", "v"): (3, 11),
    B.replace("q", "v"): (9, 3),
}


def draw(seed, clients=5, shapes=SHAPES):
    torch.manual_seed(seed)
    return [{n: torch.randn(s) for n, s in shapes.items()} for _ in range(clients + 1)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("neighbours", [1, 3])
def test_literal_is_the_formula(seed, neighbours):
    base, *states = draw(seed)
    n = [3, 9, 0.5, 2, 6]
    found = pilot(states, n, base, list("abcde"), list("xxyyy"), neighbours=neighbours).state
    lora = [torch.cat([s[x].double().flatten() for x in SHAPES if "lora" in x]) for s in states]
    for k, own in enumerate(lora):
        d = {j: float((own - other).norm()) for j, other in enumerate(lora) if j != k}
        above, below = n[k] * own, n[k]
        for j in sorted(d, key=d.get)[:neighbours]:
            above, below = above + lora[j] / d[j], below + 1 / d[j]
        close(torch.cat([found[k][x].flatten() for x in SHAPES if "lora" in x]), above / below)


@pytest.mark.parametrize("weighting", ["literal", "normalise", "mean"])
@pytest.mark.parametrize("clients", [2, 5])
def test_product_is_the_best_of_that_rank(weighting, clients):
    """Of two clients the stack of factors is narrower than the layer, of five it is wider."""
    base, *states = draw(7, clients)
    n, names = [1.5, 1, 2, 3, 1][:clients], list("abcde")[:clients]
    outcome = pilot(states, n, base, names, names, weighting=weighting, average="product")
    for k, name in enumerate(names):
        facts = outcome.facts["lora"][name]
        weights = {j: v["weight"] for j, v in facts["neighbours"].items()} | {name: facts["own"]}
        assert sum(weights.values()) == pytest.approx(1)
        for module in "qv":
            a, b = A.replace("q", module), B.replace("q", module)
            mean = sum(
                w * states[names.index(j)][b].double() @ states[names.index(j)][a].double()
                for j, w in weights.items()
            )
            u, s, v = torch.linalg.svd(mean, full_matrices=False)
            made_a, made_b = (outcome.state[k][x].double() for x in (a, b))
            best = (u[:, :3] * s[:3]) @ v[:3]
            torch.testing.assert_close(made_b @ made_a, best, rtol=1e-4, atol=1e-5)
            # Balanced: both factors carry the square roots.
            torch.testing.assert_close(made_a @ made_a.T, made_b.T @ made_b, rtol=1e-3, atol=1e-4)


def test_a_product_of_nothing_can_still_be_trained():
    """LoRA begins with a B of 0: where nobody has moved it, A must stay, or it has no gradient."""
    base, *states = draw(8, 2)
    for state in states:
        state[B] = torch.zeros_like(state[B])
    outcome = pilot(
        states, [1, 3], base, ["a", "b"], ["x", "y"], weighting="mean", average="product"
    )
    for state in (outcome.state[0], outcome.state[1]):
        assert not state[B].any()
        torch.testing.assert_close(state[A], 0.25 * states[0][A] + 0.75 * states[1][A])
    one = pilot(states[:1], [1], base, ["a"], ["x"], average="product").state[0]
    torch.testing.assert_close(one[A], states[0][A])


def test_factors_and_product_differ_but_agree_on_a_client_alone():
    base, *states = draw(1)
    names, n = list("abcde"), [1] * 5
    both = [
        pilot(states, n, base, names, names, average=how).state[0] for how in ("factors", "product")
    ]
    assert float((both[0][B] @ both[0][A] - both[1][B] @ both[1][A]).norm()) > 0.1
    kept = pilot(states[:1], [4], base, ["a"], ["x"]).state[0]
    for name in SHAPES:
        close(kept[name], states[0][name])
    same = pilot(states[:1], [4], base, ["a"], ["x"], average="product").state[0]
    torch.testing.assert_close(same[B] @ same[A], states[0][B] @ states[0][A], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", ["literal", "normalise", "mean"])
@pytest.mark.parametrize("average", ["factors", "product"])
def test_equal_clients(weighting, average):
    base, *states = draw(2, 3)
    three = [states[0]] * 3
    found = pilot(three, [1, 2, 3], base, weighting=weighting, average=average)
    for state in found.state:
        for left, right in ((state[B] @ state[A], states[0][B] @ states[0][A]),
                            (state[ADAPTER], states[0][ADAPTER])):  # fmt: skip
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    apart = [v["distance"] for f in found.facts["lora"].values() for v in f["neighbours"].values()]
    assert apart == pytest.approx([0] * 6)
    two = pilot([states[0], states[0], states[1]], [1, 2, 3], base, weighting=weighting)
    if weighting != "mean":  # the limit: what lies at no distance has all of the neighbours' part
        for name in (A, B):
            close(two.state[0][name], states[0][name])
        assert not torch.allclose(two.state[2][A], states[1][A])


def test_a_client_without_samples_learns_but_is_no_neighbour():
    outcome = pilot(weights=[0, 1, 1], neighbours=1)
    assert list(outcome.facts["lora"]["town"]["neighbours"]) == ["hill"]
    close(lora_of(outcome)[0], [0, 1])  # nothing of its own: all of its nearest, town
    assert [state[ADAPTER].item() for state in outcome.state] == pytest.approx([4, 4, 7])
    assert outcome.facts["tasks"]["ask"] == ["hill"]
    # Where a task has no samples at all its adapter is that of the start.
    assert pilot(weights=[1, 1, 0]).state[2][ADAPTER].item() == pytest.approx(0)


def test_an_absent_task_keeps_its_adapter_and_late_clients_get_what_there_is_today():
    first = pilot()
    second = pilot(
        [client([9.0], [8.0, 8.0])], [1], clients=["hill"], tasks=["ask"], memory=first.memory
    )
    assert second.memory[f"ask/{ADAPTER}"].item() == pytest.approx(9)
    assert second.memory[f"tell/{ADAPTER}"].item() == pytest.approx(7)
    personal = dict(zip(NAMES, first.state, strict=True)) | {"hill": second.state[0]}
    send = methods.get("pilot").send

    start, beside = send("sea", "ask", personal, BASE, second.memory)  # missed the second round
    assert start[ADAPTER].item() == pytest.approx(9)
    assert torch.equal(start[LORA], first.state[0][LORA])
    assert list(start) == list(BASE)
    assert list(beside) == [f"tell/{ADAPTER}"]
    late, beside = send("new", "tell", personal, BASE, second.memory)
    close(late[LORA], torch.stack([s[LORA] for s in personal.values()]).mean(0))
    assert late[ADAPTER].item() == pytest.approx(7)
    assert list(beside) == [f"ask/{ADAPTER}"]
    other, beside = send("new", "draw", personal, BASE, second.memory)  # a task of its own
    assert other[ADAPTER].item() == pytest.approx(0)
    assert len(beside) == 2

    only = {"hill": second.state[0]}  # the mean of one would be that client
    assert torch.equal(send("new", "ask", only, BASE, {})[0][LORA], BASE[LORA])
    start, beside = send("new", "ask", {}, BASE, {})
    assert all(torch.equal(start[n], BASE[n]) for n in BASE)
    assert beside == {}


def test_either_part_may_be_absent():
    lora, adapter = ({n: BASE[n]} for n in (LORA, ADAPTER))
    outcome = pilot([{LORA: s[LORA]} for s in STATES], base=lora)
    assert outcome.memory is None
    assert list(outcome.state[0]) == [LORA]
    assert methods.get("pilot").send("x", "ask", {}, lora, {}) == (lora, {})
    outcome = pilot([{ADAPTER: s[ADAPTER]} for s in STATES], base=adapter)
    assert "lora" not in outcome.facts
    assert list(outcome.state[2]) == [ADAPTER]


def test_without_tasks_all_clients_have_one():
    outcome = pilot(tasks=None)
    assert list(outcome.memory) == [f"/{ADAPTER}"]
    found = [state[ADAPTER].item() for state in outcome.state]
    assert found == pytest.approx([3.25] * 3)  # (2 · 1 + 4 + 7) / 4


def test_memory_of_another_model_is_refused():
    for memory, said in (
        ({"ask/other": torch.zeros(1)}, f"memory: tensor ask/{ADAPTER} is missing"),
        ({f"ask/{ADAPTER}": torch.zeros(2, 2)}, r"ask/.* has shape \(2, 2\), expected \(1, 1\)"),
        ({f"ask/{ADAPTER}": torch.tensor([[math.nan]])}, "holds NaN"),
    ):
        with pytest.raises(StateError, match=said):
            pilot(memory=memory)


def test_lora_of_another_rank_is_refused_with_the_difference():
    base, *states = draw(0, 3)
    states[1] = {**states[1], A: torch.randn(2, 20)}
    with pytest.raises(StateError, match=r"client hill.*lora_A.*\(2, 20\).*\(3, 20\)"):
        pilot(states, base=base)


def test_distances_beyond_all_numbers_are_refused():
    huge = [client([1.0], [float(k), 1e30]) for k in range(3)]
    huge = [{n: t.double() for n, t in s.items()} for s in huge]
    huge[1][LORA] *= 1e140
    with pytest.raises(StateError, match="client hill: its LoRA is too far"):
        pilot(huge, base={n: t.double() for n, t in BASE.items()})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(neighbours=-1), "option neighbours: expected 0 or more"),
        (dict(own=1.5, weighting="normalise"), "option own: expected 0"),
        (dict(own=0.5), "only weighting=normalise"),
        (dict(weighting="nearest"), "expected one of literal, normalise, mean"),
        (dict(average="both"), "expected one of factors, product"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(InputError, match=said):
        pilot(**options)


def test_arguments_are_left_as_they_were():
    base, *states = draw(4, 3)
    memory = pilot(states, base=base).memory
    given = [base, *states, memory]
    before = [{n: t.clone() for n, t in s.items()} for s in given]
    for average in ("factors", "product"):
        assert len(list(pilot(states, base=base, memory=memory, average=average).state)) == 3
    for old, new in zip(before, given, strict=True):
        assert list(old) == list(new)
        assert all(torch.equal(old[n], new[n]) for n in old)


def test_a_merge_has_no_use_for_it():
    assert "pilot" not in merge.list_methods()
