"""Product quantization: one byte names one of 256 learned vectors for v input columns of a row; below one bit a weight.

A row w is cut into vectors of v columns (the last one padded) and divided by its scale s; each vector is replaced by the
nearest entry of a codebook that all rows and all positions of the unit share: ``w ~ s * (c[k_1], c[k_2], ...)``. With
granularity 'tensor' s = 1. The error
``sum_r s_r^2 sum_j ||w_rj / s_r - c[k_rj]||^2`` is k-means with weights s^2: for a fixed codebook the nearest entry is best
(:func:`assign`), for fixed codes the best entries are weighted means (:func:`update_codebook`) and the best row scales are
least squares (:func:`best_row_scale`); none of the three raises it. :func:`learn` starts with k-means++ (Arthur and
Vassilvitskii, 2007) on a sample of the vectors, as FAISS does (Jegou et al., TPAMI 2011, for the idea).

Everything is matrix products and index sums, so that one step of it costs about as much as a forward pass of the softmax
that the unit is tied to. Limits: a local minimum; the padding of the last vector counts as zeros in the codebook's fit.
"""

from __future__ import annotations

import torch

from mixbits.errors import DataError, SpecError
from mixbits.scales import storable_scale
from mixbits.spec import NUM_CENTROIDS, QuantizedWeight, QuantSpec

_CHUNK = 1 << 15
_SAMPLE_PER_CENTROID = 256
"""Vectors a centroid that the first iterations see; more hardly change the codebook (FAISS uses as many)."""
_FULL_ITERATIONS = 3
_FLOAT16_MAX = 65504.0


def split_rows(matrix: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """(rows, cols) -> (rows, ceil(cols / v), v), padded with zeros."""
    rows, cols = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -cols % spec.vector_size)) if cols % spec.vector_size else matrix
    return padded.reshape(rows, -1, spec.vector_size)


def look_up(codes: torch.Tensor, codebook: torch.Tensor, cols: int) -> torch.Tensor:
    """``codebook[codes]`` as rows: codes (rows, n), codebook (256, v) -> float (rows, cols), to be scaled."""
    return torch.index_select(codebook, 0, codes.reshape(-1).int()).reshape(codes.shape[0], -1)[:, :cols]


def assign(weight: torch.Tensor, codebook: torch.Tensor, row_scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The nearest codebook entry of every vector: uint8 (rows, n).

    weight: (rows, cols); codebook: (256, v); row_scale: (rows, 1). One matrix product of (rows * n, v) with (v, 256).
    """
    safe = torch.where(row_scale > 0, row_scale, torch.full_like(row_scale, torch.inf))
    vectors = split_rows(weight / safe, spec)
    return _nearest(vectors.reshape(-1, spec.vector_size), codebook).view(vectors.shape[:2])


def _nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    half_norms = codebook.square().sum(1).mul_(-0.5)
    parts = [torch.addmm(half_norms, part, codebook.T).argmax(1).to(torch.uint8) for part in vectors.split(_CHUNK)]
    return torch.cat(parts)


def update_codebook(
    weight: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, row_scale: torch.Tensor, spec: QuantSpec
) -> torch.Tensor:
    """The least-squares codebook for fixed codes and row scales: (256, v). Entries without vectors stay as they are."""
    sums = scaled_sums(weight, codes, row_scale, spec)
    masses = torch.zeros(NUM_CENTROIDS, 1, dtype=weight.dtype, device=weight.device)
    masses.index_add_(0, codes.reshape(-1).int(), row_scale.square().expand(codes.shape).reshape(-1, 1))
    return torch.where(masses > 0, sums / masses.clamp_min(torch.finfo(weight.dtype).tiny), codebook)


def scaled_sums(values: torch.Tensor, codes: torch.Tensor, row_scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Per codebook entry, the sum of ``row_scale * values`` over the vectors that use it: (256, v).

    With the gradient of the weights as ``values`` this is the gradient of the codebook.
    """
    sums = torch.zeros(NUM_CENTROIDS, spec.vector_size, dtype=values.dtype, device=values.device)
    vectors = split_rows(values * row_scale, spec)
    return sums.index_add_(0, codes.reshape(-1).int(), vectors.reshape(-1, spec.vector_size))


def best_row_scale(weight: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The least-squares scale of every row for fixed codes and codebook, not negative: (rows, 1); without scales 1, (1, 1)."""
    if not spec.has_scales:
        return weight.new_ones(1, 1)
    rows = look_up(codes, codebook, weight.shape[1])
    norms = rows.square().sum(1, keepdim=True).clamp_min_(torch.finfo(weight.dtype).tiny)
    return ((weight * rows).sum(1, keepdim=True) / norms).clamp_min_(0.0)


def learn(
    weight: torch.Tensor, spec: QuantSpec, *, seed: int = 0, max_iterations: int = 20
) -> tuple[torch.Tensor, torch.Tensor]:
    """A codebook and row scales for ``weight`` (rows, cols): (256, v) and (rows, 1) (or 1, (1, 1)), unrounded.

    Deterministic for a seed on one machine. Raises SpecError for another grid.
    """
    if not spec.is_product:
        raise SpecError(f"spec {spec} has no codebook to learn; expected grid 'product'")
    weight = weight.float()
    scale = _root_mean_squares(weight, spec)
    vectors = split_rows(weight / torch.where(scale > 0, scale, torch.full_like(scale, torch.inf)), spec)
    masses = scale.square().expand(vectors.shape[:2]).reshape(-1)
    vectors = vectors.reshape(-1, spec.vector_size)
    generator = torch.Generator().manual_seed(seed)
    sample = NUM_CENTROIDS * _SAMPLE_PER_CENTROID
    if len(vectors) > sample:
        chosen = torch.randperm(len(vectors), generator=generator)[:sample].to(weight.device)
        vectors, masses = vectors[chosen], masses[chosen]
    codebook = _k_means(vectors, masses, generator, max_iterations)
    for _ in range(_FULL_ITERATIONS):
        codes = assign(weight, codebook, scale, spec)
        codebook = update_codebook(weight, codes, codebook, scale, spec)
        scale = best_row_scale(weight, codes, codebook, spec)
    return codebook, scale


def _root_mean_squares(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return weight.square().mean(1, keepdim=True).sqrt() if spec.has_scales else weight.new_ones(1, 1)


def _k_means(
    vectors: torch.Tensor, masses: torch.Tensor, generator: torch.Generator, max_iterations: int
) -> torch.Tensor:
    """Weighted k-means of vectors (n, v): k-means++ start, Lloyd steps, empty entries moved to the worst vectors."""
    codebook = _seeds(vectors, masses, generator)
    for _ in range(max_iterations):
        codes = _nearest(vectors, codebook).int()
        mass = torch.zeros(NUM_CENTROIDS, 1, device=vectors.device).index_add_(0, codes, masses.unsqueeze(1))
        sums = torch.zeros_like(codebook).index_add_(0, codes, vectors * masses.unsqueeze(1))
        new = torch.where(mass > 0, sums / mass.clamp_min(1e-30), codebook)
        empty = (mass.squeeze(1) == 0).nonzero().squeeze(1)
        if len(empty):
            errors = (vectors - codebook[codes]).square().sum(1) * masses
            worst = errors.topk(min(len(empty), len(vectors))).indices
            new[empty[: len(worst)]] = vectors[worst]
        if torch.equal(new, codebook):
            break
        codebook = new
    return codebook


def _seeds(vectors: torch.Tensor, masses: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each next vector drawn with probability proportional to its mass times squared distance."""
    chosen = torch.zeros(NUM_CENTROIDS, vectors.shape[1], device=vectors.device)
    distances = torch.full((len(vectors),), torch.inf, device=vectors.device)
    odds = masses
    for k, uniform in enumerate(torch.rand(NUM_CENTROIDS, generator=generator, dtype=torch.float64).tolist()):
        sums = odds.double().cumsum(0)
        if not float(sums[-1]) > 0:  # every vector is a seed already
            break
        index = torch.searchsorted(sums, sums[-1] * uniform, right=True).clamp_max(len(vectors) - 1)
        chosen[k] = vectors[index]
        distances = torch.minimum(distances, (vectors - chosen[k]).square().sum(1))
        odds = distances * masses
    return chosen


def storable_codebook(codebook: torch.Tensor) -> torch.Tensor:
    """``codebook`` rounded to float16 and back. Raises SpecError when it does not fit, DataError for NaN."""
    if not bool(torch.isfinite(codebook).all()):
        raise DataError("the codebook has NaN or infinite values; training diverged: use a lower learning rate")
    if bool((codebook.abs() > _FLOAT16_MAX).any()):
        raise SpecError(f"a codebook entry of {float(codebook.abs().max()):.3g} does not fit float16")
    return codebook.to(torch.float16).float()


def quantize(
    weight: torch.Tensor, spec: QuantSpec, *, scale: torch.Tensor | None = None, codebook: torch.Tensor | None = None
) -> QuantizedWeight:
    """Codes, scales and codebook as they are stored; codes are the nearest for the rounded codebook and scales.

    scale, codebook: use these instead of learning them; a codebook alone gets each row's best scale. Raises SpecError for
    a scale without a codebook.
    """
    if not bool(torch.isfinite(weight).all()):
        raise DataError("weight has NaN or infinite values; expected finite ones: repair or retrain the model first")
    if codebook is None:
        if scale is not None:
            raise SpecError("a product unit's scales are of no use without its codebook; give both or neither")
        codebook, scale = learn(weight, spec)
    codebook = storable_codebook(codebook)
    if scale is None:
        codes = assign(weight, codebook, _root_mean_squares(weight, spec), spec)
        scale = best_row_scale(weight, codes, codebook, spec)
    scale = storable_scale(scale, spec)
    codes = assign(weight, codebook, scale, spec)
    scales = scale.flatten().clone() if spec.has_scales else scale.new_empty(0)
    return QuantizedWeight(spec, codes, scales, codebook, weight.shape[1])
