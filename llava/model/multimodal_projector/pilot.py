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
the client. The two stages, what trains in them and what is sent are known from the paper and its
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
own, and `pilot.router.weight` (phi, (T, mm_hidden_size)).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import nn

from llava.errors import InputError
from llava.model.multimodal_projector.connector import connector
from llava.model.multimodal_projector.pilot_losses import (
    OVER,
    balance_loss,
    difference_loss,
    router_z_loss,
)
from llava.model.multimodal_projector.plain import MLPConnector

INITS = ("copy", "split")
EXTRA = "pilot."  # how the names of all but the base begin


@dataclass
class PilotSettings:
    """`config.mm_pilot`, checked.

    Attributes:
        tasks: the names of all tasks, the client's own first.
        stage: 1 or 2.
        init: how the added adapters start: `split` or `copy`.
        top_k: how many experts a token is given; 0 is all of them.
        difference, balance, z: coefficients of L_d, L_b and L_z.
        difference_over: the scale of L_d; see `difference_loss`.
        client_adapter, mixture: False leaves psi_s, or CT-MoA, out (stage 2 is then psi^t_1 alone).
    """

    tasks: list[str] = field(default_factory=lambda: ["own"])
    stage: int = 2
    init: str = "split"
    top_k: int = 0
    difference: float = 0.1
    balance: float = 0.1
    z: float = 0.01
    difference_over: str = "pairs"
    client_adapter: bool = True
    mixture: bool = True

    def __post_init__(self):
        for name, known in (("stage", (1, 2)), ("init", INITS), ("difference_over", OVER)):
            if getattr(self, name) not in known:
                there = ", ".join(map(str, known))
                raise InputError(f"pilot_{name} is {getattr(self, name)!r}; known are {there}")
        for name in ("difference", "balance", "z"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"pilot_{name} is {getattr(self, name)}, expected 0 or more")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"pilot_tasks are {self.tasks}, expected different names")
        if not 0 <= self.top_k <= len(self.tasks):
            raise InputError(
                f"pilot_top_k is {self.top_k}, expected 0 (all) to {len(self.tasks)}, the tasks"
            )

    @classmethod
    def of(cls, config) -> PilotSettings:
        """Those of a config; `InputError` on a key that is not known."""
        values = dict(getattr(config, "mm_pilot", None) or {})
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise InputError(f"config.json: mm_pilot has unknown key {unknown[0]!r}")
        return cls(**values)


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
            self.pilot["router"] = nn.Linear(in_features, others + 1, bias=False)

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
        """What never leaves the client, in whichever stage: psi_s, psi^c and phi."""
        return [
            name
            for name in self.state_dict()
            if name.startswith(EXTRA) and not name.startswith("pilot.others.")
        ]

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
                adapter[2].weight.zero_()
                adapter[2].bias.zero_()
        if "router" in self.pilot and self.pilot["router"].weight.numel():
            self.pilot["router"].reset_parameters()

    def _adapters(self, part: str) -> list[nn.Module]:
        if part not in self.pilot:
            return []
        return [self.pilot[part]] if part == "client" else list(self.pilot[part])

    def forward(self, features: torch.Tensor, **context) -> torch.Tensor:
        """(batch, patches, mm_hidden_size) → (batch, patches, hidden_size)."""
        own = self[2](self[1](self[0](features)))
        self._aux = None
        if self.settings.stage == 1:
            return self._mined(own, features)
        return self._mixed(own, features) if "router" in self.pilot else own

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
        logits = self.pilot["router"](features).float()
        gates = logits.softmax(-1)
        if self.training:
            self._aux = self.settings.balance * balance_loss(gates)
            self._aux = self._aux + self.settings.z * router_z_loss(logits)
        gates = self._chosen(gates).to(own.dtype)
        mixed = gates[..., :1] * own
        pairs = zip(self.pilot["others"], self.pilot["cross"], strict=True)
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


@connector("pilot")
def _pilot(config) -> nn.Module:
    return PilotConnector(config.mm_hidden_size, config.hidden_size, PilotSettings.of(config))
