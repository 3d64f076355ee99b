"""The rows of `<im_start>` and `<im_end>`: trained with the projector, saved, and read again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fed import state
from fed.merge import merge
from fed.train import train as fed_train
from llava.errors import InputError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import projector_state
from llava.model.checkpoint_names import PROJECTOR_FILE, ROWS
from llava.model.shards import Shards
from llava.model.tokenizer import load_tokenizer
from llava.model.trainable_part import ProjectorPart
from llava.train.arguments import parse
from llava.train.session import load_session
from llava.train.train import train

PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def llm(tiny, tmp_path_factory) -> Path:
    """A language model without a row to spare."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llm"
    shutil.copytree(tiny / "llm", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(load_tokenizer(str(folder))))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def marked(flags, tiny, llm):
    """The flags of a projector-only run with start and end tokens; as `flags`."""

    def make(**changes) -> list[str]:
        values = {"version": "v1", "mm_use_im_start_end": True, "data_path": tiny / "a.json",
                  "model_name_or_path": llm}  # fmt: skip
        return flags(**{**values, **changes})

    return make


def load(folder: Path, base: Path | None):
    """Model and ids of start and end token."""
    tokenizer, model, _, _ = load_pretrained_model(
        str(folder), base and str(base), "any", device="cpu"
    )
    return model, tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    asked = torch.tensor([[1, 40, ids[0], -200, ids[1], 31, 32]])
    return model.eval()(input_ids=asked, images=PIXELS).logits


def rows_of(model, ids: list[int]) -> torch.Tensor:
    return model.get_input_embeddings().weight[ids].detach()


@pytest.mark.parametrize("patch", [False, True])
def test_they_train_and_are_loaded(marked, llm, tmp_path, patch):
    flags = dict(mm_use_im_patch_token=patch)
    train(argv=marked(**flags))
    saved = state.load(tmp_path / "out" / PROJECTOR_FILE)
    assert saved[ROWS].shape == (2, 48)  # which upstream reads as it reads a whole table
    model, ids = load(tmp_path / "out", llm)
    weight = model.get_input_embeddings().weight.detach()
    start = Shards(llm)[ROWS]
    assert ids == [len(start) + patch, len(start) + patch + 1]
    assert len(weight) == ids[1] + 1
    assert torch.equal(weight[ids], saved[ROWS])
    assert (weight[ids] - start.mean(0)).abs().amax(1).min() > 1e-3
    assert torch.equal(weight[: len(start)], start)  # nothing else of it has moved

    # What was trained is what answers, and what training goes on from.
    flags["pretrain_mm_mlp_adapter"] = tmp_path / "out" / PROJECTOR_FILE
    again = load_session(*parse(marked(**flags))).model
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    train(argv=marked(**flags, output_dir=tmp_path / "still", learning_rate=0))
    still = state.load(tmp_path / "still" / PROJECTOR_FILE)
    assert all(torch.equal(still[name], saved[name]) for name in saved)


def test_a_table_that_is_the_head_too_stays_as_it_is(marked, tiny, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny / "llm", tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    load_tokenizer(str(tiny / "llm")).save_pretrained(tmp_path / "tied")
    train(argv=marked(model_name_or_path=tmp_path / "tied", max_steps=1))
    assert ROWS not in state.load(tmp_path / "out" / PROJECTOR_FILE)


def test_a_run_goes_on_to_the_bit(marked, tmp_path):
    train(argv=marked(**SAVING))
    out = tmp_path / "out"
    whole = (out / PROJECTOR_FILE).read_bytes()
    (out / PROJECTOR_FILE).unlink()
    shutil.rmtree(out / "checkpoint-6")
    train(argv=marked(**SAVING))
    assert (out / PROJECTOR_FILE).read_bytes() == whole


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("way", ["projector", "lora", "full"])
def test_pretrained_rows_are_taken(marked, llm, tmp_path, way, whole):
    """Two by themselves, or a whole table as upstream writes it, of which the last two count."""
    session = load_session(*parse(marked()))
    count = len(session.tokenizer) if whole else 2
    rows = torch.randn(count, 48, generator=torch.Generator().manual_seed(1))
    state.save({**projector(session), ROWS: rows}, tmp_path / "start.bin")
    changes = {
        "projector": {},
        "lora": {"tune_mm_mlp_adapter": False, "lora_enable": True, "lora_r": 4},
        "full": {"tune_mm_mlp_adapter": False},
    }[way]
    argv = marked(**changes, pretrain_mm_mlp_adapter=tmp_path / "start.bin", learning_rate=0,
                  max_steps=1)  # fmt: skip
    expected = logits(load_session(*parse(argv)).model, (ids := ids_of(session)))
    train(argv=argv)
    model, _ = load(tmp_path / "out", None if way == "full" else llm)
    torch.testing.assert_close(rows_of(model, ids), rows[-2:])
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


def ids_of(session) -> list[int]:
    return session.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])


def projector(session) -> state.State:
    return {n: t for n, t in projector_state(session.model).items() if n != ROWS}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.ones(2, 47), r"has shape \(2, 47\), expected \(2, 48\)"),
        (torch.ones(7, 48), r"has shape \(7, 48\), expected \(2, 48\)"),
        (torch.full((2, 48), float("nan")), "has 96 NaN"),
        (torch.ones(0), "is empty"),
    ],
)
def test_rows_of_something_else_are_refused(marked, tmp_path, rows, said):
    session = load_session(*parse(marked()))
    state.save({**projector(session), ROWS: rows}, tmp_path / "start.bin")
    with pytest.raises(InputError, match=f"start.bin: tensor {ROWS} {said}"):
        load_session(*parse(marked(pretrain_mm_mlp_adapter=tmp_path / "start.bin")))


def test_without_the_flag_an_embedding_is_passed_over(marked, tmp_path):
    session = load_session(*parse(marked()))
    state.save({**projector(session), ROWS: torch.ones(7, 48)}, tmp_path / "start.bin")
    argv = marked(pretrain_mm_mlp_adapter=tmp_path / "start.bin", mm_use_im_start_end=False)
    assert (load_session(*parse(argv)).model.get_input_embeddings().weight != 1).all()


def test_rounds_carry_them(marked, tiny, llm, tmp_path):
    fed_train(marked(data_path=None, fed_clients=tiny / "clients.yaml", fed_rounds=2))
    merged = state.load(tmp_path / "out" / PROJECTOR_FILE)[ROWS]
    model, ids = load(tmp_path / "out", llm)
    assert torch.equal(rows_of(model, ids), merged)
    assert (merged - Shards(llm)[ROWS].mean(0)).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("saved", ["two", "a whole table", "none"])
def test_a_client_may_save_them_as_upstream_does(marked, tmp_path, saved):
    like = ProjectorPart().of_model(load_session(*parse(marked())).model)
    assert like[ROWS].shape == (2, 48)
    rows = torch.randn(2 if saved == "two" else 9, 48)
    left = {n: t for n, t in like.items() if n != ROWS} | ({} if saved == "none" else {ROWS: rows})
    state.save(left, tmp_path / PROJECTOR_FILE)
    found = ProjectorPart().read(tmp_path, like)
    assert torch.equal(found[ROWS], like[ROWS] if saved == "none" else rows[-2:])


def test_a_merge_averages_them(marked, tmp_path):
    for seed in (1, 2):
        train(argv=marked(seed=seed, output_dir=tmp_path / f"{seed}"))
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out", method="linear")
    one, two, both = (state.load(tmp_path / n / PROJECTOR_FILE)[ROWS] for n in ("1", "2", "out"))
    torch.testing.assert_close(both, (one + two) / 2)
