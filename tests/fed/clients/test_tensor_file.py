from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fed.clients.tensor_file import load_with_facts, save_with_facts
from fed.clients.update import Update, load_update, save_update
from llava.errors import InputError


def mixed() -> dict[str, torch.Tensor]:
    return {
        "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "view": torch.arange(12.0).view(3, 4).T,
        "empty": torch.empty(0),
    }


def test_tensors_of_all_kinds_come_back_and_other_readers_read_them(tmp_path):
    tensors = mixed()
    save_with_facts(tensors, {"round": 1, "name": "ä"}, tmp_path / "x.safetensors")
    found, facts = load_with_facts(tmp_path / "x.safetensors")
    assert facts == {"round": 1, "name": "ä"}
    for read in (found, load_file(tmp_path / "x.safetensors")):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def test_a_file_of_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("fed.clients.tensor_file._PIECE", 8)
    save_with_facts({"w": torch.arange(100.0)}, {}, tmp_path / "x.safetensors")
    assert torch.equal(load_with_facts(tmp_path / "x.safetensors")[0]["w"], torch.arange(100.0))


def test_every_flipped_bit_is_found(tmp_path):
    path, broken = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_with_facts({"a": torch.randn(3), "b": torch.tensor(7)}, {"round": 2}, path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 5, 7):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            broken.write_bytes(changed)
            with pytest.raises(InputError, match=r"y\.safetensors: "):
                load_with_facts(broken)


def test_a_damaged_value_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_with_facts({"a": torch.randn(3), "b": torch.randn(4)}, {}, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="tensor b is damaged"):
        load_with_facts(path)
    load_with_facts(path, check=False)  # the head is whole


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_file_that_is_cut_short(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_with_facts({"a": torch.randn(3)}, {}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="not a file of this run"):
        load_with_facts(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_with_facts({"a": torch.ones(3)}, {}, path)
    with pytest.raises(KeyError):
        save_with_facts({"a": torch.ones(3, dtype=torch.complex64)}, {}, path)
    assert torch.equal(load_with_facts(path)[0]["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_update_comes_back_from_the_disk_as_it_was(tmp_path):
    one = {"w": torch.tensor([1.0, 2.0])}
    update = Update(one, 3, {"loss": 2.0}, extras={"w": one["w"] + 4}, kept={"w": one["w"] + 5})
    save_update(update, tmp_path / "u.safetensors")
    found = load_update(tmp_path / "u.safetensors")
    assert (found.num_samples, found.metrics) == (3, {"loss": 2.0})
    for part in ("state", "extras", "kept"):
        assert torch.equal(getattr(found, part)["w"], getattr(update, part)["w"])
