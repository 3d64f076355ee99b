"""What decides the result is a list of names; every flag of ours is on it or known not to be."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import transformers

from fed.arguments import FedArguments, declared, own_flags
from fed.drivers.driver import get, names
from llava.errors import InputError
from llava.model.multimodal_projector.connector import connector_flags
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.private_arguments import PrivacyArguments
from llava.train.settings import (
    BEST,
    CONTENT,
    DECIDING,
    check_same,
    difference,
    fingerprint,
    training_settings,
)

ROOT = Path(__file__).parents[3]
CONNECTORS = connector_flags()  # all of theirs decide
FED_DECIDING = FedArguments.DECIDING.union(
    *(of for name in names() for of in declared(get(name).flags or object, "DECIDING"))
)
OF_DRIVERS = [field for name in names() for field in own_flags(get(name))]
OWN = (
    ModelArguments,
    DataArguments,
    TrainingArguments,
    FedArguments,
    PrivacyArguments,
    *CONNECTORS,
)

# Ours that do not decide: where things lie, what is measured or said, how a machine does its part.
NOT_DECIDING = set(
    "eval_data_path is_multimodal feature_cache feature_cache_gb output_dir cache_dir report_to "
    "mpt_attn_impl attn_implementation remove_unused_columns "
    "gguf_file "  # it becomes part of the path of the model
    "fed_clients fed_options "  # by what is in them
    "fed_eval_data_path fed_eval_image_folder fed_eval_domain fed_eval_every fed_driver "
    "fed_client_timeout fed_client_retries fed_parallel_clients fed_min_clients "
    "fed_courier fed_remote_kit fed_eval_explained fed_job_gb".split()
)
# Those of transformers, as patterns: the pinned release has no field beside these and DECIDING.
NOT_DECIDING_THERE = re.compile(
    "(logging|log|save|eval|hub|push|ddp|torch_compile|skip_memory|include|trackio)_.*|"
    "dataloader_(?!drop_last).*|torch_compile|run_name|project|disable_tqdm|local_rank|use_cpu|"
    "per_device_eval_batch_size|(bf16|fp16)_full_eval|prediction_loss_only|batch_eval_metrics|"
    "metric_for_best_model|greater_is_better|label_names|do_(train|eval|predict)|debug|use_cache|"
    "resume_from_checkpoint|restore_callback_states_from_checkpoint|enable_jit_checkpoint|"
    "(gradient|activation)_checkpointing.*|torch_empty_cache_steps|accelerator_config|"
    "_n_gpu|deepspeed_plugin"
)
# Names that only other releases of transformers have.
ELSEWHERE = {"warmup_ratio", "group_by_length"}


def own_fields(kind: type) -> set[str]:
    """The fields that a dataclass of ours adds, or sets anew."""
    return {f.name for f in dataclasses.fields(kind)} & set(kind.__annotations__)


def test_every_flag_of_ours_decides_or_is_known_not_to():
    ours = {field.name for field in OF_DRIVERS}.union(*(own_fields(kind) for kind in OWN))
    decide = DECIDING | FED_DECIDING | set(CONTENT)
    decide |= {field.name for kind in CONNECTORS for field in dataclasses.fields(kind)}
    assert ours - decide - NOT_DECIDING == set()
    assert decide & NOT_DECIDING == set()
    assert NOT_DECIDING - ours == set()


def test_every_name_on_the_list_is_a_flag():
    there = {field.name for kind in OWN for field in dataclasses.fields(kind)}
    there |= {field.name for field in OF_DRIVERS}
    assert (DECIDING | FED_DECIDING | BEST | set(CONTENT)) - there - ELSEWHERE == set()


def test_the_pinned_transformers_has_no_flag_that_nobody_thought_of():
    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    names -= DECIDING | set(CONTENT) | NOT_DECIDING
    new = {name for name in names if not NOT_DECIDING_THERE.fullmatch(name)}
    pinned = re.findall(r"^transformers==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.M)
    if transformers.__version__ in pinned:
        assert new == set()
    elif new:  # of a release that nobody has looked at: users are not to be stopped by it
        warnings.warn(f"transformers {transformers.__version__} has {sorted(new)}", stacklevel=1)


def test_a_flag_of_a_later_transformers_parts_no_run_from_itself():
    @dataclasses.dataclass
    class Later(TrainingArguments):
        telepathy: bool = dataclasses.field(default=False)

    model_args, data_args, now = parse(["--output_dir", "x"])
    later = training_settings(model_args, data_args, Later(output_dir="x", use_cpu=True))
    assert later == training_settings(model_args, data_args, now)


def test_a_setting_that_one_version_lacks_is_no_difference():
    assert difference({"--a": "1", "--old": "x"}, {"--a": "1", "--new": "y"}) is None
    assert difference({"--a": "1"}, {"--a": "2"}) == ("--a", "1", "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "3"}, "data of client b = '2', now it is '3'"),
        ({"overrides": {"learning_rate": "1"}}, "learning_rate of client b = None, now it is '1'"),
        ({"command": ["sh", "y"]}, r"command of client b = \['sh', 'x'\], now it is \['sh', 'y'\]"),
        ({"name": "c"}, r"the names of the clients = \['a', 'b'\], now it is \['a', 'c'\]"),
    ],
)
def test_of_many_clients_the_one_that_differs_is_named(change, message):
    client = {"overrides": {}, "command": ("sh", "x")}
    old = [{"name": "a", "data": "1", **client}, {"name": "b", "data": "2", **client}]
    new = [old[0], old[1] | change]
    with pytest.raises(InputError, match=f"^here holds a run with {message}; continue with"):
        check_same({"the clients": old}, {"the clients": new}, "here")
    check_same({"the clients": old}, {"the clients": old}, "here")


def test_of_options_the_one_that_differs_is_named():
    found = difference({"--fed_options": {"a": "1", "b": "1"}}, {"--fed_options": {"a": "1"}})
    assert found == ("b of --fed_options", "1", None)


def test_what_is_in_a_file_or_a_folder_decides_not_where_it_lies(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one").write_text("1")
        (tmp_path / name / "two").write_text("2")
    x, y = tmp_path / "x", tmp_path / "y"
    assert fingerprint(x) == fingerprint(y)
    assert fingerprint(x / "one") == fingerprint(y / "one")
    (y / "two").write_text("3")
    assert fingerprint(x) != fingerprint(y)
    assert fingerprint("org/model") == "org/model"
    assert fingerprint(None) is None
