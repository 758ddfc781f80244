"""Projection against exact solutions: closed form at 1 bit, sorting for ternary, brute force over scales at 2 bits."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from mixbits.errors import DataError, SpecError
from mixbits.quant.grid import (
    best_scale,
    compact_scale,
    dequantize,
    expand_scale,
    fake_quantize,
    group_max,
    group_sum,
    nearest_levels,
    perturbation,
    project,
    quantize_weight,
    storable_scale,
)
from mixbits.spec import QuantizedWeight, QuantSpec

ALL = [
    QuantSpec(w, g, r)
    for w, g in [(1, ""), (1.58, ""), (2, ""), (3, ""), (4, ""), (8, ""), (3, "half-step"), (4, "half-step")]
    for r in ("row", "tensor")
]
GROUPS = [
    QuantSpec(w, g, "group", size, bits)
    for w, g in [(1, ""), (1.58, ""), (2, ""), (4, ""), (8, "")]
    for size, bits in [(4, 16), (5, 8), (64, 16)]
] + [QuantSpec(2, scale_bits=8), QuantSpec(8, scale_bits=8)]


def groups_of(w, spec):
    """The parts of (rows, cols) that share a scale, by plain loops."""
    if spec.granularity == "tensor":
        return [[w]]
    size = spec.group_size or w.shape[1]
    return [[row[i : i + size] for i in range(0, len(row), size)] for row in w]


def weights(rows, cols, seed=0, tails="normal"):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator)
    if tails == "laplace":
        return w * torch.empty(rows, cols).exponential_(generator=generator).sqrt()
    return w**3 if tails == "extreme" else w


def row_errors(w, spec):
    levels, scale = project(w, spec)
    return (w - scale * levels).double().square().sum(1)


def test_one_bit_is_the_closed_form():
    w = weights(7, 33)
    levels, scale = project(w, QuantSpec(1))
    torch.testing.assert_close(scale.squeeze(1), w.abs().mean(1))
    assert torch.equal(levels, torch.where(w >= 0, 1.0, -1.0))
    _, scale = project(w, QuantSpec(1, granularity="tensor"))
    torch.testing.assert_close(scale, w.abs().mean().reshape(1, 1))


def exact_ternary_error(row):
    """Keep the k largest: the scale is their mean, the error ||w||^2 - (sum of them)^2 / k, least over k."""
    a = np.sort(np.abs(row))[::-1]
    sums = np.cumsum(a)
    return float((row**2).sum() - (sums**2 / np.arange(1, len(a) + 1)).max())


@pytest.mark.parametrize("tails", ["normal", "laplace", "extreme"])
@pytest.mark.parametrize("granularity", ["row", "tensor", "group"])
def test_ternary_reaches_the_exact_solution(tails, granularity):
    w = weights(40, 100, seed=1, tails=tails)
    spec = QuantSpec(1.58, granularity=granularity, group_size=32 if granularity == "group" else None)
    groups = {"row": [w], "tensor": [w.reshape(1, -1)], "group": w.split(32, 1)}[granularity]
    exact = np.array([exact_ternary_error(r) for part in groups for r in part.double().numpy()])
    levels, scale = project(w, spec)
    error = (w - expand_scale(scale, 100, spec) * levels).double().square()
    parts = {"row": [error], "tensor": [error.reshape(1, -1)], "group": error.split(32, 1)}[granularity]
    found = np.concatenate([part.sum(1).numpy() for part in parts])
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.parametrize("spec", [QuantSpec(2), QuantSpec(3), QuantSpec(4), QuantSpec(3, "half-step")], ids=str)
def test_tiny_groups_against_brute_force_over_the_scale(spec):
    w = weights(20, 5, seed=2)
    found = row_errors(w, spec).numpy()
    levels = np.array(spec.levels)
    for row, error in zip(w.double().numpy(), found, strict=True):

        def at(scale, row=row):
            return float(((row[:, None] - scale * levels) ** 2).min(1).sum())

        grid = np.linspace(1e-6, 2.5 * np.abs(row).max(), 1500)
        all_at_once = ((row[:, None] - grid[:, None, None] * levels) ** 2).min(2).sum(1)
        start = grid[all_at_once.argmin()]
        exact = minimize_scalar(at, bounds=(start - grid[1], start + grid[1]), method="bounded").fun
        # Five weights a row are the hard case for a local search: within 5 % of the row's norm of the optimum.
        assert exact * (1 - 1e-5) - 1e-9 <= error <= exact + 0.05 * float((row**2).sum())


@pytest.mark.parametrize("spec", [QuantSpec(2), QuantSpec(2, granularity="tensor"), *GROUPS], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (3, 13), (2, 64)])
def test_sums_and_scales_of_groups_against_plain_loops(spec, shape):
    w = weights(*shape, seed=8)
    parts = groups_of(w, spec)
    torch.testing.assert_close(group_sum(w, spec), torch.tensor([[float(p.sum()) for p in row] for row in parts]))
    assert torch.equal(group_max(w.abs(), spec), torch.tensor([[float(p.abs().max()) for p in row] for row in parts]))
    assert group_sum(w, spec).numel() == spec.num_scales(*shape)
    expanded = expand_scale(group_max(w.abs(), spec), shape[1], spec).expand(shape)
    for row, expected in zip(groups_of(expanded, spec), group_max(w.abs(), spec), strict=True):
        for part, value in zip(row, expected, strict=True):
            assert torch.all(part == value)


@pytest.mark.parametrize("spec", [s for s in GROUPS if s.granularity == "group"], ids=str)
def test_a_group_is_projected_as_a_row_of_its_own_would_be(spec):
    w = weights(3, 13, seed=9)
    levels, scale = project(w, spec)
    alone = QuantSpec(spec.bit_width, spec.grid)
    for r, row in enumerate(groups_of(w, spec)):
        begin = 0
        for g, part in enumerate(row):
            expected, best = project(part.reshape(1, -1), alone)
            torch.testing.assert_close(scale[r, g], best[0, 0])
            assert torch.equal(levels[r, begin : begin + len(part)], expected[0])
            begin += len(part)


@pytest.mark.parametrize("spec", GROUPS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 13), (2, 64)])
def test_group_and_byte_scales_quantize_to_storable_values(spec, shape):
    w = weights(*shape, seed=10)
    q = quantize_weight(w, spec)
    assert q.codes.shape == q.shape == shape
    assert q.scales.shape == (spec.num_scales(*shape),)
    compact = compact_scale(q.scales, spec, shape[1])
    assert torch.equal(storable_scale(compact, spec), compact)
    table = torch.tensor(spec.levels)
    scale = expand_scale(compact, shape[1], spec)
    assert torch.equal(table[q.codes.long()] * scale, dequantize(q))
    distance = (w[..., None] - table * scale[..., None]).abs()
    assert torch.all((w - dequantize(q)).abs() <= distance.min(-1).values * (1 + 1e-5) + 1e-7)
    again = quantize_weight(dequantize(q), spec, scale=compact)
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.scales, q.scales)


def test_smaller_groups_leave_less():
    w = weights(16, 256, seed=11, tails="laplace")
    errors = [perturbation(w, QuantSpec.parse(t)) for t in ("2-tensor", "2", "2-g64", "2-g16", "2-g4")]
    assert errors == sorted(errors, reverse=True)
    assert perturbation(w, QuantSpec.parse("2-g16-s8")) < 1.01 * perturbation(w, QuantSpec.parse("2-g16"))


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_projection_is_a_fixed_point_and_no_worse_than_any_start(spec):
    w = weights(6, 50, seed=3)
    levels, scale = project(w, spec)
    assert set(levels.unique().tolist()) <= set(spec.levels)
    again = best_scale(w, levels, spec)
    error = float((w - scale * levels).square().sum())
    assert float((w - again * levels).square().sum()) == pytest.approx(error, rel=1e-4)
    assert torch.equal(nearest_levels(w, scale, spec), levels)
    assert error <= float((w - scale * 1.1 * nearest_levels(w, scale * 1.1, spec)).square().sum()) * (1 + 1e-6)


def test_more_levels_leave_less():
    w = weights(20, 200, seed=4)
    errors = [perturbation(w, QuantSpec(b)) for b in (1, 1.58, 2, 3, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_zero_rows_and_zero_matrices(spec):
    w = weights(4, 9, seed=5)
    w[2] = 0
    quantized = dequantize(quantize_weight(w, spec))
    assert torch.isfinite(quantized).all()
    if spec.granularity == "row":
        assert not quantized[2].any()
    zero = quantize_weight(torch.zeros(3, 4), spec)
    assert not dequantize(zero).any()


@pytest.mark.parametrize("spec", ALL, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 13)])
def test_scales_are_float16_and_codes_index_levels(spec, shape):
    w = weights(*shape, seed=6)
    q = quantize_weight(w, spec)
    assert isinstance(q, QuantizedWeight)
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == shape
    assert int(q.codes.max()) < len(spec.levels)
    assert q.scales.shape == (spec.num_scales(*shape),)
    assert torch.equal(q.scales.half().float(), q.scales)
    table = torch.tensor(spec.levels)
    assert torch.equal(table[q.codes.long()] * q.scales[:, None], dequantize(q))
    # For the rounded scales the codes are the nearest ones still.
    distance = (w[..., None] - table * q.scales.view(-1, 1, 1)).abs()
    chosen = (w - dequantize(q)).abs()
    assert torch.all(chosen <= distance.min(-1).values * (1 + 1e-5) + 1e-7)


def test_given_scale_is_used():
    w = weights(3, 8)
    q = quantize_weight(w, QuantSpec(4), scale=torch.full((3, 1), 0.1))
    assert torch.equal(q.scales, torch.full((3,), 0.1).half().float())


def test_sixteen_bits_round_to_float16():
    w = weights(3, 8)
    assert torch.equal(fake_quantize(w, QuantSpec(16)), w.half().float())
    with pytest.raises(SpecError, match="no grid"):
        project(w, QuantSpec(16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    w = weights(3, 8)
    w[1, 1] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        fake_quantize(w, QuantSpec(2))


def test_a_scale_beyond_float16_is_refused():
    with pytest.raises(SpecError, match="does not fit float16"):
        quantize_weight(torch.full((1, 4), 1e6), QuantSpec(1))


def test_perturbation_is_the_squared_distance():
    w = weights(3, 8)
    spec = QuantSpec(2)
    assert perturbation(w, spec) == pytest.approx(float((fake_quantize(w, spec) - w).square().sum()))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("cols", [128, 512])
def test_eight_bits_are_near_the_best_of_a_fine_scan(cols, granularity):
    weight = torch.randn(12, cols, generator=torch.Generator().manual_seed(cols))
    spec = QuantSpec(8, granularity=granularity)
    levels, scale = project(weight, spec)
    groups = weight if granularity == "row" else weight.reshape(1, -1)
    found = (weight - levels * scale).square().reshape(groups.shape).sum(1)
    largest = groups.abs().amax(1, keepdim=True)
    best = torch.full_like(found, torch.inf)
    for share in torch.linspace(0.5, 1.1, 241):
        step = largest * share / 127
        codes = (groups / step).round().clamp(-127, 127)
        step = (groups * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True)
        best = torch.minimum(best, (groups - step * codes).square().sum(1))
    assert (found / best).mean() < 1.1
    assert (found / best).max() < 1.5
