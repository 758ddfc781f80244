"""Projecting a weight matrix on a grid: nearest codes, best scales, alternating until neither moves.

For a fixed scale the best codes are the nearest levels; for fixed codes V the best scale of a group w is
``<w, V> / <V, V>`` (Xu et al., ICASSP 2021, step 2 of ADMM training). Alternating the two never increases
``||w - scale * V||^2`` but stops in a local minimum, so :func:`project` starts from several scales and keeps the best
one per group. At 1 bit the answer is closed (mean absolute value); the tests compare ternary with its exact solution.

All functions take the unit's matrix as (rows = outputs, cols = inputs) in float32.
"""

from __future__ import annotations

import torch

from mixbits.errors import DataError, SpecError
from mixbits.spec import QuantizedWeight, QuantSpec

# Starting scales in units of the group's root mean square: around the best uniform step for a normal
# distribution at each number of levels, wide enough for flat and for heavy-tailed groups.
_STARTS: dict[int, tuple[float, ...]] = {
    2: (0.8,),
    3: (0.8, 1.2, 1.6, 2.2),
    4: (0.7, 1.0, 1.3, 1.8),
    7: (0.4, 0.55, 0.75, 1.0),
    8: (0.4, 0.55, 0.75, 1.0),
    15: (0.2, 0.3, 0.4, 0.55),
    16: (0.2, 0.3, 0.4, 0.55),
    255: (0.02, 0.03, 0.04, 0.06),
}
# With 255 levels alternating hardly moves the scale, and the best one follows the group's largest weight: further starts
# in units of the scale that just reaches it.
_STARTS_FROM_LARGEST = (0.8, 0.86, 0.92, 0.96, 1.0)
_FLOAT16_MAX = 65504.0


def nearest_levels(weight: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The grid level nearest to ``weight / scale``.

    weight: (rows, cols); scale: broadcastable, (rows, 1) or (1, 1), not negative. Returns float levels of weight's
    shape (…, -1, 0, 1, … or half steps). A zero scale gives the level nearest to zero.
    """
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    ratio = torch.where(scale > 0, weight / safe, torch.zeros_like(weight))
    top = spec.levels[-1]
    if spec.bit_width == 1:
        return torch.where(ratio >= 0, 1.0, -1.0).to(weight.dtype)
    if spec.grid == "half-step":
        return ratio.floor_().add_(0.5).clamp_(-top, top)
    return ratio.round_().clamp_(-top, top)


def _sum(values: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return values.sum(1, keepdim=True) if spec.granularity == "row" else values.sum().reshape(1, 1)


def best_scale(weight: torch.Tensor, levels: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Least-squares scale ``<w, V> / <V, V>`` per group: (rows, 1), or (1, 1) for granularity 'tensor'."""
    norm = _sum(levels * levels, spec)
    return (_sum(weight * levels, spec) / norm.clamp_min(torch.finfo(weight.dtype).tiny)).clamp_min_(0.0)


def alternate(
    weight: torch.Tensor, scale: torch.Tensor, spec: QuantSpec, *, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alternate nearest codes and best scale from ``scale``; returns (levels, scale).

    Stops early once no scale moves by more than one part in 10^6.
    """
    for _ in range(max_iterations):
        levels = nearest_levels(weight, scale, spec)
        new = best_scale(weight, levels, spec)
        moved = (new - scale).abs() > 1e-6 * scale
        scale = new
        if not bool(moved.any()):
            break
    return nearest_levels(weight, scale, spec), scale


def project(weight: torch.Tensor, spec: QuantSpec, *, max_iterations: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of several alternating projections per group.

    weight: (rows, cols) float. Returns (levels (rows, cols), scale (rows, 1) or (1, 1)), unrounded.
    Raises SpecError for a float spec, DataError for NaN or infinite weights.
    """
    if not spec.is_quantized:
        raise SpecError("a 16-bit float unit has no grid to project on")
    if not bool(torch.isfinite(weight).all()):
        raise DataError("weight has NaN or infinite values; expected finite ones: repair or retrain the model first")
    weight = weight.float()
    count = weight.numel() if spec.granularity == "tensor" else weight.shape[1]
    rms = (_sum(weight * weight, spec) / max(count, 1)).sqrt()
    starts = [rms * factor for factor in _STARTS[len(spec.levels)]]
    if spec.bit_width == 8 and weight.numel():
        largest = weight.abs().amax(1, keepdim=True) if spec.granularity == "row" else weight.abs().max().reshape(1, 1)
        starts += [largest / spec.levels[-1] * factor for factor in _STARTS_FROM_LARGEST]
    best_levels, best, best_error = None, None, None
    for start in starts:
        levels, scale = alternate(weight, start, spec, max_iterations=max_iterations)
        error = _sum((weight - scale * levels).square(), spec)
        if best_levels is None or best is None or best_error is None:
            best_levels, best, best_error = levels, scale, error
            continue
        better = error < best_error
        best_levels = torch.where(better, levels, best_levels)
        best, best_error = torch.where(better, scale, best), torch.minimum(error, best_error)
    assert best_levels is not None
    assert best is not None
    return best_levels, best


def storable_scale(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` rounded to float16 and back. Raises SpecError when it does not fit."""
    if bool((scale.abs() > _FLOAT16_MAX).any()):
        raise SpecError(f"a scale of {float(scale.abs().max()):.3g} does not fit float16 (at most {_FLOAT16_MAX:.0f})")
    return scale.to(torch.float16).float()


def quantize_weight(weight: torch.Tensor, spec: QuantSpec, *, scale: torch.Tensor | None = None) -> QuantizedWeight:
    """Project on the storable grid: scales rounded to float16, then the nearest codes for those very scales.

    weight: (rows, cols); scale: use this scale instead of searching for one.
    """
    weight = weight.float()
    if scale is None:
        _, scale = project(weight, spec)
    scale = storable_scale(scale)
    levels = nearest_levels(weight, scale, spec)
    return QuantizedWeight(spec, codes_of(levels, spec), scale.flatten().clone())


def codes_of(levels: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Float levels -> uint8 indices into ``spec.levels``."""
    low, step = spec.levels[0], spec.levels[1] - spec.levels[0]
    return ((levels - low) / step).round_().to(torch.uint8)


def dequantize(quantized: QuantizedWeight) -> torch.Tensor:
    """``levels[codes] * scale`` in float32, (rows, cols)."""
    table = torch.tensor(quantized.spec.levels, dtype=torch.float32, device=quantized.codes.device)
    scale = quantized.scales.float().reshape(-1, 1)
    return table[quantized.codes.long()] * scale


def fake_quantize(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Quantize and dequantize: what the packed model will compute with. 16 bit rounds to float16."""
    if not spec.is_quantized:
        return weight.to(torch.float16).float()
    return dequantize(quantize_weight(weight, spec))


def perturbation(weight: torch.Tensor, spec: QuantSpec) -> float:
    """Squared norm of Q(w) - w over the unit, unweighted."""
    return float((fake_quantize(weight, spec) - weight.float()).double().square().sum())
