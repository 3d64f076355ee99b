"""Pilot's connector (arXiv 2501.13985): two stages of adapter on adapter, mlp2x_gelu each.

H are the features of the frozen tower, (batch, patches, mm_hidden_size); T is the number of tasks
in the federation, the client's own first. psi are adapters: full copies of LLaVA's projector.

Stage 1, task-specific feature mining:

    x = psi^t_1(H) + psi_s(H)                        task adapter + client adapter
    loss = L_ce + difference * L_d(psi^t_1(H), psi_s(H))

Stage 2, cross-task mixture of adapters (CT-MoA), routed per visual token:

    h_1 = psi^t_1(H),    h_i = psi^t_i(H) + psi^c_i(H)  for the other tasks i = 2 … T
    p = softmax(phi H),    x = sum_i p_i h_i
    loss = L_ce + balance * L_b + z * L_z

psi^t_i of the other tasks come from their clients and are frozen; psi_s, psi^c and phi never leave
the client. With `router_own` above 0 the router has a bias, which begins with that number for the
own task's adapter and with 0 for the others, so that a client sets out from what its own task
knows, and learns from there what others' tasks add: ours, and the default; the published router has
none. The two
stages, what trains in them and what is sent are known from the paper and its
released code, L_b, L_z and the three coefficients' defaults from the code. With `top_k` below T the
chosen gates are scaled to sum to one: our reading, the published runs use all T.

Every adapter starts from the pre-trained projector P (`derive`). With `init=copy`, as published,
stage 1 starts at P + P, twice the projector's output, and stage 2, before anything has trained, at
p_1 P + (1 − p_1) 2 P, between one and two times. `split` keeps the output P in both stages: the
adapters that are added to a task adapter (psi_s and psi^c) start with a last layer of zeros, so
that the task adapter has the whole; that division, 1 + 0, is ours, and it is the default: with
`copy` psi^t_1 and psi_s start alike, are given the same gradients, of L_d too, and so stay alike
through all of stage 1, where nothing tells what is of the task from what is of the client.

State-dict names: psi^t_1 has upstream's, `0.weight` …; the rest is `pilot.client.*` (psi_s),
`pilot.others.I.*` (psi^t), `pilot.cross.I.*` (psi^c), I from 0 in the order of the tasks after the
own, and `pilot.router.weight` (phi, (T, mm_hidden_size)), `pilot.router.bias` (T,) if it has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from llava.errors import InputError
from llava.model.multimodal_projector.connector import Connector, connector
from llava.model.multimodal_projector.pilot_losses import (
    OVER,
    balance_loss,
    difference_loss,
    router_z_loss,
)
from llava.model.multimodal_projector.plain import MLPConnector

INITS = ("copy", "split")
EXTRA = "pilot."  # how the names of all but the base begin


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": f"pilot: {text}"})


@dataclass
class PilotSettings:
    """`config.mm_pilot` and the flags `--pilot_*`, checked.

    `tasks` are the names of all tasks, the client's own first; without any, its own alone.
    `difference`, `balance` and `z` are the coefficients of L_d, L_b and L_z. Without psi_s the
    client adapter is left out, without CT-MoA the mixture (stage 2 is then psi^t_1 alone).
    """

    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "pilot: the tasks, the own first; in a federated run clients.yaml says."},
    )
    stage: int = _setting(2, "1 or 2.")
    init: str = _setting("split", "added adapters start at 0 (split), or as the projector (copy).")
    top_k: int = _setting(0, "experts a token, two at least; 0: all.")
    router_own: float = _setting(6.0, "the own adapter's logit at the start; 0: no bias.")
    difference: float = _setting(0.1, "weight of the difference loss of stage 1.")
    balance: float = _setting(0.1, "weight of the balance loss of stage 2.")
    z: float = _setting(0.01, "weight of the router-z loss of stage 2.")
    difference_over: str = _setting("pairs", "scale of the difference loss: pairs, mean or sum.")
    client_adapter: bool = _setting(True, "False leaves the client adapter out.")
    mixture: bool = _setting(True, "False leaves the mixture of adapters out.")

    def __post_init__(self) -> None:
        self.tasks = self.tasks or ["own"]
        for name, known in (("stage", (1, 2)), ("init", INITS), ("difference_over", OVER)):
            if getattr(self, name) not in known:
                there = ", ".join(map(str, known))
                raise InputError(f"pilot_{name} is {getattr(self, name)!r}; known are {there}")
        for name in ("router_own", "difference", "balance", "z"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"pilot_{name} is {getattr(self, name)}, expected 0 or more")
        if len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"pilot_tasks are {self.tasks}, expected different names")
        if not 0 <= self.top_k <= len(self.tasks):
            raise InputError(
                f"pilot_top_k is {self.top_k}, expected 0 (all) to {len(self.tasks)}, the tasks"
            )
        if self.top_k == 1 < len(self.tasks):
            raise InputError(
                "pilot_top_k is 1: the only gate is always 1, so that no caption teaches the "
                f"router; expected 0 (all) or 2 to {len(self.tasks)}"
            )


class PilotConnector(MLPConnector):
    """The base is the own task's adapter; `settings.stage` may be changed at any time."""

    def __init__(self, in_features: int, out_features: int, settings: PilotSettings):
        super().__init__(in_features, out_features, 2)
        self.settings = settings
        self._aux: torch.Tensor | None = None

        def adapter() -> nn.Module:
            return MLPConnector(in_features, out_features, 2)

        others = len(settings.tasks) - 1 if settings.mixture else 0
        self.pilot = nn.ModuleDict()
        if settings.client_adapter:
            self.pilot["client"] = adapter()
        if others:
            self.pilot["others"] = nn.ModuleList(adapter() for _ in range(others))
            self.pilot["cross"] = nn.ModuleList(adapter() for _ in range(others))
            biased = settings.router_own > 0
            self.pilot["router"] = nn.Linear(in_features, others + 1, bias=biased)

    def groups(self) -> dict[str, list[str]]:
        """By stage; the base, psi^t_1, is the task's in both."""
        stage_1 = self.settings.stage == 1
        own = ("pilot.client.",) if stage_1 else ("pilot.cross.", "pilot.router.")
        groups: dict[str, list[str]] = {"shared": [], "task": [], "client": [], "frozen": []}
        for name in self.state_dict():
            mine = "client" if name.startswith(own) else "frozen"
            groups[mine if name.startswith(EXTRA) else "task"].append(name)
        return groups

    def private(self) -> list[str]:
        """The parameters that never leave the client, in either stage: psi_s, psi^c and phi."""
        return [name for name in self.beyond_base() if not name.startswith("pilot.others.")]

    def beyond_base(self) -> list[str]:
        return [name for name in self.state_dict() if name.startswith(EXTRA)]

    @torch.no_grad()
    def derive(self) -> None:
        """Every other adapter from the base; the router is drawn from torch's global seed."""
        base = {n: p for n, p in self.named_parameters() if not n.startswith(EXTRA)}
        added = [*self._adapters("cross"), *self._adapters("client")]
        for adapter in [*self._adapters("others"), *added]:
            for name, parameter in adapter.named_parameters():
                if parameter.numel():  # ZeRO-3: only rank 0 holds what it writes
                    parameter.copy_(base[name])
        if self.settings.init == "split":
            for adapter in added:
                last = cast(nn.Linear, adapter[2])
                last.weight.zero_()
                last.bias.zero_()
        if "router" in self.pilot and self._router.weight.numel():
            self._router.reset_parameters()
            if self.settings.router_own:
                self._router.bias.zero_()
                self._router.bias[0] = self.settings.router_own

    @property
    def _router(self) -> nn.Linear:
        return cast(nn.Linear, self.pilot["router"])

    def _adapters(self, part: str) -> Sequence[MLPConnector]:
        if part not in self.pilot:
            return []
        found = self.pilot[part]
        modules = [found] if part == "client" else cast(nn.ModuleList, found)
        return [cast(MLPConnector, module) for module in modules]

    def forward(self, input: torch.Tensor, **context: Any) -> torch.Tensor:
        """(batch, patches, mm_hidden_size) → (batch, patches, hidden_size)."""
        own = self[2](self[1](self[0](input)))
        self._aux = None
        if self.settings.stage == 1:
            return self._mined(own, input)
        return self._mixed(own, input) if "router" in self.pilot else own

    def aux_loss(self) -> torch.Tensor | None:
        """The weighted auxiliary losses of the last forward in training, a scalar; None if none."""
        aux, self._aux = self._aux, None
        return aux

    def _mined(self, own: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if "client" not in self.pilot:
            return own
        client = self.pilot["client"](features)
        if self.training and self.settings.difference:
            over = self.settings.difference_over
            self._aux = self.settings.difference * difference_loss(own, client, over)
        return own + client

    def _mixed(self, own: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        logits = self._router(features).float()
        gates = logits.softmax(-1)
        if self.training:
            self._aux = self.settings.balance * balance_loss(gates)
            self._aux = self._aux + self.settings.z * router_z_loss(logits)
        gates = self._chosen(gates).to(own.dtype)
        mixed = gates[..., :1] * own
        pairs = zip(self._adapters("others"), self._adapters("cross"), strict=True)
        for i, (other, cross) in enumerate(pairs, 1):
            mixed = mixed + gates[..., i : i + 1] * (other(features) + cross(features))
        return mixed

    def _chosen(self, gates: torch.Tensor) -> torch.Tensor:
        """Gates (…, T) with all but the `top_k` largest of each token at 0, which sum to 1."""
        if self.settings.top_k in (0, gates.shape[-1]):
            return gates
        kept = torch.zeros_like(gates, dtype=torch.bool)
        kept.scatter_(-1, gates.topk(self.settings.top_k, dim=-1).indices, True)
        gates = gates * kept
        return gates / gates.sum(-1, keepdim=True)


@connector("pilot", settings=PilotSettings, base="mlp2x_gelu")
def _pilot(config: Any, settings: PilotSettings) -> Connector:
    return PilotConnector(config.mm_hidden_size, config.hidden_size, settings)
