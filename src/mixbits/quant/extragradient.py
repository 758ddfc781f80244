"""Korpelevich's extra-gradient: a gradient step to look ahead, then the step itself with the gradient found there.

``W_bar = W - eta1 g(W)``, then ``W <- W - eta2 g(W_bar)`` (Korpelevich, 1976; the W-step of Xu et al., ICASSP 2021). In ADMM the
quadratic penalty may be much stiffer than the loss; at W_bar it has already acted, so that its gradient is smaller and
the second step does not overshoot. Both gradients are of the same batch (with dropout masks of their own). A step costs two
forward and backward passes.

The weights are put back by swapping tensors, so they return to the very bits they had.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Lookahead:
    """Moves parameters to W_bar and back. ``rate`` is eta1."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []

    @property
    def active(self) -> bool:
        """True between :meth:`go` and :meth:`put_back`."""
        return bool(self._kept)

    @torch.no_grad()
    def go(self, parameters: Iterable[nn.Parameter]) -> None:
        """Step to ``W - rate * gradient`` and clear the gradients; parameters without one stay."""
        self.put_back()
        for parameter in parameters:
            if parameter.grad is not None:
                self._kept.append((parameter, parameter.data))
                parameter.data = parameter.data.sub(parameter.grad, alpha=self.rate)
                parameter.grad = None

    def put_back(self) -> None:
        """Return to the weights before :meth:`go`; gradients stay as they are."""
        for parameter, data in self._kept:
            parameter.data = data
        self._kept.clear()


@torch.no_grad()
def descend(parameters: Iterable[nn.Parameter], rate: float) -> None:
    """``W <- W - rate * gradient``, then drop the gradients, which leaves nothing to do for the trainer's optimizer."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.sub_(parameter.grad, alpha=rate)
            parameter.grad = None
