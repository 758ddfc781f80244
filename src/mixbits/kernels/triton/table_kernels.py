"""Kernels on rows of the table: lookup or dequantize, log-sum-exp of all logits, logits of single targets."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# (Triton reads annotations itself: only constexpr ones are allowed.)
from __future__ import annotations

import triton
import triton.language as tl

from mixbits.kernels.triton.decode import block_weights, product_tile


@triton.jit
def rows_kernel(
    ids_ptr,
    words_ptr,
    groups_ptr,
    rows_ptr,
    out_ptr,
    num_ids,
    num_rows,
    num_cols,
    num_blocks,
    padded_rows,
    BITS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BR: tl.constexpr,
):
    """Rows ``ids`` of the matrix (all of them without HAS_IDS), dequantized; grid (tiles of BR, blocks). An id out of range gives NaN."""
    at = tl.program_id(0) * BR + tl.arange(0, BR)
    block = tl.program_id(1)
    if HAS_IDS:
        ids = tl.load(ids_ptr + at, mask=at < num_ids, other=0)
        inside = (ids >= 0) & (ids < num_rows)
        n = tl.where(inside, ids, 0).to(tl.int32)
    else:
        inside = at < num_rows
        n = at
    weights = block_weights(
        words_ptr, groups_ptr, n, inside, block, num_cols, num_blocks, padded_rows, BITS, MULTIPLY, OFFSET, GROUP
    )
    weights *= tl.load(rows_ptr + n, mask=inside, other=float("nan"))[:, None]
    k = block * 256 + tl.arange(0, 256)
    mask = (at < num_ids)[:, None] & (k < num_cols)[None, :]
    tl.store(
        out_ptr + at.to(tl.int64)[:, None] * num_cols + k[None, :], weights.to(out_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def log_sum_exp_kernel(
    x_ptr,
    words_ptr,
    groups_ptr,
    rows_ptr,
    bias_ptr,
    x_scales_ptr,
    out_ptr,
    num_x,
    num_rows,
    num_cols,
    num_blocks,
    padded_rows,
    split_tiles,
    x_stride,
    BITS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    HOIST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT8: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """log sum exp of logits over a split of the vocabulary, (splits, num_x) float32; grid (tiles of BM, splits)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    peak = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    num_tiles = tl.cdiv(num_rows, BN)
    for tile in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, num_tiles)):
        n = tile * BN + tl.arange(0, BN)
        logits = product_tile(
            x_ptr, words_ptr, groups_ptr, n, m, 0, num_blocks, num_x, num_cols, num_blocks, padded_rows, x_stride,
            BITS, MULTIPLY, OFFSET, GROUP, HOIST, INT8, UPCAST, BM, BN,
        )  # fmt: skip
        logits *= tl.load(rows_ptr + n, mask=n < num_rows, other=0)[:, None]
        if INT8:
            logits *= tl.load(x_scales_ptr + m, mask=m < num_x, other=0)[None, :]
        if HAS_BIAS:
            logits += tl.load(bias_ptr + n, mask=n < num_rows, other=0).to(tl.float32)[:, None]
        logits = tl.where((n < num_rows)[:, None], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=0))
        shift = tl.where(tl.abs(new_peak) == float("inf"), 0.0, new_peak)  # inf - inf would be NaN
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[None, :]), axis=0)
        peak = new_peak
    shift = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    tl.store(out_ptr + split.to(tl.int64) * num_x + m, shift + tl.log(total), mask=m < num_x)


@triton.jit
def targets_kernel(
    x_ptr,
    words_ptr,
    groups_ptr,
    rows_ptr,
    bias_ptr,
    x_scales_ptr,
    targets_ptr,
    sources_ptr,
    out_ptr,
    num_x,
    num_rows,
    num_cols,
    num_blocks,
    padded_rows,
    x_stride,
    BITS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT8: tl.constexpr,
):
    """One logit: row ``sources[t]`` of x times row ``targets[t]`` of W; grid (targets,). An index out of range gives NaN."""
    t = tl.program_id(0)
    target, source = tl.load(targets_ptr + t), tl.load(sources_ptr + t)
    inside = (target >= 0) & (target < num_rows) & (source >= 0) & (source < num_x)
    n = tl.where(inside, target, 0).to(tl.int32) + tl.zeros((1,), dtype=tl.int32)
    m = tl.where(inside, source, 0).to(tl.int64)
    column = tl.arange(0, 256)
    acc = tl.zeros((256,), dtype=tl.float32)
    for block in range(num_blocks):
        weights = block_weights(
            words_ptr, groups_ptr, n, n >= 0, block, num_cols, num_blocks, padded_rows, BITS, MULTIPLY, OFFSET, GROUP
        )
        k = block * 256 + column
        x = tl.load(x_ptr + m * x_stride + k, mask=k < num_cols, other=0)
        if not INT8:
            weights = weights.to(x.dtype).to(tl.float32)  # as in the logits that the log-sum-exp adds up
        acc += tl.sum(weights, axis=0) * x.to(tl.float32)
    row = tl.sum(n, axis=0)
    logit = tl.sum(acc, axis=0) * tl.load(rows_ptr + row)
    if INT8:
        logit *= tl.load(x_scales_ptr + m)
    if HAS_BIAS:
        logit += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(out_ptr + t, tl.where(inside, logit, float("nan")))
