"""The measurements of a state on calibration data that a method may ask for."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fed.clients.measures import Explained
from fed.state import State


class Calibration(Protocol):
    """Calibration data on a frozen model into which a state is put.

    Methods get one for each client: all the same where the data are one set for all.
    """

    def loss(self, state: State) -> float:
        """The caption loss, nats a labelled token."""

    def explained(self, state: State) -> Explained:
        """The captions with their own pictures, and with those of others."""

    def gram(self, state: State) -> dict[str, Tensor]:
        """The mean of x x^T over what enters each layer, by layer (`fed.numerics.layers`).

        (in, in), or (in + 1, in + 1) with a constant 1 as the last input where the layer has a
        bias; float64.
        """

    def fisher(self, state: State) -> State:
        """The diagonal of the empirical Fisher matrix: the mean over samples of squared gradients.

        Names and shapes of the state; float32.
        """
