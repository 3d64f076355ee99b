"""LLaVA's mix665k by task: which task a record is of.

The mix does not say which data set a record is from. Its picture's folder does, and where data
sets share a folder, the wording of its first question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fed.data.reading import LlavaJson
from fed.data.samples import Sample
from llava.errors import InputError
from llava.suggest import did_you_mean

REGION = (
    "Please provide a short description for this region",
    "Please provide the bounding box coordinate of the region this sentence describes",
)
CAPTION = "Provide a one-sentence caption for the provided image"
LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
DETAIL = (
    "Analyze the image in a comprehensive and detailed manner.",
    "Can you describe the main features of this image for me?",
    "Can you elaborate on the elements of the picture provided?",
    "Describe the following image.",
    "Explain the visual content of the image in great detail.",
    "What are the key elements in this picture?",
    "What do you see happening in this image?",
    "What do you think is going on in this snapshot?",
    "What is this photo about'?",  # so in the data
    "What's happening in the scene?",
    "Write a detailed description of the given image.",
)
"""The requests of LLaVA-Instruct's detailed descriptions, each of which is one turn."""

TASKS: dict[str, tuple[str, Callable[[str, int], bool]]] = {
    "gqa": ("gqa", lambda question, turns: True),
    "ocr-vqa": ("ocr_vqa", lambda question, turns: True),
    "textcaps": ("textvqa", lambda question, turns: question.startswith(CAPTION)),
    "vg": ("vg", lambda question, turns: question.startswith(REGION)),
    "refcoco": ("coco", lambda question, turns: question.startswith(REGION)),
    "a-okvqa": ("coco", lambda question, turns: question.endswith(LETTER)),
    "vqa": ("coco", lambda question, turns: question.endswith(WORD)),
    "coco-detail": ("coco", lambda question, turns: turns == 2 and question in DETAIL),
    "llava-instruct": ("coco", lambda question, turns: True),
}
"""Name → folder, and whether a first question (of a talk of so many turns) is of it; the first
that fits counts."""


def check_tasks(names: Sequence[str]) -> None:
    """`InputError` for a name that no task has, or that comes twice."""
    for name in names:
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise InputError(
                f"--tasks {name}: unknown{did_you_mean(name, TASKS)}; known are {known}"
            )
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"--tasks: {doubled[0]} comes twice")


def task_of(record: dict[str, Any]) -> str:
    """A name of `TASKS`; `text` of a record without a picture, `other` of what fits none."""
    if "image" not in record:
        return "text"
    folder, turns = _picture(record).split("/")[0], record["conversations"]
    question = turns[0]["value"].replace("<image>", "").strip()
    for name, (place, fits) in TASKS.items():
        if place == folder and fits(question, len(turns)):
            return name
    return "other"


def _picture(record: dict[str, Any]) -> str:
    """The path of the (first) picture."""
    image = record["image"]
    return image[0] if isinstance(image, list) else image


def _identity(path: str) -> str:
    """Equal for the same picture: GQA's are Visual Genome's, under the same file names."""
    folder, _, rest = path.partition("/")
    return f"vg/{rest.rpartition('/')[2]}" if folder in ("gqa", "vg") else path


class Mix(LlavaJson):
    """The mix's records of some tasks; the others are counted, and their pictures may be missing.

    A sample's fields have its `task`, and `picture`, which is the same for the same picture.
    """

    def __init__(
        self, path: str, image_folder: str, tasks: Sequence[str], skip_bad: bool, decode: bool
    ) -> None:
        super().__init__(path, image_folder, skip_bad=skip_bad, decode=decode)
        self.tasks = tasks
        self.counts: Counter[str] = Counter()
        """Records by task, of all tasks, as the last pass has found them."""

    def read(self, check: bool) -> Iterator[Sample | None]:
        self.counts = Counter()
        yield from super().read(check)
        if not any(self.counts[task] for task in self.tasks):
            there = ", ".join(f"{task} {count}" for task, count in self.counts.most_common())
            raise InputError(f"{self.path}: no record is of {', '.join(self.tasks)}; of: {there}")

    def _sample(self, index: int, record: Any) -> Sample | None:
        if isinstance(record, dict) and "image" not in record:
            self.counts["text"] += 1
            return None
        sample = super()._sample(index, record)
        assert sample is not None  # only this class passes records over
        task = task_of(sample.record)
        self.counts[task] += 1
        if task not in self.tasks:
            return None
        sample.fields |= {"task": task, "picture": _identity(_picture(sample.record))}
        return sample
