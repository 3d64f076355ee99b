"""VQA's rule for comparing answers, and TextVQA's accuracy by it.

The rule is that of the VQA challenge's evaluation (Antol et al. 2015), with its slips: published
numbers depend on them. It is upstream's too, so numbers compare.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from llava.errors import InputError

NUMBERS = dict(
    zip("none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(), strict=True)
)  # fmt: skip
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_CONTRACTED = """\
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""

CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A word with one apostrophe left out, and the word. (The last pair is a slip of the original.)"""


class EvalAIAnswerProcessor:
    """Brings answers that mean the same to one form: `processor("Two dogs!")` is `2 dogs`."""

    def __call__(self, item: str) -> str:
        text = item.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
        text = self._without_punctuation(re.sub(r"[\n\t]", " ", text).strip())
        words = [NUMBERS.get(word, word) for word in text.lower().split()]
        return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

    @staticmethod
    def _without_punctuation(text: str) -> str:
        """A mark beside a space goes, one between letters becomes a space; points go unless a digit
        follows.
        """
        out = text
        for mark in PUNCTUATION:
            beside_space = f"{mark} " in text or f" {mark}" in text
            out = out.replace(mark, "" if beside_space else " ")
        return re.sub(r"\.(?!\d)", "", out)


class TextVQAAccuracyEvaluator:
    """The accuracy of answers of which ten people's are known."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def score(self, answer: str, people: Sequence[str]) -> float:
        """min(1, n / 3), n being how many others of the ten agree, averaged over leaving out each.

        Raises:
            InputError: the people are not ten.
        """
        if len(people) != 10:
            raise InputError(f"TextVQA's accuracy takes 10 people's answers, found {len(people)}")
        given = Counter(map(self.answer_processor, people))[self.answer_processor(answer)]
        with_one_less = given * min(1, (given - 1) / 3)
        return (with_one_less + (10 - given) * min(1, given / 3)) / 10

    def eval_pred_list(self, pred_list: Sequence[dict]) -> float:
        """The mean score of `{"pred_answer", "gt_answers"}`."""
        scores = [self.score(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list]
        return sum(scores) / len(scores)
