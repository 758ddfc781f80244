"""The operators of :mod:`mixbits.kernels.ops` on matrices in the GPU layout: their tensors and numbers checked, then :mod:`.run`.

Activations are multiplied in their own dtype, sums are float32: weight-only kernels for few rows, tiles dequantized for tensor cores
for more, by :func:`~mixbits.kernels.triton.dispatch.choose_kernel`; with ``int8`` whole numbers on tensor cores for any number of rows.

Nothing here waits for the GPU, so indices are not checked there: those out of range give NaN. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch

from mixbits.errors import SpecError
from mixbits.kernels.triton import run
from mixbits.kernels.triton.layout import BLOCK_COLS, LANES, STRIP_ROWS, GpuWeight

_KINDS = {0: "int8", 1: "float"}  # as mixbits.kernels.cpu numbers them


def weight_of(
    packed: torch.Tensor, scales: torch.Tensor, group_scales: torch.Tensor | None, rows: int, cols: int, group: int, bits: int,
    mul: int, off: int,
) -> GpuWeight:  # fmt: skip
    """The matrix of an operator's arguments. Raises SpecError unless they belong together: a kernel would read beyond its tensors."""
    if bits not in (1, 2, 3, 4, 8) or rows < 1 or cols < 1 or group < 0:
        raise SpecError(f"({rows}, {cols}) at {bits} bits in groups of {group}: no such matrix has a GPU layout")
    strips = -(-rows // STRIP_ROWS)
    words = (strips, -(-cols // BLOCK_COLS), bits, STRIP_ROWS, LANES)
    wanted: list[tuple[str, torch.Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("packed", packed, words, (torch.int32,)),
        ("scales", scales, (strips * STRIP_ROWS,), (torch.float32,)),
    ]
    if group:
        if group_scales is None:
            raise SpecError(f"groups of {group} columns, but no group_scales; pass the matrix's")
        table = (-(-cols // group), strips * STRIP_ROWS)
        wanted.append(("group_scales", group_scales, table, (torch.float16, torch.uint8)))
    for name, tensor, shape, dtypes in wanted:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise SpecError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; ({rows}, {cols}) at {bits} bits takes {shape} of "
                f"{' or '.join(map(str, dtypes))}"
            )
        if tensor.device != packed.device:
            raise SpecError(f"{name} is on {tensor.device}, packed on {packed.device}; move them together")
    return GpuWeight(rows, cols, bits, mul, -off, group, packed, scales, group_scales if group else None)


def linear(x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None, activations: int) -> torch.Tensor:
    """As :func:`mixbits.kernels.ops.linear`; float64 is multiplied in float32."""
    return run.linear(_ready(x), weight, _ready_bias(bias), activations=_kind(activations)).to(x.dtype)


def embedding(ids: torch.Tensor, weight: GpuWeight) -> torch.Tensor:
    """As :func:`mixbits.kernels.ops.embedding`; on a GPU an id out of range gives a row of NaN."""
    return run.embedding(ids if ids.is_floating_point() else ids.to(torch.int64), weight)


def log_softmax_at(
    x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None, offsets: torch.Tensor, targets: torch.Tensor, activations: int
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As :func:`mixbits.kernels.ops.log_softmax_at`, targets in any order; on a GPU one out of range, or beyond the last offset, gives NaN."""
    if x.shape[-1:] != (weight.cols,):
        raise SpecError(f"x has shape {tuple(x.shape)}; expected (..., {weight.cols})")
    flat = _ready(x).reshape(-1, weight.cols)
    num = len(flat)
    for name, numbers in (("offsets", offsets), ("targets", targets)):
        if numbers.is_floating_point() or numbers.dim() != 1 or numbers.device != x.device:
            raise SpecError(
                f"{name} are {numbers.dtype} {tuple(numbers.shape)} on {numbers.device}; expected a row of whole numbers on {x.device}"
            )
    if len(offsets) != num + 1 or (len(targets) and not num):
        raise SpecError(
            f"offsets have shape {tuple(offsets.shape)} and targets {tuple(targets.shape)}; expected ({num + 1},), the last one the "
            "number of targets"
        )
    order = torch.arange(len(targets), device=x.device)
    sources = torch.searchsorted(offsets[1:].to(torch.int64).contiguous(), order, right=True)  # whose span holds it
    options = {"bias": _ready_bias(bias), "activations": _kind(activations)}
    partition, logits = run.log_sum_exp(flat, weight, targets.to(torch.int64), sources, **options)
    if num:
        logits = logits - partition[sources.clamp(max=num - 1)]
    return logits, partition.view(x.shape[:-1])


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that the kernels read; what is not a floating-point number is left for them to refuse."""
    known = tensor.dtype in run.DTYPES or not tensor.is_floating_point()
    return tensor.detach() if known else tensor.detach().to(torch.float32)


def _ready_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else _ready(bias).contiguous()


def _kind(activations: int) -> Any:
    return _KINDS.get(activations, activations)
