import pytest
import torch

from fed.numerics.layers import Parts, layers, to_matrix, write_matrix


def test_layers_and_what_belongs_to_none():
    names = {
        "model.mm_projector.0.weight": (4, 3),
        "model.mm_projector.0.bias": (4,),
        "model.mm_projector.1.weight": (4,),  # a norm
        "model.mm_projector.1.bias": (4,),
        "model.mm_projector.2.weight": (5, 4),  # no bias
        "model.mm_projector.3.weight": (4, 1, 3, 3),  # a convolution
        "model.mm_projector.scale": (),
        "model.embed_tokens.weight": (9, 4),
    }
    state = {name: torch.randn(shape) for name, shape in names.items()}
    found, rest = layers(state)
    assert [layer.name.removeprefix("model.mm_projector.") for layer in found] == ["0", "2", "3"]
    assert [layer.bias for layer in found] == ["model.mm_projector.0.bias", None, None]
    assert [n.split(".", 2)[-1] for n in rest] == ["1.weight", "1.bias", "scale", "weight"]
    back = {name: state[name] for name in rest}
    for layer in found:
        back |= {n: torch.empty_like(state[n]) for n in (layer.weight, layer.bias) if n}
        write_matrix(to_matrix(state, layer), layer, back)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], state[n].to(back[n].dtype)) for n in state)


def test_a_layer_without_index_is_found_too():
    state = {
        "model.mm_projector.weight": torch.ones(2, 3),
        "model.mm_projector.bias": torch.zeros(2),
    }
    (layer,), rest = layers(state)
    assert (layer.name, rest) == ("model.mm_projector", [])
    assert to_matrix(state, layer).tolist() == [[1, 1, 1, 0]] * 2


@pytest.mark.parametrize(("out", "dtype"), [(1024, torch.float64), (1025, torch.float32)])
def test_precision_by_side(out, dtype):
    state = {"a.weight": torch.ones(out, 2, dtype=torch.bfloat16)}
    assert to_matrix(state, layers(state)[0][0]).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out", [700, 1100])  # more rows than are cast at once; both precisions
def test_parts_are_the_clients_less_the_origin(out, dtype):
    torch.manual_seed(0)
    shapes = {"a.weight": (out, 3), "a.bias": (out,)}
    states = [{n: torch.randn(s).to(dtype) for n, s in shapes.items()} for _ in range(3)]
    (layer,), _ = layers(states[0])
    parts = Parts(states[1:], layer, states[0])
    assert len(parts) == 2
    for _ in range(2):  # as often as one likes
        for part, state in zip(parts, states[1:], strict=True):
            assert torch.equal(part, to_matrix(state, layer) - to_matrix(states[0], layer))
        whole = {n: torch.empty_like(t) for n, t in states[0].items()}
        write_matrix(part, layer, whole, states[0])
        torch.testing.assert_close(whole, states[-1])
    assert torch.equal(next(iter(Parts(states, layer))), to_matrix(states[0], layer))
