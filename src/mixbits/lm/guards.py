"""What stops a training run that has gone wrong, and how the place is named.

A loss or gradient that is not finite, and a loss that explodes, from the first step on too, end the run with a DataError before the
state is written: every checkpoint on disk is finite, and the message names the last good one, if any is. The first bad place is found by
looking at the parameters, then at every module's output in the order of the forward pass (dropout off, one sequence at a time), and for
gradients by the parameter nearest the output. Where all is finite and the loss explodes, the layer with the largest output is named.

Limits: a value that is only bad with dropout on is reported without a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mixbits.lm.loss import evaluation_mode

_EXPLODED_LOGS, _RISEN_LOGS = 3, 5


def _finite(value: Any) -> bool:
    """True when every floating-point tensor in a module's output is finite."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(_finite(v) for v in value.values())
    if isinstance(value, (tuple, list)):
        return all(_finite(v) for v in value)
    return True


def first_bad_parameter(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first tensor that is not finite, or None."""
    return next((name for name, tensor in named if not _finite(tensor.detach())), None)


@contextmanager
def _hooked(named: Iterable[tuple[str, nn.Module]], look: Callable[[str], Any]) -> Iterator[None]:
    """Within it every module's output goes to the forward hook that ``look`` makes for its name."""
    hooks = [module.register_forward_hook(look(name)) for name, module in named]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def first_bad_module(model: Any, inputs: torch.Tensor) -> str | None:
    """Name of the first module in the forward pass of ``inputs`` (B, T) whose output is not finite, or None."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(name)

        return hook

    with _hooked([(name, module) for name, module in model.named_modules() if name], look), evaluation_mode(model):
        for row in inputs:
            model(input_ids=row[None], use_cache=False)
            if found:
                return found[0]
    return None


@torch.no_grad()
def describe_largest(model: Any, inputs: torch.Tensor) -> str:
    """The layer whose output is largest in the forward pass of ``inputs`` (B, T): '; largest output: that of ...'."""
    found = dict[str, float]()

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[name] = float(output.float().square().mean().sqrt())

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    with _hooked(leaves, look), evaluation_mode(model):
        model(input_ids=inputs, use_cache=False)
    name = max(found, key=lambda n: found[n])
    return f"; largest output: that of {name} (root mean square {found[name]:.3g})"


def describe_forward(model: Any, inputs: torch.Tensor) -> str:
    """Where a forward pass goes wrong: '; first not finite: ...'."""
    bad = first_bad_parameter(model.named_parameters())
    if bad is not None:
        return f"; first not finite: the weights {bad}"
    module = first_bad_module(model, inputs)
    return "; no single layer's output is to blame" if module is None else f"; first not finite: the output of {module}"


def describe_gradients(named: Sequence[tuple[str, torch.Tensor]]) -> str:
    """The parameter with a bad gradient that is nearest the output, where the backward pass went wrong."""
    bad = [name for name, p in named if p.grad is not None and not _finite(p.grad)]
    if not bad:
        return "; every single gradient is finite, their norm is not"
    return f"; first not finite in the backward pass: the gradient of {bad[-1]} ({len(bad)} of {len(named)} are not)"


def exploded_training(losses: Sequence[float], vocabulary: int) -> str | None:
    """What to say when the last logged training losses are all far above what was reached, or above the start; else None.

    ``losses``: in order; the first is the first step's (the trainer logs it), so that a run is judged that is bad from there on.
    Far above: more than 3 ln(vocabulary), and more than 10 times the lowest before them three logs in a row, or more than twice the
    first loss five logs in a row. A loss that starts high and falls is neither.
    """
    for logs, factor, name, pick in ((_EXPLODED_LOGS, 10, "lowest before", min), (_RISEN_LOGS, 2, "first", _first)):
        last, before = losses[-logs:], losses[:-logs]
        if not before:
            continue
        reference = pick(before)
        limit = max(3 * math.log(vocabulary), factor * reference)
        if min(last) > limit:
            shown = ", ".join(f"{loss:.4g}" for loss in last)
            return f"training loss exploded: {shown} in the last {len(last)} logs, the {name} was {reference:.4g} (limit {limit:.4g})"
    return None


def _first(losses: Sequence[float]) -> float:
    return losses[0]


def validation_limit(vocabulary: int) -> float:
    """Validation loss in nats per token above which a model is not a good one: guessing, and 2 nats more."""
    return math.log(vocabulary) + 2


def exploded_validation(losses: Sequence[float], vocabulary: int, *, patience: int) -> str | None:
    """What to say when validation has risen above guessing by more than 2 nats after having been below, or is stuck; else None.

    ``patience``: that many validations in a row. Stuck: never was at or below 3 ln(vocabulary), and the last ``patience`` + 1 of at least
    ``patience`` + 2 validations are no lower than the first ones.
    """
    guessing, limit = math.log(vocabulary), validation_limit(vocabulary)
    words = f"guessing among {vocabulary:,} words costs {guessing:.4g}"
    last, before = losses[-patience:], losses[:-patience]
    if before and min(before) <= limit < min(last):
        return f"validation loss rose to {last[-1]:.4g} nats per token after {min(before):.4g}; {words} (limit {limit:.4g})"
    last, before = losses[-patience - 1 :], losses[: -patience - 1]
    if before and min(losses) > 3 * guessing and min(last) >= min(before):
        shown = ", ".join(f"{loss:.4g}" for loss in losses[-patience - 2 :])
        return f"validation loss does not fall: {shown} nats per token; {words}"
    return None
