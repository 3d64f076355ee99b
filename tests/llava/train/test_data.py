import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaTokenizer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates, get_template
from llava.errors import InputError
from llava.mm_utils import tokenizer_image_token
from llava.pictures import LONGEST_SIDE
from llava.tiling import Tiling
from llava.train.data import (
    CheckReport,
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    load_records,
    make_supervised_data_module,
)
from llava.train.feature_cache import FeatureCache
from llava.train.preprocess import fit, preprocess_multimodal, read_turns, render, tokenize

GOLDEN_DIR = Path(__file__).parents[2] / "golden"
GOLDEN = json.loads((GOLDEN_DIR / "upstream_golden.json").read_text())["preprocess"]
UPSTREAM_TOKENS = json.loads((GOLDEN_DIR / "upstream_tokens.json").read_text())
CONVERSATIONS = {
    "image_one": ["Describe the image.\n<image>", "A random picture."],
    "image_two_rounds": ["Look <image> what is this?", "A cat.", "Sure?", "Yes."],
    "text": ["Hello, who are you?", "I am an assistant."],
    "multi": ["<image> and <image> differ?", "Yes."],
}
MAX_LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(GOLDEN_DIR / "toy_tokenizer.model", folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(
        folder, add_bos_token=True, legacy=False, pad_token="<unk>", model_max_length=MAX_LENGTH
    )


def answers(ids, labels):
    """The learnt tokens; every label is the token itself or masked."""
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    return [label for label in labels.tolist() if label != IGNORE_INDEX]


# -- text to ids and labels ------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in GOLDEN if "error" not in GOLDEN[name]])
def test_ids_and_labels_are_upstreams_where_upstream_is_right(case, tokenizer):
    golden = GOLDEN[case]
    version, conversation = case.split("/")
    template = get_template(version)
    turns = preprocess_multimodal(CONVERSATIONS[conversation], template)
    if conversation == "multi":  # upstream makes one picture of two, and so loses one
        assert golden["after_preprocess_multimodal"][0].count("<image>") == 1
        assert turns == CONVERSATIONS["multi"]
        ids, _ = tokenize(render(turns, template), tokenizer)
        assert (ids == IMAGE_TOKEN_INDEX).sum() == 2
        return
    assert turns == golden["after_preprocess_multimodal"]
    ids, labels = tokenize(render(turns, template), tokenizer)
    assert ids.tolist() == golden["input_ids"]
    if not golden["warning"]:
        assert labels.tolist() == golden["labels"]
        return
    # Here upstream's two ways of counting tokens disagree, and it masks a sound sample whole. Ours
    # learns what the assistant says and the mark that ends it, as upstream does elsewhere.
    assert set(golden["labels"]) == {IGNORE_INDEX}
    end = template.sep2 or template.sep
    said = "".join(f"{text}{end}" for text in CONVERSATIONS[conversation][1::2])
    learnt = tokenizer.decode(answers(ids, labels))
    assert learnt.replace(" ", "") == said.replace(" ", "")


@pytest.mark.parametrize("key", sorted(conv_templates))
def test_every_template_learns_the_answers_and_nothing_of_the_questions(key, tokenizer):
    template = get_template(key)
    turns = ["<image>\nQQQ", "RRR"] + ([] if "plain" in key else ["QQQ", "RRR"])
    ids, labels = tokenize(render(turns, template), tokenizer)
    learnt = tokenizer.decode(answers(ids, labels))
    masked = tokenizer.decode(ids[(labels == IGNORE_INDEX) & (ids >= 0)])
    assert learnt.count("RRR") == len(turns) // 2
    assert "QQQ" not in learnt
    assert "RRR" not in masked


@pytest.mark.parametrize("legacy", UPSTREAM_TOKENS["legacy"])
def test_a_token_after_a_picture_is_learnt_where_it_begins(legacy, upstream_tokenizer):
    tokenizer = upstream_tokenizer(legacy)
    answer = " red, \u00e9\U0001f642 </s> square\n"
    own = tokenizer_image_token(f"<image>{answer}", tokenizer)[2:]
    golden = zip(UPSTREAM_TOKENS["prompts"], UPSTREAM_TOKENS["legacy"][legacy], strict=True)
    for prompt, expected in golden:
        ids, labels = tokenize([(prompt, True)], tokenizer)
        assert ids.tolist() == expected
        learnt = [IGNORE_INDEX if i == IMAGE_TOKEN_INDEX else i for i in expected[1:]]
        assert labels.tolist()[1:] == learnt
        ids, labels = tokenize([(f"{prompt}<image>", False), (answer, True)], tokenizer)
        assert answers(ids, labels) == own == ids.tolist()[-len(own) :]
    ids, labels = tokenize([("<image> a", False), (" b", True), (" c</s> d", False)], tokenizer)
    assert tokenizer.decode(answers(ids, labels)).strip() == "b"


def test_ids_are_those_of_the_prompt_that_the_model_is_asked_with(tokenizer):
    for key in ("v1", "llava_llama_2", "mpt"):
        conv = get_template(key)
        turns = preprocess_multimodal(CONVERSATIONS["image_two_rounds"], conv)
        for i, text in enumerate(turns):
            conv.append_message(conv.roles[i % 2], text)
        ids, _ = tokenize(render(turns, get_template(key)), tokenizer)
        assert ids.tolist() == tokenizer_image_token(conv.get_prompt(), tokenizer)


def test_plain_keeps_the_picture_and_learns_the_caption_with_its_line_end(tokenizer):
    turns = preprocess_multimodal(
        ["What is this?\n<image>", "caf\u00e9 \U0001f34e"], get_template("plain")
    )
    ids, labels = tokenize(render(turns, get_template("plain")), tokenizer)
    assert ids[:2].tolist() == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX]
    assert labels[:2].tolist() == [IGNORE_INDEX] * 2
    assert labels[2:].equal(ids[2:])
    assert tokenizer.decode(ids[2:]) == "caf\u00e9 \U0001f34e\n"


def test_words_of_the_template_inside_the_text_confuse_nothing(tokenizer):
    turns = ["ASSISTANT: say USER: and </s> too", "USER: no </s> ASSISTANT: yes"]
    ids, labels = tokenize(render(turns, get_template("v1")), tokenizer)
    assert tokenizer.decode(answers(ids, labels)) == "USER: no </s> ASSISTANT: yes</s>"


def test_pictures_may_be_wrapped():
    v1, mmtag = get_template("v1"), get_template("v1_mmtag")
    assert preprocess_multimodal(["a <image>", "b"], mmtag) == ["<Image><image></Image>\na", "b"]
    wrapped = preprocess_multimodal(["a <image>"], v1, mm_use_im_start_end=True)
    assert wrapped == ["<im_start><image><im_end>\na"]
    assert preprocess_multimodal(["<image>"], v1) == ["<image>"]


def test_turns_are_read_strictly():
    human, gpt = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    assert read_turns([human, gpt]) == ["q", "a"]
    assert read_turns([gpt, human, gpt]) == ["q", "a"]  # as upstream: a greeting is dropped
    for turns, reason in (
        ([human, human], "turn 1 is from 'human', expected 'gpt'"),
        ([{"from": "bot", "value": "q"}, gpt], "turn 0 is from 'bot'"),
        ([human, {"from": "gpt"}], "turn 1 has no text"),
        ([human], "no question with an answer"),
        ([], "no question with an answer"),
        (["q", "a"], "not an object"),
    ):
        with pytest.raises(InputError, match=reason):
            read_turns(turns)
    for turns in (["<image>", "a", "b", "c"], ["no picture", "a"]):
        with pytest.raises(InputError, match="plain template"):
            render(turns, get_template("plain"))


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(InputError, match="SimpleNamespace"):
        tokenize([("text", True)], SimpleNamespace(is_fast=False))


def test_text_is_cut_but_never_a_picture():
    ids = torch.tensor([1, -200, 5, 6, 7])
    fitted, labels = fit(ids, ids, 3, 6)
    assert fitted.tolist() == [1, -200, -200, -200, 5, 6]
    assert labels.tolist() == [1, -100, -100, -100, 5, 6]
    assert len(fit(ids, ids, 3, 10**30)[0]) == 7
    with pytest.raises(InputError, match="model_max_length 3 .* takes 3, the whole sample 7"):
        fit(ids, ids, 3, 3)


# -- records and data sets -------------------------------------------------------------------------


def record(image, *turns, name="r"):
    made = {"id": name, "conversations": []}
    for i, text in enumerate(turns):
        made["conversations"].append({"from": ("human", "gpt")[i % 2], "value": text})
    return made if image is None else {**made, "image": image}


@pytest.fixture
def data_args(tmp_path):
    for name, color in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (40, 20), color).save(tmp_path / f"{name}.png")
    size = {"height": 32, "width": 32}
    return SimpleNamespace(
        data_path=None,
        eval_data_path=None,
        image_folder=str(tmp_path),
        image_aspect_ratio="pad",
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size),
        image_tokens=4,
        is_multimodal=True,
        mm_use_im_start_end=False,
        skip_bad_images=False,
        version="v1",
    )


RED = record("red.png", "<image>\nWhat is it?", "red", name="a")
BLUE = record("blue.png", "What is it?\n<image>", "blue it is", name="b")
TEXT = record(None, "Hello?", "Hi.", name="c")
Q = {"from": "human", "value": "q"}


def test_files_that_are_no_data_are_refused(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([RED, TEXT]))
    assert load_records(path) == [RED, TEXT]
    for content, reason in (
        ('{"a": 1}', "expected a list of records, found dict"),
        ("[1, ", "is not JSON"),
        ("[]", "holds no records"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[[]]", "record 0 is not an object"),
        (json.dumps([RED, {"id": "x7", "image": "y.png"}]), r"record 1 \(id 'x7'\).*conversations"),
        ('[{"conversations": "hello"}]', "record 0 has no list `conversations`"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=reason) as caught:
            load_records(path)
        assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="missing.json cannot be read: No such file"):
        load_records(tmp_path / "missing.json")


def test_items_and_their_batch(tokenizer, data_args):
    dataset = LazySupervisedDataset([RED, TEXT, BLUE], tokenizer, data_args)
    items = [dataset[i] for i in range(3)]
    assert items[0]["images"][0].shape == (3, 32, 32)
    assert "images" not in items[1]
    assert (items[0]["input_ids"] == IMAGE_TOKEN_INDEX).sum() == 1
    batch = DataCollatorForSupervisedDataset(tokenizer)(items)
    assert batch["images"].shape == (2, 3, 32, 32)
    assert batch["images"][1].equal(items[2]["images"][0])
    assert (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(dim=1).tolist() == [4, 0, 4]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert lengths == [len(item["input_ids"]) + 3 * ("images" in item) for item in items]
    for row, item, length in zip(range(3), items, lengths, strict=True):
        assert batch["attention_mask"][row, :length].all()
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
        learnt = answers(batch["input_ids"][row], batch["labels"][row])
        assert learnt == answers(item["input_ids"], item["labels"])
    assert "images" not in DataCollatorForSupervisedDataset(tokenizer)([items[1]])


def test_a_real_unk_is_not_padding(tokenizer):
    unk = torch.tensor([1, tokenizer.unk_token_id, 9])
    batch = DataCollatorForSupervisedDataset(tokenizer)([{"input_ids": unk, "labels": unk}])
    assert tokenizer.pad_token_id == tokenizer.unk_token_id  # upstream would mask the middle token
    assert batch["attention_mask"].tolist() == [[True, True, True]]


def test_pictures_of_several_shapes_come_as_a_list(tokenizer):
    ids = torch.tensor([1, -200])
    items = [
        {"input_ids": ids, "labels": ids, "images": [torch.zeros(n, 8)], "image_tokens": [n]}
        for n in (4, 4, 5)
    ]
    collate = DataCollatorForSupervisedDataset(tokenizer)
    assert collate(items[:2])["images"].shape == (2, 4, 8)
    assert [len(image) for image in collate(items)["images"]] == [4, 4, 5]


def test_lengths(tokenizer, data_args):
    empty = record(None, "", "")
    dataset = LazySupervisedDataset([RED, TEXT, empty], tokenizer, data_args)
    assert dataset.lengths == [128 + 5, 2, 0]
    # Upstream's assertion fails on an empty conversation; here it counts as one word.
    assert dataset.modality_lengths == [5, -2, -1]


def test_a_selection_shares_all_but_the_records(tokenizer, data_args):
    dataset = LazySupervisedDataset([RED, TEXT, BLUE], tokenizer, data_args)
    chosen = dataset.select([2, 0])
    assert [r["id"] for r in chosen.records] == ["b", "a"]
    assert len(dataset) == 3
    assert chosen.pictures() == [*dataset.paths(2), *dataset.paths(0)]
    assert chosen.tokenizer is dataset.tokenizer
    assert chosen.data_args is dataset.data_args
    assert len(dataset.select([])) == 0


def test_the_data_module(tmp_path, tokenizer, data_args):
    data_args.data_path, data_args.eval_data_path = tmp_path / "train.json", tmp_path / "eval.json"
    data_args.data_path.write_text(json.dumps([RED, BLUE]))
    data_args.eval_data_path.write_text(json.dumps([TEXT]))
    module = make_supervised_data_module(tokenizer, data_args)
    assert [len(module["train_dataset"]), len(module["eval_dataset"])] == [2, 1]
    data_args.eval_data_path = None
    assert make_supervised_data_module(tokenizer, data_args)["eval_dataset"] is None
    data_args.data_path = None
    with pytest.raises(InputError, match="--data_path is missing"):
        make_supervised_data_module(tokenizer, data_args)


def test_tiled_pictures_come_with_their_sizes_and_as_many_tokens_as_the_model_makes(
    tokenizer, data_args
):
    data_args.image_aspect_ratio = "anyres"
    data_args.image_grid_pinpoints = [[32, 64], [64, 32], [64, 64]]
    data_args.tiling = Tiling(((32, 64), (64, 32), (64, 64)), tile=32, side=2, merge="spatial")
    items = [LazySupervisedDataset([RED, TEXT], tokenizer, data_args)[i] for i in range(2)]
    with Image.open(data_args.image_folder + "/red.png") as image:
        size = image.size
    tiles = 1 + math.prod(data_args.tiling.grid(size))
    assert items[0]["images"][0].shape == (tiles, 3, 32, 32)
    batch = DataCollatorForSupervisedDataset(tokenizer)(items)
    assert batch["image_sizes"] == [size]
    assert batch["images"].shape == (1, tiles, 3, 32, 32)
    assert (batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(1).tolist() == [4 * tiles, 0]


def test_unknown_tiles_are_refused_at_once(tokenizer, data_args):
    data_args.image_aspect_ratio = "anyres_max_9"
    with pytest.raises(InputError, match="'anyres_max_9'; known are"):
        LazySupervisedDataset([RED], tokenizer, data_args)


def test_several_pictures_in_one_sample(tokenizer, data_args):
    two = record(["red.png", "blue.png"], "<image> or <image>, which is red?", "The first.")
    later = record(["red.png", "blue.png"], "<image>\nThis?", "red", "And <image>?", "blue")
    dataset = LazySupervisedDataset([two, TEXT, later], tokenizer, data_args)
    assert dataset.check().samples == 3
    assert len(dataset.pictures()) == 2
    batch = DataCollatorForSupervisedDataset(tokenizer)([dataset[i] for i in range(3)])
    assert batch["images"].shape[0] == 4
    assert batch["images"][0].equal(batch["images"][2])
    ids = batch["input_ids"]
    assert (ids == IMAGE_TOKEN_INDEX).sum(1).tolist() == [8, 0, 8]
    assert (ids.flatten()[batch["image_positions"]] == IMAGE_TOKEN_INDEX).all()
    assert len(batch["image_positions"]) == 16
    text = [token for token in ids[0].tolist() if token not in (IMAGE_TOKEN_INDEX, 0)]
    assert "or" in tokenizer.decode(text)


def test_label_positions_are_those_whose_next_label_counts(tokenizer, data_args):
    dataset = LazySupervisedDataset([RED, TEXT], tokenizer, data_args)
    batch = DataCollatorForSupervisedDataset(tokenizer)([dataset[0], dataset[1]])
    labels = batch["labels"]
    found = labels.flatten()[batch["label_positions"] + 1]
    assert found.tolist() == [x for row in labels for x in row[1:].tolist() if x != IGNORE_INDEX]


# -- the check before training ---------------------------------------------------------------------


def test_sound_data_pass_and_long_text_is_counted(tokenizer, data_args):
    long = record("red.png", "<image>\nSay much.", "word " * MAX_LENGTH, name="long")
    dataset = LazySupervisedDataset([RED, long, TEXT, BLUE, long], tokenizer, data_args)
    assert dataset.check() == CheckReport(samples=5, truncated=2, skipped=0)
    item = DataCollatorForSupervisedDataset(tokenizer)([dataset[1]])
    assert item["input_ids"].shape == (1, MAX_LENGTH)


def test_a_text_that_just_fits_is_not_counted(tokenizer, data_args):
    def report(words):
        long = record("red.png", "<image>\nSay.", "a" + " a" * words)
        dataset = LazySupervisedDataset([long], tokenizer, data_args)
        return len(dataset[0]["input_ids"]) + 3, dataset.check().truncated

    length, _ = report(100)
    fits = 100 + MAX_LENGTH - length  # each further word is one token
    assert report(fits) == (MAX_LENGTH, 0)
    assert report(fits + 1) == (MAX_LENGTH + 1, 1)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("red.png", "No mention.", "x"), "one picture, but its text says `<image>` 0 times"),
        (record("red.png", "<image> <image>", "x"), "says `<image>` 2 times"),
        (record(None, "<image>", "x"), "no picture, but its text says `<image>` 1 times"),
        (record("red.png", "<image>", "x", "y"), None),
        ({"conversations": [Q, {"from": "gpt", "value": 5}]}, "turn 1 has no text: `value` is 5"),
        ({"conversations": [Q, {"from": "gpt", "value": None}]}, "`value` is None"),
        ({"conversations": [Q, {"from": None, "value": "x"}]}, "turn 1 is from None"),
        ({"conversations": [Q, math.nan]}, "a turn of `conversations` is not an object"),
        (record("red\0.png", "<image>", "x"), "cannot be read: embedded null byte"),
        (record("red.png", "<image>"), "no question with an answer"),
        (
            record(["red.png", "red.png"], "<image>", "x"),
            "it has 2 pictures, but its text says `<image>` 1 times",
        ),
        (record(["red.png", 7], "<image>", "x"), "expected a path or a list of paths"),
        (record([], "<image>", "x"), "expected a path or a list of paths"),
        (record("gone.png", "<image>", "x"), "gone.png cannot be read: no such file"),
    ],
)
def test_bad_samples_are_named(tokenizer, data_args, bad, reason):
    bad = {**bad, "id": "bad one"}
    dataset = LazySupervisedDataset([RED, bad], tokenizer, data_args)
    if reason is None:  # odd, but sound: the picture comes first, an unanswered question is masked
        assert dataset.check().samples == 2
        return
    with pytest.raises(InputError, match=r"the given records: record 1 \(id 'bad one'\)") as caught:
        dataset.check()
    assert reason in str(caught.value)


@pytest.mark.parametrize("version", ["v0", "v1", "plain", "mpt", "llava_llama_2"])
def test_samples_that_teach_nothing_are_left_out_and_counted(version, tokenizer, data_args):
    data_args.version = version
    empty = [record("red.png", "<image>\nWhat is it?", text, name="empty") for text in ("", " \n")]
    asked = record("red.png", "<image>\n" + "long " * MAX_LENGTH, "x", name="cut")
    given = [RED, *empty, BLUE] + ([asked] if version in ("v1", "mpt", "llava_llama_2") else [])
    dataset = LazySupervisedDataset(given, tokenizer, data_args)
    for i, item in enumerate(given):
        _, labels = fit(dataset[i]["input_ids"], dataset[i]["labels"], 4, MAX_LENGTH)
        assert (labels != IGNORE_INDEX).any() == (item in (RED, BLUE)), item
    report = dataset.check()
    cut = int(asked in given)
    assert report == CheckReport(2, truncated=cut, skipped=0, unlabelled=2 + cut)
    assert dataset.records == [RED, BLUE]


def test_data_that_teach_nothing_are_an_error(tokenizer, data_args):
    empty = record("red.png", "<image>\nWhat is it?", "")
    asked = record("red.png", "<image>\n" + "long " * MAX_LENGTH, "x", name="cut")
    with pytest.raises(InputError, match="^the given records: there is nothing to learn") as caught:
        LazySupervisedDataset([empty, asked, empty], tokenizer, data_args).check()
    assert "of 3 records, 2 have an empty answer, and of 1 model_max_length 256" in str(
        caught.value
    )


def test_one_answer_of_two_is_enough(tokenizer, data_args):
    half = record("red.png", "<image>\nWhat?", "", "Sure?", "Yes.")
    dataset = LazySupervisedDataset([half], tokenizer, data_args)
    assert dataset.check() == CheckReport(1, truncated=0, skipped=0)
    ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    assert tokenizer.decode(answers(ids, labels)) == "Yes.</s>"
    assert (ids == tokenizer.eos_token_id).sum() == 2  # the empty one ends as well


def test_half_an_emoji_is_named(tmp_path, tokenizer, data_args):
    whole = record("red.png", "<image>", "\U0001f353 strawberry", name="whole")
    half = record("red.png", "<image>", "strawberry \ud83c", name="half")
    path = tmp_path / "data.json"
    path.write_text(json.dumps([whole, half]))
    message = r"record 1 \(id 'half'\) has half a character in 'strawberry \\ud83c'"
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}"):
        load_records(path)
    with pytest.raises(InputError, match=f"^the given records: {message}"):
        LazySupervisedDataset([whole, half], tokenizer, data_args)
    for odd in ({**whole, "domain": "\udc53"}, {**whole, "\udc53": 1}, {**whole, "id": ["\udc53"]}):
        with pytest.raises(InputError, match=r"record 0 .* has half a character in '\\udc53'"):
            LazySupervisedDataset([odd], tokenizer, data_args)
    path.write_text(json.dumps([whole]))  # with both halves as escapes
    assert load_records(path) == [whole]


def test_json_nested_too_deep_is_named(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    with pytest.raises(InputError, match=r"deep.json"):
        load_records(path)


def test_a_picture_that_does_not_fit_is_an_error(tokenizer, data_args):
    data_args.image_tokens = MAX_LENGTH
    dataset = LazySupervisedDataset([TEXT, RED], tokenizer, data_args)
    with pytest.raises(InputError, match=r"record 1 \(id 'a'\): model_max_length 256 cuts off"):
        dataset.check()


def test_plain_needs_pictures_and_text_runs_have_none(tokenizer, data_args):
    data_args.version = "plain"
    with pytest.raises(InputError, match=r"record 0 \(id 'c'\): the plain template"):
        LazySupervisedDataset([TEXT], tokenizer, data_args).check()
    data_args.version, data_args.is_multimodal = "v1", False
    assert LazySupervisedDataset([TEXT], tokenizer, data_args).check().samples == 1
    with pytest.raises(InputError, match="the run has no vision tower"):
        LazySupervisedDataset([RED], tokenizer, data_args).check()
    data_args.version = "v11"
    with pytest.raises(InputError, match="did you mean v1"):
        LazySupervisedDataset([TEXT], tokenizer, data_args)


def test_bad_pictures_are_skipped_and_counted_on_demand(tmp_path, tokenizer, data_args):
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 1000)
    cut = record("cut.png", "<image>", "x", name="cut")
    gone = record("gone.png", "<image>", "long " * MAX_LENGTH, name="gone")
    given = [RED, cut, gone, TEXT, cut]
    with pytest.raises(
        InputError, match=r"record 1 \(id 'cut'\): picture .*cut.png cannot be read"
    ):
        LazySupervisedDataset(given, tokenizer, data_args).check()
    data_args.skip_bad_images = True
    dataset = LazySupervisedDataset(given, tokenizer, data_args)
    assert dataset.check() == CheckReport(samples=2, truncated=0, skipped=3)
    assert dataset.records == [RED, TEXT]
    assert len(given) == 5
    with pytest.raises(InputError, match="no record is left"):
        LazySupervisedDataset([cut, gone], tokenizer, data_args).check()


def test_a_disk_that_fails_is_no_bad_picture(tmp_path, tokenizer, data_args):
    # Reading a process's memory at address 0 is an input/output error, as of a failing disk.
    (tmp_path / "disk.png").symlink_to("/proc/self/mem")
    data_args.skip_bad_images = True
    given = [RED, record("disk.png", "<image>", "x", name="disk")]
    with pytest.raises(InputError, match=r"\(id 'disk'\): .*disk.png cannot be read.*Errno 5"):
        LazySupervisedDataset(given, tokenizer, data_args).check()


def test_deep_pictures_are_learnt_from_or_left_out_by_name(tmp_path, tokenizer, data_args):
    ramp = np.arange(256)[None].repeat(64, 0)
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "plain.png")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    Image.new("1", (1, LONGEST_SIDE + 1)).save(tmp_path / "long.png")
    names = ("plain.png", "deep.png", "float.tif", "long.png")
    given = [record(name, "<image>", "x", name=name) for name in names]
    dataset = LazySupervisedDataset(given, tokenizer, data_args)
    plain, deep = (dataset[i]["images"][0] for i in range(2))
    assert torch.allclose(plain, deep, atol=4 / 255)
    assert plain.std() > 0.1
    with pytest.raises(InputError, match=r"record 2 \(id 'float.tif'\): picture .*from 0 to 255"):
        dataset.check()
    data_args.skip_bad_images = True
    assert dataset.check() == CheckReport(samples=2, truncated=0, skipped=2)


def test_cached_features_stand_in_for_the_picture(tmp_path, tokenizer, data_args):
    def encode(pixels):
        return pixels.flatten(2).transpose(1, 2)[:, :4] + 1

    def preprocess(path):
        return LazySupervisedDataset([RED], tokenizer, data_args)[0]["images"][0]

    cache = FeatureCache(encode, preprocess, "key", limit_bytes=10**6)
    dataset = LazySupervisedDataset([RED, BLUE], tokenizer, data_args, feature_cache=cache)
    cache.prefetch(dataset.pictures()[:1])
    assert dataset[0]["images"][0].shape == (4, 3)
    assert dataset[1]["images"][0].shape == (3, 32, 32)
    images = DataCollatorForSupervisedDataset(tokenizer)([dataset[0], dataset[1]])["images"]
    assert [image.ndim for image in images] == [2, 3]
    # What lies in the cache has been decoded; the check reads only the others.
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava.train.data.open_image", opened.append)
        dataset.check()
    assert opened == dataset.paths(1)
