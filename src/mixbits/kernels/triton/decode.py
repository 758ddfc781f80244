"""Device functions that read the layout of :mod:`.layout`: from words to levels, weights and products.

Two ways to read a block of 256 columns. For few activation rows a tile is (rows, 8 lanes) and the shift is a constant of the unrolled
loop. For tensor cores a tile must be at least 32 columns wide, so four threads read the same word and each takes another shift
(:func:`product_tile`): four times the reads of L1, none more of memory, and no exchange between threads. Tables and single rows read
a whole block at once (:func:`block_weights`).

``HOIST`` is gcd(group size, 256): group boundaries in a block lie at its multiples, so a scale that many columns share is read once. Group
sizes that do not divide into a tile are read weight by weight: right, but slower. Runs compiled and in Triton's interpreter.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# (Triton reads annotations itself: only constexpr ones are allowed.)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def int_levels(low, high, shift, high_shift, BITS: tl.constexpr, MULTIPLY: tl.constexpr, OFFSET: tl.constexpr):
    """Words -> whole-number levels, int32; ``high`` is the plane of high bits, for 3 bits only."""
    if BITS == 3:  # noqa: SIM108
        code = ((low >> shift) & 3) | (((high >> high_shift) & 1) << 2)
    else:
        code = (low >> shift) & ((1 << BITS) - 1)
    return code * MULTIPLY + OFFSET


@triton.jit
def row_offsets(n, num_blocks, BITS: tl.constexpr):
    """Offset of the first word of rows ``n``: strip by strip, 8 words a row and plane."""
    return (n // 16) * (num_blocks * (BITS * 128)) + (n % 16) * 8


@triton.jit
def group_scales(groups_ptr, n, k, padded_rows, num_cols, GROUP: tl.constexpr):
    """Scales of rows ``n`` (BN,) at columns ``k`` (C,), float32 (BN, C)."""
    at = groups_ptr + (k // GROUP)[None, :] * padded_rows + n[:, None]
    return tl.load(at, mask=(n < padded_rows)[:, None] & (k < num_cols)[None, :], other=0).to(tl.float32)


@triton.jit
def shared_scale(groups_ptr, n, k, padded_rows, num_cols, GROUP: tl.constexpr):
    """Scales of rows ``n`` (BN,) at one column ``k``, float32 (BN,)."""
    group = tl.minimum(k, num_cols - 1) // GROUP  # beyond the last column any scale will do: x is 0 there
    return tl.load(groups_ptr + group * padded_rows + n, mask=n < padded_rows, other=0).to(tl.float32)


@triton.jit
def block_weights(
    words_ptr,
    groups_ptr,
    n,
    held,
    block,
    num_cols,
    num_blocks,
    padded_rows,
    BITS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Weights of rows ``n`` (R,) in one block without their row scale, float32 (R, 256); rows not ``held`` are rubbish."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER: tl.constexpr = 32 // WIDTH
    column = tl.arange(0, 256)
    lane, j = column % 8, column // 8
    at = words_ptr + row_offsets(n, num_blocks, BITS)[:, None] + block * (BITS * 128) + lane[None, :]
    low = tl.load(at + (j // PER)[None, :] * 128, mask=held[:, None], other=0)
    high = low
    if BITS == 3:
        high = tl.load(at + 256, mask=held[:, None], other=0)
    weights = int_levels(low, high, ((j % PER) * WIDTH)[None, :], j[None, :], BITS, MULTIPLY, OFFSET).to(tl.float32)
    if GROUP:
        weights *= group_scales(groups_ptr, n, block * 256 + column, padded_rows, num_cols, GROUP)
    return weights


@triton.jit
def product_tile(
    x_ptr,
    words_ptr,
    groups_ptr,
    n,
    m,
    first_block,
    last_block,
    num_x,
    num_cols,
    num_blocks,
    padded_rows,
    x_stride,
    BITS: tl.constexpr,
    MULTIPLY: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    HOIST: tl.constexpr,
    INT8: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """W x^T for rows ``n`` (BN,) of W and ``m`` (BM,) of x, without row scales: float32 (BN, BM), over some of the blocks.

    The weight is on the left, dequantized in registers and rounded to x's dtype. ``INT8``: x is int8, whole-number levels are multiplied
    in int32, group scales come after. ``UPCAST``: multiply in float32 (the interpreter has no bfloat16 product).
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PER: tl.constexpr = 32 // WIDTH
    lane = tl.arange(0, 32)
    quarter = lane // 8
    held = (n < padded_rows)[:, None]
    base = words_ptr + row_offsets(n, num_blocks, BITS)[:, None] + (lane % 8)[None, :]
    x_base = x_ptr + m.to(tl.int64)[None, :] * x_stride + lane[:, None]
    if INT8 and GROUP == 0:  # noqa: SIM108
        acc = tl.zeros((BN, BM), dtype=tl.int32)
    else:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
    SHARED: tl.constexpr = HOIST if HOIST < PER * 8 else PER * 8
    for step in range(first_block * WIDTH, last_block * WIDTH):  # a plane of low bits, PER * 8 columns
        block, plane = step // WIDTH, step % WIDTH
        low = tl.load(base + (block * BITS + plane) * 128, mask=held, other=0)
        high = low
        if BITS == 3:
            high = tl.load(base + block * (BITS * 128) + 256, mask=held, other=0)
        for c in tl.static_range(PER // 4):
            start = step * (PER * 8) + c * 32
            k = start + lane
            x = tl.load(x_base + start, mask=(m < num_x)[None, :] & (k < num_cols)[:, None], other=0)
            fields = (c * 4 + quarter)[None, :]
            levels = int_levels(low, high, fields * WIDTH, plane * PER + fields, BITS, MULTIPLY, OFFSET)
            if GROUP and GROUP % 32 == 0 and c * 32 % SHARED == 0:
                scale = shared_scale(groups_ptr, n, start, padded_rows, num_cols, GROUP)
            if INT8 and GROUP == 0:
                acc = tl.dot(levels.to(tl.int8), x, acc, out_dtype=tl.int32)
            elif INT8:
                if c * 32 % SHARED == 0:
                    part = tl.zeros((BN, BM), dtype=tl.int32)
                part = tl.dot(levels.to(tl.int8), x, part, out_dtype=tl.int32)
                if (c + 1) * 32 % SHARED == 0:
                    acc += part.to(tl.float32) * scale[:, None]
            else:
                weights = levels.to(tl.float32)
                if GROUP and GROUP % 32 == 0:
                    weights *= scale[:, None]
                elif GROUP:
                    weights *= group_scales(groups_ptr, n, k, padded_rows, num_cols, GROUP)
                weights = weights.to(x.dtype)
                if UPCAST:
                    acc = tl.dot(weights.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
                else:
                    acc = tl.dot(weights, x, acc, input_precision="ieee")
    return acc.to(tl.float32)
