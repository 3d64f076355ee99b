"""Noise in shares: clients of a secure sum that together add what each would have to add alone.

The server sees sums over at least m clients, `--fed_secure_min`, and nothing else. Where each adds
noise of standard deviation noise * C / sqrt(m), the sum over m or more has at least noise * C
(Kairouz et al. 2021, arXiv 2102.06387, with continuous noise). That is the Gaussian mechanism on
the sum as long as what a client sends is a linear function of its one noised step: it is not of
several steps, the second of which has seen the first with a share of the noise alone, nor of Adam's
or of a clipped mean. So a client takes one step a round, by SGD without momentum, all steps alike,
and all clients count alike in the mean.

Clients that vanish cost nothing, for a sum over fewer than m is none. Of m clients c that tell the
server what they have added leave noise * sqrt(1 - c / m); a client that adds less than its share
takes as much away. `Guarantee.betrayed` is epsilon with c = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fed.arguments import FedArguments
from fed.clients.clients_yaml import ClientSpec
from fed.methods import Method
from fed.methods.interface.sums import MeanOnly
from llava.errors import InputError
from llava.train.arguments import TrainingArguments
from llava.train.llava_trainer import steps_of

WHO = "--fed_dp_shares True"
# What a client may have of its own: nothing that its step depends on.
_OWN = frozenset(
    "image_aspect_ratio skip_bad_images gradient_checkpointing dataloader_num_workers "
    "logging_steps save_strategy save_steps save_total_limit".split()
)


def check_shares(
    method: Method, options: Mapping[str, Any], fed: FedArguments, args: TrainingArguments
) -> None:
    """Refuse what is more than a sum of single, linear steps of equal clients."""
    if not fed.private:
        raise InputError(f"{WHO} is for private training: --fed_dp_epsilon is expected, too")
    if not fed.fed_secure:
        raise InputError(
            f"{WHO} needs --fed_secure True: whoever sees a single update sees a share of the noise"
        )
    sums = method.summed(options)
    if type(sums) is not MeanOnly or method.client_rule is not None:
        raise InputError(
            f"{WHO} has no place with --fed_method {method.name}, which takes more than the mean "
            "of plain steps; fedavg, fedavgm and fedadam take that alone"
        )
    if not sums.equal:
        raise InputError(
            f"{WHO} needs clients that count alike, whatever their samples: --fed_options "
            "paper_compat=true is expected"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    momentum = str(args.optim_args or "")
    for flag, found, expected in (
        ("optim", optim, "sgd"),
        ("optim_args", momentum, ""),
        ("max_grad_norm", f"{args.max_grad_norm:g}", "0"),
    ):
        if found != expected:
            raise InputError(
                f"{WHO} needs a step that is linear in its gradient: --{flag} is {found!r}, "
                f"{expected!r} is expected"
            )


def check_own(spec: ClientSpec) -> None:
    """Refuse a client whose steps would not be those of all others."""
    if own := sorted(spec.overrides.keys() - _OWN):
        raise InputError(
            f"{own[0]} is its own, which has no place with {WHO}: all clients take the same step"
        )


def check_slices(name: str, slices: Sequence[Sequence[int]], args: TrainingArguments) -> None:
    """Refuse a client that does not take just one step in every round."""
    for round, indices in enumerate(slices, start=1):
        count = len(indices)
        if (steps := steps_of(args, count)) != 1:
            more = "raise --gradient_accumulation_steps or --fed_rounds"
            raise InputError(
                f"client {name} takes {steps} steps on the {count} records of round {round}, "
                f"{WHO} needs just one: {more if steps else 'lower --fed_rounds'}"
            )
