"""Product quantization against brute force, scipy and closed forms: assignment, updates, learning, storage."""

import itertools

import numpy as np
import pytest
import torch

from mixbits.errors import DataError, SpecError
from mixbits.quant import product
from mixbits.quant.grid import dequantize, fake_quantize, nearest_levels, perturbation, project, quantize_weight
from mixbits.spec import NUM_CENTROIDS, QuantSpec

SHAPES = [(1, 1), (1, 7), (5, 3), (23, 13), (40, 64)]
SPECS = [QuantSpec.parse(t) for t in ("1-v8", "0.5-v16", "2.67-v3", "1-v8-tensor")]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(spec, rows=23, cols=13, seed=0):
    scale = normal(rows, 1, seed=seed + 2).exp() if spec.has_scales else torch.ones(1, 1)
    return normal(rows, cols, seed=seed), normal(NUM_CENTROIDS, spec.vector_size, seed=seed + 1), scale


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_nearest_entry_is_assigned(spec):
    w, codebook, scale = example(spec)
    codes = product.assign(w, codebook, scale, spec)
    v = spec.vector_size
    assert codes.shape == (23, -(-13 // v))
    padded = np.pad((w / scale).numpy(), ((0, 0), (0, -13 % v)))
    for r in range(23):
        for j in range(codes.shape[1]):
            distances = ((codebook.numpy() - padded[r, j * v : (j + 1) * v]) ** 2).sum(1)
            assert distances[codes[r, j]] <= distances.min() * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_updates_are_the_least_squares_solutions(spec):
    w, codebook, scale = example(spec)
    codes = product.assign(w, codebook, scale, spec)
    new = product.update_codebook(w, codes, codebook, scale, spec)
    vectors = product.split_rows(w, spec).numpy()
    s = scale.expand(23, 1).numpy()
    for k in range(NUM_CENTROIDS):
        used = (codes == k).numpy()
        if not used.any():
            assert torch.equal(new[k], codebook[k])
            continue
        mass = (s**2 * used).sum()
        expected = (vectors * s[:, :, None] * used[:, :, None]).sum((0, 1)) / mass
        np.testing.assert_allclose(new[k].numpy(), expected, rtol=1e-3, atol=1e-5)
    rows = product.look_up(codes, codebook, 13)
    best = product.best_row_scale(w, codes, codebook, spec)
    if not spec.has_scales:
        assert best.tolist() == [[1.0]]
        return
    for r in range(23):
        solution = np.linalg.lstsq(rows[r].numpy()[:, None], w[r].numpy(), rcond=None)[0]
        assert float(best[r]) == pytest.approx(max(float(solution[0]), 0.0), rel=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_step_raises_the_error(spec):
    w, codebook, scale = example(spec, 60, 48 // spec.vector_size * spec.vector_size)
    errors = []
    for _ in range(6):
        codes = product.assign(w, codebook, scale, spec)
        errors.append(float((product.look_up(codes, codebook, w.shape[1]) * scale - w).square().sum()))
        codebook = product.update_codebook(w, codes, codebook, scale, spec)
        errors.append(float((product.look_up(codes, codebook, w.shape[1]) * scale - w).square().sum()))
        scale = product.best_row_scale(w, codes, codebook, spec)
        errors.append(float((product.look_up(codes, codebook, w.shape[1]) * scale - w).square().sum()))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_matrix_made_of_few_vectors_is_found_exactly(spec):
    v = spec.vector_size
    vectors = normal(40, v, seed=4)
    picks = torch.randint(0, 40, (30, 6), generator=torch.Generator().manual_seed(5))
    w = vectors[picks].reshape(30, 6 * v)
    if spec.has_scales:  # rows of equal norm, so that dividing by it keeps the vectors equal
        w = vectors[picks[:, :1].expand(30, 6)].reshape(30, 6 * v)
    assert perturbation(w, spec) <= 2e-4 * float(w.square().sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_form(spec, shape):
    w = normal(*shape, seed=6)
    q = quantize_weight(w, spec)
    assert q.shape == shape
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == (shape[0], -(-shape[1] // spec.vector_size))
    assert q.scales.shape == (spec.num_scales(*shape),)
    assert q.codebook is not None
    assert torch.equal(q.codebook.half().float(), q.codebook)
    scale = q.scales.reshape(-1, 1) if spec.has_scales else torch.ones(1, 1)
    assert torch.equal(dequantize(q), product.look_up(q.codes, q.codebook, shape[1]) * scale)
    again = quantize_weight(w, spec)
    for one, two in zip((q.codes, q.scales, q.codebook), (again.codes, again.scales, again.codebook), strict=True):
        assert torch.equal(one, two)
    kept = quantize_weight(dequantize(q), spec, scale=scale, codebook=q.codebook)
    torch.testing.assert_close(dequantize(kept), dequantize(q))


def test_learning_is_as_good_as_scipy_k_means_plus_plus():
    from scipy.cluster.vq import kmeans2

    w, spec = normal(400, 32, seed=7), QuantSpec.parse("1-v8-tensor")
    vectors = w.reshape(-1, 8).numpy().astype(np.float64)
    centers, labels = kmeans2(vectors, NUM_CENTROIDS, iter=20, minit="++", seed=0)
    theirs = ((vectors - centers[labels]) ** 2).sum()
    assert perturbation(w, spec) < 1.03 * theirs


def test_row_scales_help_where_norms_differ():
    w = normal(200, 64, seed=8) * normal(200, 1, seed=9).mul(1.5).exp()
    assert perturbation(w, QuantSpec.parse("1-v8")) < 0.8 * perturbation(w, QuantSpec.parse("1-v8-tensor"))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_rows_and_zero_matrices(spec):
    assert not fake_quantize(torch.zeros(3, 10), spec).any()
    w = normal(6, 10, seed=10)
    w[2] = 0
    found = fake_quantize(w, spec)
    assert torch.isfinite(found).all()
    # A byte scale is never quite zero: at most 1/255 of the largest.
    assert float(found[2].norm()) <= 0.02 * float(w.norm())


def test_project_gives_levels_and_scale_and_the_seed_decides():
    w, spec = normal(40, 24, seed=11), QuantSpec.parse("1-v8")
    levels, scale = project(w, spec)
    assert (levels.shape, scale.shape) == (w.shape, (40, 1))
    one, two = product.learn(w, spec, seed=1)[0], product.learn(w, spec, seed=1)[0]
    assert torch.equal(one, two)
    assert not torch.equal(one, product.learn(w, spec, seed=2)[0])
    state = torch.get_rng_state()
    product.learn(w, spec)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input():
    spec, w = QuantSpec(0.5), normal(3, 20)
    with pytest.raises(SpecError, match="no levels"):
        nearest_levels(w, torch.ones(3, 1), spec)
    with pytest.raises(SpecError, match="no codebook to learn"):
        product.learn(w, QuantSpec(2))
    with pytest.raises(SpecError, match="give both or neither"):
        quantize_weight(w, spec, scale=torch.ones(3, 1))
    with pytest.raises(SpecError, match=r"codebook entry of .* does not fit float16"):
        quantize_weight(w, spec, codebook=torch.full((256, 16), 1e6))
    with pytest.raises(DataError, match="codebook has NaN"):
        quantize_weight(w, spec, codebook=torch.full((256, 16), float("nan")))
    w[0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite"):
        quantize_weight(w, spec)
