"""LLaVA's data: a JSON list of records, each a conversation and perhaps pictures."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Segment, get_template
from llava.errors import InputError
from llava.mm_utils import check_aspect_ratio, image_size, open_image, stack_same
from llava.pictures import is_of_the_picture
from llava.texts import half_character
from llava.train.preprocess import fit, preprocess_multimodal, read_turns, render, tokenize
from llava.train.sample_format import SampleFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava.train.feature_cache import FeatureCache


def load_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a LLaVA data file; `InputError` names the file, and the record, at fault."""
    try:
        records = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"data file {path} is not JSON: {error}") from error
    except RecursionError:
        raise InputError(f"data file {path}: its JSON is nested too deep") from None
    check_records(records, str(path))
    if not records:
        raise InputError(f"data file {path} holds no records")
    return records


def check_records(records: Any, source: str) -> None:
    """`InputError` unless `records` is a list of dicts, each with a list as `conversations`.

    Every text in them must be one that UTF-8 can hold.
    """
    if not isinstance(records, list):
        raise InputError(f"{source}: expected a list of records, found {type(records).__name__}")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"{source}: record {i} is not an object but {record!r:.80}")
        if not isinstance(record.get("conversations"), list):
            raise InputError(f"{source}: {_name(record, i)} has no list `conversations`")
        if (half := half_character(record)) is not None:
            raise InputError(
                f"{source}: {_name(record, i)} has half a character in {half!r}: "
                "an emoji cut in two, which is no text"
            )


def _name(record: dict[str, Any], index: int) -> str:
    return f"record {index} (id {record['id']!r})" if "id" in record else f"record {index}"


@dataclass
class CheckReport:
    """The findings of `LazySupervisedDataset.check`.

    `samples` are left. `skipped` were dropped for a picture that cannot be read, `unlabelled` as
    nothing in them is learnt. `truncated` of those that can be read have text that is cut at
    model_max_length.
    """

    samples: int
    truncated: int
    skipped: int
    unlabelled: int = 0


class LazySupervisedDataset(Dataset):
    """Records, tokenised and opened one at a time as they are asked for.

    An item is `{"input_ids": (T,), "labels": (T,)}` and, for a record with pictures, a list with an
    entry for each: `"images"`, pixels (3, H, W) or tiles of that shape, or features (N, C) when
    `feature_cache` has them; `"image_tokens"`, how many tokens it takes; for tiles `"image_sizes"`,
    (width, height) in pixels. In `input_ids` a picture is one -200. A text-only record has none of
    these (upstream sends zeros through the tower).

    Args:
        data_path: a file of records, or the records.
        data_args: `image_folder` and `skip_bad_images` are read of it; without `sample_format` also
            the attributes of that name, into which programs for upstream write.
        sample_format: `Session.sample_format`, or one that differs from it for this data set.
    """

    def __init__(
        self,
        data_path: str | os.PathLike | list[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        data_args: Any,
        feature_cache: FeatureCache | None = None,
        sample_format: SampleFormat | None = None,
    ) -> None:
        if isinstance(data_path, list):
            self.source = "the given records"
            check_records(data_path, self.source)
            self.records = data_path
        else:
            self.source = str(data_path)
            self.records = load_records(data_path)
        self.tokenizer = tokenizer
        self.data_args = data_args
        self.feature_cache = feature_cache
        self.sample_format = sample_format or SampleFormat.of_arguments(data_args)
        self.template = get_template(self.sample_format.version)
        check_aspect_ratio(self.sample_format.image_aspect_ratio)

    def __len__(self) -> int:
        return len(self.records)

    def select(self, indices: Iterable[int]) -> LazySupervisedDataset:
        """The same data set with only the records at `indices`, in that order; all else shared."""
        chosen = copy.copy(self)
        chosen.records = [self.records[i] for i in indices]
        return chosen

    @property
    def lengths(self) -> list[int]:
        """Words of each record, and 128 more for a picture."""
        return [words + 128 if picture else words for words, picture in self._sizes()]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each record (at least 1), negative where there is no picture."""
        return [max(1, words) * (1 if picture else -1) for words, picture in self._sizes()]

    def _sizes(self) -> Iterator[tuple[int, bool]]:
        for record in self.records:
            words = sum(len(turn["value"].split()) for turn in record["conversations"])
            yield words, record.get("image") is not None

    def paths(self, index: int) -> list[str]:
        """The paths of the record's pictures, in the order of its text; empty for text alone."""
        images = self.records[index].get("image")
        if images is None:
            return []
        images = images if isinstance(images, list) else [images]
        if not images or not all(isinstance(image, str) for image in images):
            raise InputError(
                f"{self.name(index)}: `image` is {self.records[index]['image']!r:.80}, "
                "expected a path or a list of paths"
            )
        return [os.path.join(self.data_args.image_folder or "", image) for image in images]

    def pictures(self) -> list[str]:
        """All pictures, each once, in the order of their first record."""
        return list(dict.fromkeys(path for i in range(len(self)) for path in self.paths(i)))

    def name(self, index: int) -> str:
        """The record's name in an error message."""
        return f"{self.source}: {_name(self.records[index], index)}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, labels = self.tokens(index)
        item: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if paths := self.paths(index):
            item["images"] = [self._picture(path) for path in paths]
            tiling = self.sample_format.tiling
            if tiling is None:
                item["image_tokens"] = [self.sample_format.image_tokens] * len(paths)
            else:
                sizes = item["image_sizes"] = [image_size(path) for path in paths]
                item["image_tokens"] = [tiling.num_tokens(size) for size in sizes]
        return item

    def tokens(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` and `labels` of an item; no picture is opened."""
        return tokenize(self._segments(index), self.tokenizer)

    def _picture(self, path: str) -> torch.Tensor:
        features = self.feature_cache.get(path) if self.feature_cache else None
        return self.sample_format.pixels(path) if features is None else features

    def _tokens_of(self, path: str) -> int:
        """The number of tokens that the picture takes; with tiles it depends on its size."""
        tiling = self.sample_format.tiling
        return (
            tiling.num_tokens(image_size(path)) if tiling else self.sample_format.image_tokens or 1
        )

    def _segments(self, index: int) -> list[Segment]:
        """The record as pieces of text; `InputError` when text and pictures do not fit together."""
        pictures = len(self.paths(index))
        try:
            turns = read_turns(self.records[index]["conversations"])
            mentions = sum(text.count(DEFAULT_IMAGE_TOKEN) for text in turns)
            if pictures and not self.sample_format.is_multimodal:
                raise InputError("it has a picture, but the run has no vision tower")
            if mentions != pictures:
                found = {0: "no picture", 1: "one picture"}.get(pictures, f"{pictures} pictures")
                raise InputError(f"it has {found}, but its text says `<image>` {mentions} times")
            turns = preprocess_multimodal(
                turns, self.template, self.sample_format.mm_use_im_start_end
            )
            return render(turns, self.template)
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from None

    def check(self) -> CheckReport:
        """Look at every record and picture before any training.

        The first record of a wrong structure, the first whose picture's tokens do not fit into
        model_max_length, and the first whose picture cannot be decoded, is an `InputError`. With
        `skip_bad_images` records of the last kind leave `records` and are counted instead, unless
        it was the disk, the network or the memory that failed. So do
        those that teach nothing, as their answers are empty or cut off: they would take steps, and
        count where clients are weighed by their samples. If nothing is left, that is an error too.
        Pictures in the feature cache have been decoded before and are not read again.
        """
        lengths = [self._length(i) for i in range(len(self))]
        owners = {path: i for i in reversed(range(len(self))) for path in self.paths(i)}
        cache = self.feature_cache or ()
        broken = set()
        for path, error in _broken([p for p in self.pictures() if p not in cache]):
            if not (self.data_args.skip_bad_images and is_of_the_picture(error)):
                raise InputError(f"{self.name(owners[path])}: {error}") from error
            broken.add(path)
        readable = [i for i in range(len(self)) if broken.isdisjoint(self.paths(i))]
        if not readable:
            raise InputError(f"{self.source}: no record is left, none of its pictures can be read")
        kept = [i for i in readable if lengths[i].labelled]
        if not kept:
            cut = sum(lengths[i].cut for i in readable)
            raise InputError(
                f"{self.source}: there is nothing to learn in it: of {len(readable)} records, "
                f"{len(readable) - cut} have an empty answer, and of {cut} model_max_length "
                f"{self.tokenizer.model_max_length} cuts the answer off"
            )
        skipped, unlabelled = len(self) - len(readable), len(readable) - len(kept)
        self.records = [self.records[i] for i in kept]
        return CheckReport(len(kept), sum(lengths[i].cut for i in readable), skipped, unlabelled)

    def _length(self, index: int) -> _Length:
        """Whether the record's text is longer than the model takes, and what is left to learn."""
        segments = self._segments(index)
        limit, tokens = self.tokenizer.model_max_length, []
        for path in self.paths(index):
            with contextlib.suppress(InputError):  # a picture that cannot be read is told of later
                tokens.append(self._tokens_of(path))
        # A token is at least a byte of text, but for <s> and the space before the first word:
        # most records are seen to fit without being tokenised.
        at_most = 2 + sum(len(text.encode()) for text, _ in segments)
        if at_most + sum(tokens) <= limit or len(tokens) < len(self.paths(index)):
            return _Length(cut=False, labelled=any(learnt for _, learnt in segments))
        ids, labels = tokenize(segments, self.tokenizer)
        try:
            fitted, labels = fit(ids, labels, tokens, limit)
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from None
        cut = len(fitted) < len(ids) + sum(tokens) - len(tokens)
        return _Length(cut, bool((labels[1:] != IGNORE_INDEX).any()))


class _Length(NamedTuple):
    cut: bool
    labelled: bool


def _broken(paths: Sequence[str]) -> Iterator[tuple[str, InputError]]:
    """Those of `paths` that do not decode to the end, with the reason, in order."""

    def attempt(path: str) -> tuple[str, InputError] | None:
        try:
            open_image(path)
        except InputError as error:
            return path, error
        return None

    quiet = len(paths) <= 2000
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(paths), desc="checking pictures", disable=quiet) as bar,
    ):
        for start in range(0, len(paths), 1024):  # not all at once: map() queues all it is given
            for found in pool.map(attempt, paths[start : start + 1024]):
                bar.update()
                if found:
                    yield found


@dataclass
class DataCollatorForSupervisedDataset:
    """Makes a batch of items: pictures' tokens expanded, cut to model_max_length, padded right.

    Gives `input_ids`, `labels` (B, T) long and `attention_mask` (B, T) bool. The mask comes from
    lengths, so that a real `<unk>` in a text is not taken for padding where the two share an id.
    `label_positions` are the places in the flattened batch whose next label counts. If a row has
    pictures, `images` are all of them, one tensor or, when their shapes differ, a list; of tiles,
    `image_sizes` are the (width, height) of their pictures; and `image_positions`, the places of
    their tokens, all -200. Where a picture's number of tokens is not known (`SampleFormat`), it
    stays one -200, and neither kind of position is given.

    The positions are found here, in the loader's process, so that no device is waited for.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        limit = self.tokenizer.model_max_length
        tokens = [item.get("image_tokens", []) for item in items]
        expanded = all(count is not None for counts in tokens for count in counts)
        rows = [
            fit(item["input_ids"], item["labels"], [count or 1 for count in counts], limit)
            for item, counts in zip(items, tokens, strict=True)
        ]
        ids, labels = zip(*rows, strict=True)
        lengths = torch.tensor([len(row) for row in ids])
        pad = self.tokenizer.pad_token_id
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(list(ids), batch_first=True, padding_value=pad),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        }
        if expanded:
            following = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
            batch["label_positions"] = _places(following != IGNORE_INDEX)
        if images := [image for item in items for image in item.get("images", ())]:
            batch["images"] = stack_same(images)
            if sizes := [size for item in items for size in item.get("image_sizes", ())]:
                batch["image_sizes"] = sizes
            if expanded:
                batch["image_positions"] = _places(batch["input_ids"] == IMAGE_TOKEN_INDEX)
        return batch


def _places(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().flatten()


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase,
    data_args: Any,
    sample_format: SampleFormat | None = None,
) -> dict[str, Any]:
    """The three arguments that a Trainer needs: data sets for training and evaluation, collator.

    `eval_dataset` is None unless `data_args.eval_data_path` is set. See `LazySupervisedDataset` for
    the rest of `data_args`, and for `sample_format`.
    """

    def dataset(path: str) -> LazySupervisedDataset:
        return LazySupervisedDataset(path, tokenizer, data_args, sample_format=sample_format)

    if not data_args.data_path:
        raise InputError("--data_path is missing: a JSON file of LLaVA records to train on")
    evaluation = getattr(data_args, "eval_data_path", None)  # upstream has none
    return {
        "train_dataset": dataset(data_args.data_path),
        "eval_dataset": dataset(evaluation) if evaluation else None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }
