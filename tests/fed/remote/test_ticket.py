"""Tickets: what a site lets the driver ask for."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fed import methods
from fed.arguments import FedArguments, own_flags
from fed.remote.ticket import PROTOCOL, Ticket, deciding, read_ticket, run_flags, words
from llava.errors import InputError
from llava.model.multimodal_projector.connector import connector_flags
from llava.train.settings import DECIDING

GOOD = Ticket(
    "task",
    "0" * 32,
    "a",
    flags={"learning_rate": "0.01", "pilot_tasks": ["x", "y"], "fed_options": ["tau=1"]},
    own={"optim": "sgd"},
    task="captions",
    round=2,
    last_round=1,
    facts="0" * 64,
    state={"sha256": "0" * 64, "bytes": 3},
)


def read(**changes):
    given = json.loads(json.dumps(GOOD.as_json()))
    return read_ticket({**given, **changes}, "a", run_flags())


def test_what_is_left_of_its_flags_decides_the_result():
    """The others may be changed when a run goes on, in the middle of a round, too."""
    methods_own = {f.name for name in methods.names() for f in own_flags(methods.get(name))}
    connectors = {f.name for kind in connector_flags() for f in dataclasses.fields(kind)}
    decide = DECIDING | FedArguments.DECIDING | methods_own | connectors | {"fed_options"}
    assert deciding(dict.fromkeys(run_flags(), "")).keys() == run_flags() & decide


def test_a_good_ticket_is_what_it_was():
    assert read() == GOOD
    assert words(GOOD.flags)[:2] == ["--learning_rate", "0.01"]
    assert words(GOOD.flags)[2:5] == ["--pilot_tasks", "x", "y"]


BAD = [
    ({"protocol": PROTOCOL + 1}, f"version {PROTOCOL + 1}, this site's of {PROTOCOL}: install"),
    ({"protocol": None}, "version None"),
    ({"command": "rm"}, "the ticket has 'command'"),
    ({"kind": "run"}, "kind is 'run'"),
    ({"run": "../../etc"}, "run is '../../etc'"),
    ({"site": "b"}, "the ticket is for site b, this one is a"),
    ({"site": "../a"}, "site is '../a'"),
    ({"task": "a/b"}, "task is 'a/b'"),
    ({"task": 3}, "task is 3"),
    ({"facts": "x"}, "facts is 'x'"),
    ({"nonce": "x/y"}, "nonce is 'x/y'"),
    ({"round": -1}, "round is -1"),
    ({"round": True}, "round is True"),
    ({"round": 0}, "round is 0, a task is of 1 or later"),
    ({"kind": "sum", "round": 0}, "round is 0, a sum is of 1 or later"),
    ({"last_round": "1"}, "last_round is '1'"),
    ({"from_round": 1.5}, "from_round is 1.5"),
    ({"state": None}, "state is None"),
    ({"state": "/etc/passwd"}, "state is '/etc/passwd'"),
    ({"state": {"sha256": "0", "bytes": 1, "path": "/x"}}, "state is "),
    ({"flags": ["--x"]}, "flags are"),
    ({"flags": {"learning_rate": 0.1}}, "--learning_rate is 0.1, a value is expected"),
    ({"flags": {"learning_rate": {"a": "b"}}}, "--learning_rate is"),
    ({"flags": {"learning_rate": "--output_dir"}}, "--learning_rate is '--output_dir'"),
    ({"flags": {"lerning_rate": "0.1"}}, "--lerning_rate is not a flag .*did you mean learning"),
    ({"flags": {"fed_options": ["/tmp/x.yaml"]}}, "--fed_options is .* names no paths"),
    ({"flags": {"fed_options": ["x.yaml"]}}, "--fed_options is .* name=value is expected"),
    ({"flags": {"version": "../x"}}, "--version is '../x': a run names no paths"),
    ({"flags": {"version": "~root"}}, "--version is '~root': a run names no paths"),
    ({"flags": {"version": "..\\x"}}, "--version is .*: a run names no paths"),
    ({"own": {"fed_rounds": "3"}}, "--fed_rounds is not a flag that this site lets"),
]
BAD += [
    ({"flags": {name: "x"}}, f"--{name} is not a flag that this site lets a run set")
    for name in (
        "model_name_or_path vision_tower pretrain_mm_mlp_adapter lora_weight_path data_path "
        "eval_data_path image_folder output_dir cache_dir logging_dir deepspeed fsdp fsdp_config "
        "accelerator_config parallelism_config hub_token push_to_hub report_to run_name "
        "resume_from_checkpoint fed_client_command fed_clients fed_driver fed_eval_data_path "
        "feature_cache use_cpu local_rank debug"
    ).split()
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_no_ticket_may_ask_for(changes, message):
    with pytest.raises(InputError, match=message):
        read(**changes)


def test_a_site_may_allow_less():
    given = GOOD.as_json()
    with pytest.raises(InputError, match="--pilot_tasks is not a flag that this site lets"):
        read_ticket(given, "a", run_flags() - {"pilot_tasks"})
    with pytest.raises(InputError, match="--optim is not a flag that this site lets"):
        read_ticket(given, "a", run_flags() - {"optim"})
