"""Kernels of the linear layer: few rows (:func:`gemv_kernel`), many (:func:`dot_kernel`), sums of splits, int8 activations.

Split-K writes one float32 partial per split and adds them in order (:func:`finish_kernel`): the same bits at every run, no atomics.
Row scales and the bias come last, in float32.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# (Triton reads annotations itself: only constexpr ones are allowed.)
from __future__ import annotations

import triton
import triton.language as tl

from mixbits.kernels.triton.decode import group_scales, int_levels, product_tile, row_offsets, shared_scale


@triton.jit
def store_result(
    y,
    out_ptr,
    rows_ptr,
    bias_ptr,
    x_scales_ptr,
    m,
    n,
    split,
    num_x,
    num_rows,
    INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Store the (BM, BN) sums: as they are into the split's plane, or scaled, with bias, in the output's dtype."""
    mask = (m < num_x)[:, None] & (n < num_rows)[None, :]
    at = m.to(tl.int64)[:, None] * num_rows + n[None, :]
    if IS_SPLIT:
        tl.store(out_ptr + split.to(tl.int64) * num_x * num_rows + at, y, mask=mask)
    else:
        y *= tl.load(rows_ptr + n, mask=n < num_rows, other=0)[None, :]
        if INT8:
            y *= tl.load(x_scales_ptr + m, mask=m < num_x, other=0)[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < num_rows, other=0).to(tl.float32)[None, :]
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gemv_kernel(
    x_ptr,
    words_ptr,
    groups_ptr,
    rows_ptr,
    bias_ptr,
    out_ptr,
    num_x,
    num_rows,
    num_cols,
    num_blocks,
    padded_rows,
    split_blocks,
    x_stride,
    BITS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    HOIST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y = x W^T + b for at most BM rows of x; grid (tiles of BN rows of W, splits of K). Float32 throughout."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER: tl.constexpr = 32 // WIDTH
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    m, lane = tl.arange(0, BM), tl.arange(0, 8)
    held = (n < padded_rows)[:, None]
    base = words_ptr + row_offsets(n, num_blocks, BITS)[:, None] + lane[None, :]
    x_base = x_ptr + m.to(tl.int64)[:, None] * x_stride + lane[None, :]
    acc = tl.zeros((BM, BN, 8), dtype=tl.float32)
    for block in range(split * split_blocks, tl.minimum((split + 1) * split_blocks, num_blocks)):
        at = base + block * (BITS * 128)
        if BITS == 3:
            high = tl.load(at + 256, mask=held, other=0)
        for p in tl.static_range(WIDTH):
            low = tl.load(at + p * 128, mask=held, other=0)
            if BITS != 3:
                high = low
            for s in tl.static_range(PER):
                start = (p * PER + s) * 8
                k = block * 256 + start + lane
                x_mask = (m < num_x)[:, None] & (k < num_cols)[None, :]
                x = tl.load(x_base + (block * 256 + start), mask=x_mask, other=0).to(tl.float32)
                w = int_levels(low, high, s * WIDTH, p * PER + s, BITS, MULTIPLY, OFFSET).to(tl.float32)
                if GROUP and GROUP % 8 == 0:
                    if (p * PER + s) * 8 % HOIST == 0:
                        scale = shared_scale(groups_ptr, n, block * 256 + start, padded_rows, num_cols, GROUP)
                    w *= scale[:, None]
                elif GROUP:
                    w *= group_scales(groups_ptr, n, k, padded_rows, num_cols, GROUP)
                acc += x[:, None, :] * w[None, :, :]
    y = tl.sum(acc, axis=2)
    store_result(
        y, out_ptr, rows_ptr, bias_ptr, rows_ptr, m, n, split, num_x, num_rows, False, HAS_BIAS, IS_SPLIT
    )  # fmt: skip


@triton.jit
def dot_kernel(
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
    split_blocks,
    x_stride,
    BITS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    HOIST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    INT8: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y = x W^T + b; grid (tiles of BN rows of W x tiles of BM rows of x, splits of K). Neighbours share a tile of W."""
    num_m_tiles = tl.cdiv(num_x, BM)
    tile, split = tl.program_id(0), tl.program_id(1)
    n = (tile // num_m_tiles) * BN + tl.arange(0, BN)
    m = (tile % num_m_tiles) * BM + tl.arange(0, BM)
    first, last = split * split_blocks, tl.minimum((split + 1) * split_blocks, num_blocks)
    acc = product_tile(
        x_ptr, words_ptr, groups_ptr, n, m, first, last, num_x, num_cols, num_blocks, padded_rows, x_stride,
        BITS, MULTIPLY, OFFSET, GROUP, HOIST, INT8, UPCAST, BM, BN,
    )  # fmt: skip
    store_result(
        tl.trans(acc), out_ptr, rows_ptr, bias_ptr, x_scales_ptr, m, n, split, num_x, num_rows, INT8, HAS_BIAS, IS_SPLIT
    )  # fmt: skip


@triton.jit
def finish_kernel(
    parts_ptr,
    rows_ptr,
    bias_ptr,
    x_scales_ptr,
    out_ptr,
    num_x,
    num_rows,
    num_splits,
    INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
):
    """Add the partials (num_splits, num_x, num_rows) in order, scale, add the bias; grid (num_x, tiles of BN)."""
    m = tl.program_id(0) + tl.zeros((1,), dtype=tl.int32)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    at = m.to(tl.int64)[:, None] * num_rows + n[None, :]
    y = tl.zeros((1, BN), dtype=tl.float32)
    for split in range(num_splits):
        part = parts_ptr + tl.cast(split, tl.int64) * num_x * num_rows + at
        y += tl.load(part, mask=(n < num_rows)[None, :], other=0)
    store_result(
        y, out_ptr, rows_ptr, bias_ptr, x_scales_ptr, m, n, tl.program_id(0), num_x, num_rows, INT8, HAS_BIAS, False
    )  # fmt: skip


@triton.jit
def quantize_kernel(x_ptr, out_ptr, scales_ptr, num_cols, x_stride, BK: tl.constexpr):
    """One row of x to int8 with scale max|x| / 127, rounded half to even; grid (rows,). A row with NaN or inf has scale NaN."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    largest = tl.zeros((BK,), dtype=tl.float32)
    poison = tl.zeros((BK,), dtype=tl.float32)
    for start in range(0, num_cols, BK):
        x = tl.load(x_ptr + m * x_stride + start + k, mask=start + k < num_cols, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        poison += x - x
    top = tl.max(largest, axis=0)
    tl.store(scales_ptr + m, top / 127 + tl.sum(poison, axis=0))
    inverse = tl.where(top > 0, 127 / top, 0.0)
    for start in range(0, num_cols, BK):
        x = tl.load(x_ptr + m * x_stride + start + k, mask=start + k < num_cols, other=0).to(tl.float32)
        scaled = x * inverse
        inside = tl.where(tl.abs(scaled) <= 127.5, scaled, 0.0)  # NaN becomes 0; the scale carries it
        rounded = (inside + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest whole number, half to even
        tl.store(out_ptr + m * num_cols + start + k, rounded.to(tl.int8), mask=start + k < num_cols)
