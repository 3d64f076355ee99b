"""Tickets: what the driver asks of a site. Built by the driver, checked by the site.

A ticket has values alone: numbers, names, and flags that the site lets a run set. No path, no
command, no class: a site's data, model and programs are those of its own site.yaml.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fed import methods
from fed.arguments import CLIENT_FLAGS, own_flags
from fed.drivers.driver import Run
from llava.errors import InputError
from llava.model.multimodal_projector.connector import connector_flags
from llava.suggest import did_you_mean

PROTOCOL = 3
"""Counts up when tickets or answers change; both sides must have the same."""

KINDS = ("hello", "task", "sum", "stop")

# What is the same for all clients of a run, beside CLIENT_FLAGS and those of connectors and methods
_OF_RUN = tuple(
    # the model, and what of it trains
    "version freeze_backbone tune_mm_mlp_adapter mm_vision_select_layer mm_vision_select_feature "
    "mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type "
    "freeze_mm_mlp_adapter lora_enable lora_r lora_alpha lora_dropout lora_bias bits double_quant "
    "quant_type "
    # what it sees, in which order and in which numbers
    "image_grid_pinpoints model_max_length seed data_seed mm_projector_lr bf16 fp16 tf32 "
    "full_determinism neftune_noise_alpha activation_checkpointing "
    "auto_find_batch_size average_tokens_across_devices train_sampling_strategy "
    # the federation
    "fed_rounds fed_method fed_options fed_one_pass fed_lr_schedule fed_wire "
    "fed_weighting fed_secure fed_secure_min fed_secure_norm "
    "fed_dp_epsilon fed_dp_noise fed_dp_delta fed_dp_clip fed_dp_metrics fed_dp_shares".split()
)
# What a site may say of itself in site.yaml: how it computes, and how its clients step.
OWN_FLAGS = (
    *CLIENT_FLAGS,
    *"use_cpu bf16 fp16 tf32 attn_implementation feature_cache feature_cache_gb cache_dir "
    "deepspeed fed_dp_epsilon fed_dp_noise fed_dp_delta fed_dp_clip".split(),
)

# How a machine does its work, which decides no result: a run that is continued may change them.
_HOW = frozenset(
    "gradient_checkpointing activation_checkpointing dataloader_num_workers logging_steps "
    "save_strategy save_steps save_total_limit".split()
)

Flag = str | list[str]


def run_flags() -> frozenset[str]:
    """The flags that a run may set where site.yaml has no `allow`."""
    kinds = [*connector_flags(), *filter(None, (methods.get(n).flags for n in methods.names()))]
    of_parts = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    return frozenset({*CLIENT_FLAGS, *_OF_RUN, *of_parts})


@dataclass(frozen=True)
class Ticket:
    """A request.

    Attributes:
        kind: `hello` asks what the site has; `task` for a round's training; `sum` for a message in
            a secure sum of the round; `stop` says that the run is over, and brings its last state.
        run: the run's name, 32 hex digits.
        site: whom it is for.
        flags: the run's flags; `own` are the site's in clients.yaml, which are stronger.
        task, from_round: as in clients.yaml.
        round: from 1.
        last_round: the last round in which the site's update counted; 0: none. What the site has
            kept of that round is what the task begins with.
        facts: the digest of what the site said of itself at the beginning of the run.
        state: what `spool.digest` says of the file that is sent beside.
        nonce: makes a request another one that is the same in all else.
        exchange, step, weight: of a secure sum: which one of the round, which step of it, and the
            largest weight that a site may have.
    """

    kind: str
    run: str
    site: str
    flags: dict[str, Flag] = field(default_factory=dict)
    own: dict[str, Flag] = field(default_factory=dict)
    task: str | None = None
    from_round: int = 1
    round: int = 0
    last_round: int = 0
    facts: str = ""
    state: dict[str, Any] | None = None
    nonce: str = ""
    exchange: int = 0
    step: str = ""
    weight: float = 1.0
    protocol: int = PROTOCOL

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def settings(self) -> dict[str, Any]:
        """What of it decides how the site loads its model."""
        return {"flags": self.flags, "own": self.own, "task": self.task, "from": self.from_round}


_PATTERNS = {
    "kind": "|".join(KINDS),
    "run": "[0-9a-f]{32}",
    "site": "[A-Za-z0-9][A-Za-z0-9._-]*",
    "task": "[A-Za-z0-9_-]+",
    "facts": "([0-9a-f]{64})?",
    "nonce": "([0-9a-f]{32})?",
    "step": "[A-Za-z]*",
}


def read_ticket(given: Mapping[str, Any], site: str, allowed: frozenset[str]) -> Ticket:
    """A ticket, checked by the site.

    Args:
        site: the site's own name.
        allowed: the flags that a run may set.

    Raises:
        InputError: it asks for what the site does not allow, by name, or is no ticket.
    """
    if given.get("protocol") != PROTOCOL:
        raise InputError(
            f"the driver's requests are of version {given.get('protocol')!r}, this site's of "
            f"{PROTOCOL}: install the same fedllava on both sides"
        )
    known = {field.name for field in dataclasses.fields(Ticket)}
    for name in given:
        if name not in known:
            raise InputError(f"the ticket has {name!r}, which no ticket has")
    for name, pattern in _PATTERNS.items():
        value = given.get(name)
        if name == "task" and value is None:
            continue
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise InputError(f"the ticket's {name} is {value!r:.200}, expected {pattern}")
    for name in ("from_round", "round", "last_round", "exchange"):
        value = given.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"the ticket's {name} is {value!r:.200}, a number is expected")
    if given["kind"] in ("task", "sum") and given["round"] < 1:
        raise InputError(
            f"the ticket's round is {given['round']}, a {given['kind']} is of 1 or later"
        )
    weight = given.get("weight")
    if not isinstance(weight, (int, float)) or not 0 < weight <= 1e30:
        raise InputError(f"the ticket's weight is {weight!r:.200}, a number above 0 is expected")
    if given["site"] != site:
        raise InputError(f"the ticket is for site {given['site']}, this one is {site}")
    _check_flags(given.get("flags"), allowed)
    _check_flags(given.get("own"), allowed & frozenset(CLIENT_FLAGS))
    _check_state(given.get("state"), given["kind"])
    return Ticket(**given)


def _check_flags(flags: object, allowed: frozenset[str]) -> None:
    if not isinstance(flags, dict):
        raise InputError(f"the ticket's flags are {flags!r:.200}, names and values are expected")
    for name, value in flags.items():
        if name not in allowed:
            raise InputError(
                f"--{name} is not a flag that this site lets a run set{did_you_mean(name, allowed)}"
            )
        words = value if isinstance(value, list) else [value]
        for word in words:
            if not isinstance(word, str) or word.startswith("--"):
                raise InputError(f"--{name} is {value!r:.200}, a value is expected")
            # A flag whose value may be a file's name is not among those that are allowed; should
            # one come to be, no file is named all the same.
            if "/" in word or "\\" in word or word.startswith("~"):
                raise InputError(f"--{name} is {value!r:.200}: a run names no paths to a site")
        if name == "fed_options" and not all("=" in word for word in words):
            raise InputError(f"--{name} is {value!r:.200}, name=value is expected")


def _check_state(state: object, kind: str) -> None:
    if kind == "hello" and state is None:
        return
    whole = (
        isinstance(state, dict)
        and state.keys() == {"sha256", "bytes"}
        and isinstance(state["sha256"], str)
        and isinstance(state["bytes"], int)
    )
    if not whole:
        raise InputError(f"the ticket's state is {state!r:.200}, a hash and a size are expected")


def flags_of(run: Run) -> dict[str, Flag]:
    """A run's flags for tickets: those that sites know, where they are not the defaults."""
    known = run_flags()
    fed = dataclasses.replace(
        run.arguments.fed, fed_options=[f"{k}={_word(v)}" for k, v in run.options.items()]
    )
    others = {f.name for n in methods.names() if n != run.method.name
              for f in own_flags(methods.get(n))}  # fmt: skip
    found: dict[str, Flag] = {}
    for part in (*run.arguments[:3], fed):
        for field_ in dataclasses.fields(part):
            name, value = field_.name, getattr(part, field_.name)
            if name in known and name not in others and not _is_default(field_, value):
                found[name] = [_word(v) for v in value] if isinstance(value, list) else _word(value)
    return found


def _is_default(field_: dataclasses.Field, value: Any) -> bool:
    if value is None:
        return True
    if field_.default_factory is not dataclasses.MISSING:
        return value == field_.default_factory()
    return value == field_.default


def _word(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, dict):
        return json.dumps(value)
    return "none" if value is None else str(value)


def deciding(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a ticket's flags that decide the result."""
    return {name: value for name, value in flags.items() if name not in _HOW}


def digest_of(values: Mapping[str, Any]) -> str:
    """A digest of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def words(flags: Mapping[str, Flag]) -> list[str]:
    """Flags as a command line; no word begins with `--` but their names."""
    out: list[str] = []
    for name, value in flags.items():
        out += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return out
