"""Progressive bit lowering: straight-through training whose units step down to their final widths, e.g. 8, then 4, then 2 bits.

``stages`` are pairs (share of the training up to which, bit width). In a stage every unit whose final spec has fewer bits is
trained at the stage's width, with the scales' granularity of its final spec; the others are at their final spec from the start. At
the end of a stage a new method object is built on the weights as they are, so that scales are searched anew. At least half
of the training is left to the final specs. (Stepping down from a trained higher precision: Zhuang et al., CVPR 2018.)

What is delivered, and so what validation measures, is always a projection on the *final* specs: an 8-bit stage
must not win the choice of the best checkpoint of a 2-bit model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.quant.method import quantize_units, stored_weights, trained_units
from mixbits.quant.qat import StraightThrough
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight, QuantSpec, default_grid

DEFAULT_STAGES: tuple[tuple[float, float], ...] = ((0.15, 8), (0.35, 4))
_LARGEST_SHARE = 0.5


def stage_spec(final: QuantSpec, bit_width: float) -> QuantSpec:
    """The spec of a unit in a stage: ``bit_width`` with the final spec's scales; the final spec if it has as many bits."""
    if final.bit_width >= bit_width:
        return final
    if final.is_product:
        return QuantSpec(bit_width)
    grid = final.grid if _exists(bit_width, final.grid) else default_grid(bit_width)
    return replace(final, bit_width=bit_width, grid=grid)


def _exists(bit_width: float, grid: Any) -> bool:
    try:
        QuantSpec(bit_width, grid)
    except SpecError:
        return False
    return True


def stage_allocation(allocation: BitAllocation, bit_width: float | None) -> BitAllocation:
    """The allocation of a stage; None is the final one."""
    if bit_width is None:
        return allocation
    specs = {name: stage_spec(spec, bit_width) for name, spec in allocation.specs.items()}
    return BitAllocation(specs, allocation.provenance)


class Progressive:
    """Method object: :class:`StraightThrough` with ``options``, its specs stepping down to ``allocation``.

    ``stages``: (share of the training up to which, bit width), shares rising to at most 0.5, widths falling. Raises SpecError.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: ModelInventory,
        allocation: BitAllocation,
        *,
        stages: Sequence[tuple[float, float]] = DEFAULT_STAGES,
        **options: Any,
    ) -> None:
        self._shares = [float(share) for share, _ in stages]
        self._widths: list[float | None] = [*(width for _, width in stages), None]
        check_stages(stages)
        self._inventory, self._allocation, self._options = inventory, allocation, options
        self.units = trained_units(model, inventory, allocation)
        self.stage = 0
        self.method = self._build(model, 0)
        # The optimizer is built once, so the tensors of the method's own must stay the same ones through all stages.
        self._groups = self.method.extra_parameters(model)
        self._model = model

    def _build(self, model: nn.Module, stage: int) -> StraightThrough:
        specs = stage_allocation(self._allocation, self._widths[stage])
        return StraightThrough(model, self._inventory, specs, **self._options)

    def _enter(self, model: nn.Module, stage: int) -> None:
        new = self._build(model, stage)
        for name, parameter in list(new.log_scales.items()):
            kept = self.method.log_scales.get(name)
            if kept is not None and kept.shape == parameter.shape:
                kept.data.copy_(parameter.data)
                new.log_scales[name] = kept
        self.method, self.stage = new, stage

    def parameters(self, model: nn.Module) -> None:
        """All of the model's parameters."""
        return None

    def extra_parameters(self, model: nn.Module) -> list[dict[str, Any]]:
        """The straight-through method's own, the same tensors in all stages."""
        return self._groups

    def before_forward(self, model: nn.Module) -> None:
        """Straight-through at the stage's specs."""
        self.method.before_forward(model)

    def after_backward(self, model: nn.Module) -> None:
        """Straight-through at the stage's specs."""
        self.method.after_backward(model)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """Step down when a stage's share is over; logs the width (0: final)."""
        figures = self.method.after_step(model, step, num_steps)
        stage = sum(step >= share * num_steps for share in self._shares)
        if stage == self.stage:
            return figures
        self._enter(model, stage)
        return figures | {"progressive_bits": float(self._widths[stage] or 0.0)}

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the units have their stored values, at the final specs."""
        return stored_weights(model, self.units, self.quantized())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """Exact projection on the final specs; before the final stage with newly searched scales."""
        return self.method.quantized() if self._widths[self.stage] is None else quantize_units(self.units)

    def state_dict(self) -> dict[str, Any]:
        """The stage and the straight-through method's state."""
        return {"stage": self.stage, "method": self.method.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        if int(state["stage"]) != self.stage:
            self._enter(self._model, int(state["stage"]))
        self.method.load_state_dict(state["method"])


def check_stages(stages: Sequence[tuple[float, float]]) -> None:
    """Raise SpecError unless shares rise to at most 0.5 and widths fall and exist."""
    shares, widths = [share for share, _ in stages], [width for _, width in stages]
    rising = all(a < b for a, b in pairwise([0.0, *shares]))
    falling = all(a > b for a, b in pairwise(widths))
    if not (shares and rising and falling and shares[-1] <= _LARGEST_SHARE):
        raise SpecError(
            f"progressive stages are {list(zip(shares, widths, strict=True))}; expected (share, bit width) pairs with shares rising "
            f"to at most {_LARGEST_SHARE} and widths falling, e.g. {DEFAULT_STAGES}: the final specs need half of the training"
        )
    for width in widths:
        if not QuantSpec(width).is_quantized:
            raise SpecError("progressive stages have a width of 16 bits, which is full precision; start at 8 or below")
