"""Projecting a weight matrix on a grid: nearest codes, best scales, alternating until neither moves.

For a fixed scale the best codes are the nearest levels; for fixed codes V the best scale of a group w is
``<w, V> / <V, V>`` (Xu et al., ICASSP 2021, step 2 of ADMM training). Alternating the two never increases
``||w - scale * V||^2`` but stops in a local minimum, so :func:`project` starts from several scales and keeps the best
one per group. With 2 and 3 levels the answer is exact: the mean absolute value; and, keeping the k largest weights of a
group, the error is ``||w||^2 - (sum of the k largest)^2 / k``, least over k.

All functions take the unit's matrix as (rows = outputs, cols = inputs) in float32. A *group* is what shares a scale: a row,
``group_size`` columns of a row (the last may be shorter) or the whole matrix; scales are compact, one column a group:
(rows, 1), (rows, num_groups) or (1, 1). Product units (:mod:`mixbits.quant.product`) have a codebook in place of levels.
"""

from __future__ import annotations

import torch

from mixbits.errors import DataError, SpecError
from mixbits.quant import product
from mixbits.scales import compact_scale, expand_scale, storable_scale
from mixbits.spec import QuantizedWeight, QuantSpec

__all__ = [
    "alternate",
    "best_scale",
    "codes_of",
    "compact_scale",
    "dequantize",
    "expand_scale",
    "fake_quantize",
    "group_max",
    "group_sum",
    "nearest_levels",
    "perturbation",
    "project",
    "quantize_weight",
    "storable_scale",
]

# Starting scales in units of the group's root mean square: around the best uniform step for a normal
# distribution at each number of levels, wide enough for flat and for heavy-tailed groups.
_STARTS: dict[int, tuple[float, ...]] = {
    2: (0.8,),
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


def _by_group(values: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """A view (or a copy padded with zeros) whose last dimension is what one scale covers: (rows, num_groups, size)."""
    rows, cols = values.shape
    if spec.group_size is None:
        return values.reshape(1, 1, -1) if spec.granularity == "tensor" else values.unsqueeze(1)
    size = min(spec.group_size, max(cols, 1))
    if cols % size:
        values = torch.nn.functional.pad(values, (0, -cols % size))
    return values.reshape(rows, -1, size)


def group_sum(values: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Sum of (rows, cols) over what shares a scale: compact, (rows, 1), (rows, num_groups) or (1, 1)."""
    return _by_group(values, spec).sum(2)


def group_max(values: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Largest of (rows, cols), none of them negative, over what shares a scale; compact like :func:`group_sum`."""
    return _by_group(values, spec).amax(2)


def _group_count(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Number of weights in each group of a row (num_groups,); of each row or the whole matrix (1,)."""
    cols = weight.shape[1]
    if spec.group_size is None:
        return torch.tensor([max(weight.numel() if spec.granularity == "tensor" else cols, 1)], device=weight.device)
    ends = torch.arange(1, spec.num_groups(cols) + 1, device=weight.device) * spec.group_size
    return ends.clamp(max=cols) - (ends - spec.group_size)


def nearest_levels(weight: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The grid level nearest to ``weight / scale``.

    weight: (rows, cols); scale: compact, not negative. Returns float levels of weight's shape (…, -1, 0, 1, … or half
    steps). A zero scale gives the level nearest to zero. Raises SpecError for a spec without levels.
    """
    top = spec.levels[-1]
    divisor = torch.where(scale > 0, scale, torch.full_like(scale, torch.inf))
    ratio = weight / expand_scale(divisor, weight.shape[1], spec)
    if spec.bit_width == 1:
        return torch.where(ratio >= 0, 1.0, -1.0).to(weight.dtype)
    if spec.grid == "half-step":
        return ratio.floor_().add_(0.5).clamp_(-top, top)
    return ratio.round_().clamp_(-top, top)


def best_scale(weight: torch.Tensor, levels: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Least-squares scale ``<w, V> / <V, V>`` per group, compact, not negative."""
    norm = group_sum(levels * levels, spec)
    return (group_sum(weight * levels, spec) / norm.clamp_min(torch.finfo(weight.dtype).tiny)).clamp_min_(0.0)


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


def _ternary_scale(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The exact scale at three levels: mean of the k largest magnitudes, k with the largest (their sum)^2 / k."""
    largest_first = _by_group(weight.abs(), spec).sort(2, descending=True).values
    sums = largest_first.double().cumsum_(2)
    counts = torch.arange(1, sums.shape[2] + 1, dtype=torch.float64, device=weight.device)
    k = (sums.square() / counts).argmax(2, keepdim=True)
    return (sums.gather(2, k) / (k + 1)).squeeze(2).to(weight.dtype)


def _starting_scales(weight: torch.Tensor, spec: QuantSpec) -> list[torch.Tensor]:
    if spec.bit_width == 1.58 and weight.numel():
        return [_ternary_scale(weight, spec)]
    rms = (group_sum(weight * weight, spec) / _group_count(weight, spec)).sqrt()
    starts = [rms * factor for factor in _STARTS.get(len(spec.levels), (1.0,))]
    if spec.bit_width == 8 and weight.numel():
        largest = group_max(weight.abs(), spec)
        starts += [largest / spec.levels[-1] * factor for factor in _STARTS_FROM_LARGEST]
    return starts


def project(weight: torch.Tensor, spec: QuantSpec, *, max_iterations: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of several alternating projections per group.

    weight: (rows, cols) float. Returns (levels (rows, cols), compact scale), unrounded. For a product spec the levels are
    the rows of codebook vectors that :func:`mixbits.quant.product.learn` finds.
    Raises SpecError for a float spec, DataError for NaN or infinite weights.
    """
    if not spec.is_quantized:
        raise SpecError("a 16-bit float unit has no grid to project on")
    if not bool(torch.isfinite(weight).all()):
        raise DataError("weight has NaN or infinite values; expected finite ones: repair or retrain the model first")
    weight = weight.float()
    if spec.is_product:
        codebook, scale = product.learn(weight, spec)
        codes = product.assign(weight, codebook, scale, spec)
        return product.look_up(codes, codebook, weight.shape[1]), scale
    best_levels, best, best_error = None, None, None
    for start in _starting_scales(weight, spec):
        levels, scale = alternate(weight, start, spec, max_iterations=max_iterations)
        error = group_sum((weight - expand_scale(scale, weight.shape[1], spec) * levels).square(), spec)
        if best_levels is None or best is None or best_error is None:
            best_levels, best, best_error = levels, scale, error
            continue
        better = error < best_error
        best_levels = torch.where(expand_scale(better, weight.shape[1], spec), levels, best_levels)
        best, best_error = torch.where(better, scale, best), torch.minimum(error, best_error)
    assert best_levels is not None
    assert best is not None
    return best_levels, best


def quantize_weight(
    weight: torch.Tensor,
    spec: QuantSpec,
    *,
    scale: torch.Tensor | None = None,
    codebook: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Project on the storable grid: scales rounded as they are stored, then the nearest codes for those very scales.

    weight: (rows, cols); scale: use this compact scale instead of searching for one; codebook: for a product spec, use it
    (and ``scale``) instead of learning one.
    """
    if not spec.is_quantized:
        raise SpecError("a 16-bit float unit has no grid to project on")
    weight = weight.float()
    if spec.is_product:
        return product.quantize(weight, spec, scale=scale, codebook=codebook)
    if scale is None:
        _, scale = project(weight, spec)
    scale = storable_scale(scale, spec)
    levels = nearest_levels(weight, scale, spec)
    return QuantizedWeight(spec, codes_of(levels, spec), scale.flatten().clone())


def codes_of(levels: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Float levels -> uint8 indices into ``spec.levels``."""
    low, step = spec.levels[0], spec.levels[1] - spec.levels[0]
    return ((levels - low) / step).round_().to(torch.uint8)


def dequantize(quantized: QuantizedWeight) -> torch.Tensor:
    """``levels[codes] * scale`` (product: ``codebook[codes] * scale``) in float32, (rows, cols)."""
    spec, cols = quantized.spec, quantized.shape[1]
    scale = compact_scale(quantized.scales.float(), spec, cols)
    if quantized.codebook is not None:
        return product.look_up(quantized.codes, quantized.codebook, cols) * scale
    table = torch.tensor(spec.levels, dtype=torch.float32, device=quantized.codes.device)
    return table[quantized.codes.long()] * expand_scale(scale, cols, spec)


def fake_quantize(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Quantize and dequantize: what the packed model will compute with. 16 bit rounds to float16."""
    if not spec.is_quantized:
        return weight.to(torch.float16).float()
    return dequantize(quantize_weight(weight, spec))


def perturbation(weight: torch.Tensor, spec: QuantSpec) -> float:
    """Squared norm of Q(w) - w over the unit, unweighted."""
    return float((fake_quantize(weight, spec) - weight.float()).double().square().sum())
