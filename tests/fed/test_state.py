import os
import pickle

import pytest
import torch

from fed import state as fs
from fed.state import StateError

NAMES = ["model.mm_projector.0.weight", "model.mm_projector.0.bias", "model.mm_projector.2.weight"]
SUFFIXES = [".bin", ".safetensors"]


def some_state(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(4, 3), (4,), (4, 4)]
    return {n: torch.randn(s).to(dtype) for n, s in zip(NAMES, shapes, strict=True)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_is_loaded(tmp_path, suffix, dtype):
    state = some_state(dtype)
    fs.save(state, tmp_path / f"new/mm_projector{suffix}")
    loaded = fs.load(tmp_path / f"new/mm_projector{suffix}")
    assert equal(state, loaded)
    assert loaded[NAMES[0]].dtype == dtype
    assert [p.name for p in (tmp_path / "new").iterdir()] == [f"mm_projector{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_states_give_equal_bytes(tmp_path, suffix):
    state = some_state()
    wide = torch.zeros(4, 300)
    wide[:, :3] = state[NAMES[0]]
    other = {n: state[n].clone() for n in reversed(NAMES)}
    other[NAMES[0]] = torch.nn.Parameter(wide[:, :3])  # a view into something larger, and a leaf
    fs.save(state, tmp_path / f"one{suffix}")
    fs.save(other, tmp_path / f"another{suffix}")
    one, another = [(tmp_path / f"{n}{suffix}").read_bytes() for n in ("one", "another")]
    assert one == another
    assert len(one) < 4000


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_that_share_memory_are_saved_apart(tmp_path, suffix):
    tensor = torch.ones(2, 2)
    fs.save({"mm_projector.a": tensor, "mm_projector.b": tensor}, tmp_path / f"x{suffix}")
    loaded = fs.load(tmp_path / f"x{suffix}")
    loaded["model.mm_projector.a"].zero_()
    assert loaded["model.mm_projector.b"].sum() == 4


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "base_model.model.model."])
def test_any_prefix_before_the_projector(tmp_path, prefix):
    tensor = torch.ones(2)
    torch.save(
        {f"{prefix}mm_projector.weight": tensor, "lm_head.weight": tensor}, tmp_path / "x.bin"
    )
    assert list(fs.load(tmp_path / "x.bin")) == ["model.mm_projector.weight", "lm_head.weight"]


def test_only_whole_name_parts_are_the_projector(tmp_path):
    names = ["model.mm_projector.weight", "model.task_mm_projector.weight"]
    torch.save({n: torch.ones(2) for n in names}, tmp_path / "x.bin")
    assert list(fs.load(tmp_path / "x.bin")) == names


def test_an_empty_state_is_an_identity_connector(tmp_path):
    fs.save({}, tmp_path / "x.bin")
    assert fs.load(tmp_path / "x.bin") == {}


def refusal(path):
    with pytest.raises(StateError) as caught:
        fs.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


class Code:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_does_not_run(tmp_path, zipped):
    Code.folder = str(tmp_path / "made")
    torch.save({"a": Code()}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    assert "other than tensors" in refusal(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Code(), protocol=2))
    refusal(tmp_path / "x.bin")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("keep", [0, 10, 200, -3])
def test_a_file_cut_short(tmp_path, suffix, keep):
    path = tmp_path / f"x{suffix}"
    fs.save(some_state(), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut short" in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_something_else(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_text("hello world, this is not a file of tensors")
    assert "not a file of tensors" in refusal(path)


def test_missing_file_folder_and_suffix(tmp_path):
    assert "no such file" in refusal(tmp_path / "x.bin")
    (tmp_path / "folder.bin").mkdir()
    assert "no such file" in refusal(tmp_path / "folder.bin")
    assert ".safetensors" in refusal(tmp_path / "x.pt")
    with pytest.raises(StateError, match="ends in"):
        fs.save(some_state(), tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], "found a list"),
        (torch.ones(2), "found a Tensor"),
        ({"mm_projector": {"weight": torch.ones(2)}}, "dict under 'mm_projector'"),
        ({"mm_projector.weight": 1.0}, "float under"),
        ({0: torch.ones(2)}, "under 0"),
        ({"mm_projector.weight": torch.eye(2).to_sparse()}, "dense"),
        ({"mm_projector.weight": torch.ones(2, device="meta")}, "dense"),
        ({"mm_projector.a": torch.ones(2), "model.mm_projector.a": torch.ones(2)}, "second tensor"),
        ({"lm_head.weight": torch.ones(2)}, "no mm_projector tensor"),
        (
            {"mm_projector.a": torch.ones(2), "mm_projector.b": torch.ones(0)},
            "b is empty, of shape (0,)",
        ),
    ],
)
def test_not_a_flat_dict_of_projector_tensors(tmp_path, content, said):
    torch.save(content, tmp_path / "x.bin")
    assert said in refusal(tmp_path / "x.bin")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    fs.save(some_state(), tmp_path / "x.bin")
    with pytest.raises(AttributeError):
        fs.save({"mm_projector.a": "no tensor"}, tmp_path / "x.bin")
    assert equal(fs.load(tmp_path / "x.bin"), some_state())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(NAMES[1]), [f"{NAMES[1]} is missing"]),
        (lambda s: s.update({"model.mm_projector.1.weight": s.pop(NAMES[0])}), ["did you mean"]),
        (lambda s: s.update(extra=torch.ones(1)), ["extra is not expected"]),
        (lambda s: s.update({NAMES[0]: torch.ones(3, 4)}), [NAMES[0], "(3, 4)", "(4, 3)"]),
        (lambda s: s.update({NAMES[0]: torch.ones(0)}), [NAMES[0], "is empty", "ZeRO-3"]),
        (lambda s: s.update({NAMES[1]: torch.ones(4, dtype=torch.int64)}), [NAMES[1], "int64"]),
        (lambda s: s[NAMES[2]][0].fill_(float("nan")), [NAMES[2], "4 NaN or infinite of 16"]),
        (lambda s: s[NAMES[2]][0, 0].fill_(float("-inf")), [NAMES[2], "1 NaN or infinite"]),
    ],
)
def test_check_names_who_what_and_why(change, said):
    state = some_state()
    change(state)
    with pytest.raises(StateError) as caught:
        fs.check(state, some_state(), who="client 'b'")
    assert all(part in str(caught.value) for part in ["client 'b': ", *said])


def test_check_lets_a_good_state_of_another_float_type_pass():
    fs.check(some_state(torch.float16), some_state(), who="x")


def test_fingerprint_is_of_content_only():
    state = some_state(torch.bfloat16)
    mark = fs.fingerprint(state)
    assert len(mark) == 64
    assert mark == fs.fingerprint({n: state[n].clone() for n in reversed(NAMES)})
    assert mark == fs.fingerprint({**state, NAMES[0]: state[NAMES[0]].t().contiguous().t()})
    renamed = {**state, "other": state[NAMES[0]]}
    del renamed[NAMES[0]]
    changed = {n: t.clone() for n, t in state.items()}
    changed[NAMES[1]][0] += 1
    reshaped = {**state, NAMES[0]: state[NAMES[0]].reshape(3, 4)}
    retyped = {n: t.float() for n, t in state.items()}
    assert len({mark} | {fs.fingerprint(s) for s in (renamed, changed, reshaped, retyped)}) == 5
    assert fs.fingerprint({"a": torch.tensor(1.0), "b": torch.ones(0)}) != fs.fingerprint({})
