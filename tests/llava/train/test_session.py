"""Loading a session reads the parsed flags and writes nothing into them."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from llava.conversation import get_template
from llava.errors import InputError
from llava.train.arguments import DataArguments, parse
from llava.train.data import make_supervised_data_module
from llava.train.distributed import start_process_group
from llava.train.sample_format import SampleFormat
from llava.train.session import load_session, training_config
from llava.train.train import make_trainer, train


def contents(arguments):
    return [copy.deepcopy(vars(part)) for part in arguments]


@pytest.mark.parametrize(
    "changes",
    [{}, {"image_aspect_ratio": "anyres"}, {"tune_mm_mlp_adapter": False, "lora_enable": True}],
    ids=["projector", "tiles", "lora"],
)
def test_nothing_is_written_into_the_arguments(flags, tiny, changes):
    arguments = parse(flags(data_path=tiny / "a.json", version="v1", **changes))
    before = contents(arguments)
    session = load_session(*arguments)
    data = make_supervised_data_module(session.tokenizer, arguments[1], session.sample_format)
    trainer = make_trainer(session, arguments[2], **data)
    assert trainer.saves_part
    after = contents(arguments)
    # A device is looked up, and the Trainer's own bookkeeping done, when first asked for.
    assert [part.keys() for part in after[:2]] == [part.keys() for part in before[:2]]
    assert after[:2] == before[:2]
    fields = {field.name for field in dataclasses.fields(arguments[2])}
    assert {n: str(v) for n, v in after[2].items() if n in fields} == {
        n: str(v) for n, v in before[2].items() if n in fields
    }
    assert {n for n in after[2].keys() - before[2].keys() if not n.startswith("_")} <= {
        "distributed_state", "deepspeed_plugin"
    }  # fmt: skip


def test_a_session_and_its_sample_format_are_frozen(flags, tiny):
    session = load_session(*parse(flags(data_path=tiny / "a.json")))
    found = session.sample_format
    assert (found.version, found.is_multimodal, found.image_tokens) == ("plain", True, 4)
    assert (found.image_aspect_ratio, found.tiling) == ("square", None)
    assert found.image_processor is session.model.get_vision_tower().image_processor
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.version = "v1"
    with pytest.raises(dataclasses.FrozenInstanceError):
        session.tokenizer = None


def test_a_format_is_read_from_what_programs_for_upstream_fill(flags):
    data_args = parse(flags())[1]
    data_args.version, data_args.mm_use_im_start_end = "v1", True
    data_args.is_multimodal = True
    found = SampleFormat.of_arguments(data_args)
    expected = SampleFormat("v1", is_multimodal=True, image_tokens=None, mm_use_im_start_end=True)
    assert found == expected
    version = SampleFormat.of_arguments(DataArguments()).version
    assert get_template(version).get_prompt() == get_template("vicuna_v1").get_prompt()


def test_a_text_run_on_a_projectors_folder_saves_the_whole_model(flags, tiny, tmp_path):
    """What a folder's config says of the run that made it, says nothing of this one."""
    full = {"data_path": tiny / "a.json", "tune_mm_mlp_adapter": False, "version": "v1"}
    train(argv=flags(**full, max_steps=1, output_dir=tmp_path / "full"))
    config = json.loads((tmp_path / "full/config.json").read_text())
    for key in ("mm_vision_tower", "mm_projector_type"):
        del config[key]
    config["tune_mm_mlp_adapter"] = True
    (tmp_path / "full/config.json").write_text(json.dumps(config))
    read = training_config(
        *parse(flags(**full, model_name_or_path=tmp_path / "full", vision_tower=None))
    )
    assert read.tune_mm_mlp_adapter is False


def test_parsing_starts_no_process_group(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    started = []
    monkeypatch.setattr("deepspeed.init_distributed", started.append)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    file = tmp_path / "zero2.json"
    file.write_text("{")
    with pytest.raises(InputError, match="this is not JSON"):
        start_process_group(["--deepspeed", str(file)])
    file.write_text("{}")
    start_process_group(["--output_dir", "x"])
    assert started == []
    start_process_group([f"--deepspeed={file}"])
    assert started == ["nccl" if torch.cuda.is_available() else "gloo"]
