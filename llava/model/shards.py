"""A model's weights on disk, one tensor at a time: 13B parameters pass through a few GB of memory.

Reads `model.safetensors`, `pytorch_model.bin`, and both in shards; writes safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llava.atomic import own_name, remove_leftovers, write_text
from llava.errors import InputError, reason
from llava.json_files import read_json
from llava.state import read_tensors, refuse_empty

STEMS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
SMALL_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
# The files of a model on the hub: weights, and every kind of small file.
DOWNLOADED = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
# With the file that is read and the copy that is written, three times this is in memory.
SHARD_BYTES = 2_000_000_000


_GGUF_IS_NOT_READ = (
    "a GGUF, which is not read tensor by tensor; python -m llava.model.gguf makes a folder of it"
)


class Shards(Mapping[str, torch.Tensor]):
    """The tensors of a folder by name, each read when asked for; iterates file by file.

    Raises:
        InputError: no weights, shards without an index, a file that is missing or broken, a tensor
            without values, or a shard without a tensor that the index says it has.

    `stems` are the names that the file may have, the first that is there counts.
    """

    def __init__(self, folder: str | os.PathLike, stems: Sequence[str] = STEMS):
        self.folder, self.stems = Path(folder), stems
        self._open: tuple[str, Mapping[str, torch.Tensor]] | None = None
        self._file_of = dict(self._locate())

    def _locate(self) -> Iterator[tuple[str, str]]:
        for stem in self.stems:
            if (index := self.folder / (stem + INDEX)).is_file():
                places = _places(index)
                for file in sorted(set(places.values())):
                    if not (self.folder / file).is_file() or Path(file).name != file:
                        raise InputError(f"{index}: names the shard {file}, which is not there")
                yield from sorted(places.items(), key=lambda place: (place[1], place[0]))
                return
            if (self.folder / stem).is_file():
                self._open = (stem, self._tensors(stem))
                yield from ((name, stem) for name in self._open[1])
                return
            if shards := sorted(self.folder.glob("-*-of-*".join(os.path.splitext(stem)))):
                raise InputError(
                    f"{self.folder}: {shards[0].name} is a shard, and {stem + INDEX}, which says "
                    "what is in which, is not there; copy all files of the model"
                )
        if next(self.folder.glob("*.gguf"), None):
            raise InputError(f"{self.folder}: {_GGUF_IS_NOT_READ}")
        raise InputError(f"{self.folder}: no weights there, neither {' nor '.join(self.stems)}")

    def _tensors(self, file: str) -> Mapping[str, torch.Tensor]:
        path = self.folder / file
        if path.suffix != ".safetensors":
            return read_tensors(path, mapped=True)
        try:
            return _SafeFile(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cut short or not safetensors ({error})") from None

    def check_files(self) -> None:
        """Open every file, whose tensors are not read: one that is broken is found here."""
        for name in {file: name for name, file in self._file_of.items()}.values():
            self._file(name)
        self.release()

    def _file(self, name: str) -> Mapping[str, torch.Tensor]:
        """The file that holds `name`, open."""
        file = self._file_of[name]
        if self._open is None or self._open[0] != file:
            self._open = None  # the last shard goes before the next comes
            self._open = (file, self._tensors(file))
        return self._open[1]

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self._file(name)[name]
        except (KeyError, SafetensorError):
            if name not in self:
                raise
            raise InputError(
                f"{self.place(name)}: has no tensor {name}, which the index puts there"
            ) from None

    def place(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._file_of[name]

    def release(self) -> None:
        """Close the file that is open: what was read of it no longer counts as our memory."""
        self._open = None

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


class _SafeFile(Mapping[str, torch.Tensor]):
    def __init__(self, path: Path):
        self._file = safe_open(path, "pt")
        self._names = list(self._file.keys())
        for name in self._names:
            refuse_empty(name, self._file.get_slice(name).get_shape(), str(path))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _places(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise InputError(f"{index}: not an index of shards: no weight_map from names to files")
    if not places:
        raise InputError(f"{index}: its weight_map is empty: it names no tensor")
    return places


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int | None = None
) -> int:
    """Write `tensors` as `model.safetensors`, or in shards of at most `shard_bytes` with an index.

    One shard, by default of 2 GB, is in memory at a time. Returns the bytes of all tensors.

    Raises:
        InputError: two tensors of one name.
    """
    shard_bytes = shard_bytes or SHARD_BYTES
    remove_leftovers(folder)  # they are as large as shards
    places: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    files = total = held = 0

    def temporary(number: int) -> Path:
        return own_name(folder / f"shard-{number}")

    def flush() -> None:
        nonlocal files, held
        _save(shard, temporary(files))
        shard.clear()
        files, held = files + 1, 0

    for name, tensor in tensors:
        if name in places:
            raise InputError(f"two tensors would be called {name}")
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            flush()
        places[name] = files
        shard[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        held, total = held + size, total + size
    flush()

    for stale in (STEMS[0], STEMS[0] + INDEX):
        (folder / stale).unlink(missing_ok=True)
    if files == 1:
        temporary(0).rename(folder / STEMS[0])
        return total
    final = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    for i, file in enumerate(final):
        temporary(i).rename(folder / file)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[i] for name, i in sorted(places.items())},
    }
    write_text(folder / (STEMS[0] + INDEX), json.dumps(index, indent=2) + "\n")
    return total


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # others may read it as they may any new file: safetensors forbids it
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def copy_small_files(folder: Path, out: Path, dtype: str | None = None) -> None:
    """Copy what stands beside the weights; config.json too if a `dtype` for it is given."""
    out.mkdir(exist_ok=True)
    for name in SMALL_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if dtype:
        config = {**read_json(folder / "config.json"), "torch_dtype": dtype, "dtype": dtype}
        write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def local_folder(path: str | os.PathLike) -> Path:
    """`path` if it is a folder, else the hub's snapshot of that name (from the cache if there)."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise InputError(f"{path}: {_GGUF_IS_NOT_READ}")
    check_hub_name(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{path}: {not_found(error)}") from None


def check_hub_name(path: str | os.PathLike) -> None:
    """`InputError` for what is no folder if it cannot be the name of a model on the hub either."""
    if str(path).startswith(("/", ".", "~")) or len(Path(path).parts) > 2:
        raise InputError(f"{path}: no such folder, looked for from {Path.cwd()}")


def not_found(error: Exception) -> str:
    """The message on a name under which there is neither a folder nor, for `error`, a model."""
    return f"no such folder, looked for from {Path.cwd()}, nor one on the hub ({reason(error)})"
