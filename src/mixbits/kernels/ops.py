"""PyTorch operators over packed matrices: linear, embedding, log-softmax at targets, on CPUs and GPUs.

``torch.ops.mixbits.linear`` and its siblings take the tensors and numbers of a matrix in a run-time layout, have fake kernels
(``torch.compile(fullgraph=True)`` traces through them) and refuse autograd clearly. The wrappers below take the matrix itself. There are
two layouts, and each has its kernels: of a :class:`~mixbits.kernels.cpu.PackedMatrix` the bytes, for the compiled library; of a
:class:`~mixbits.kernels.triton.layout.GpuWeight` the 32-bit words, for Triton (on a CPU only in its interpreter).

Registered with ``torch.library`` around ctypes, which costs about 5 microseconds a call; nothing is loaded until the first call.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from mixbits.errors import SpecError
from mixbits.kernels import cpu
from mixbits.kernels.cpu import Activations, MatrixStruct, PackedMatrix
from mixbits.kernels.triton.layout import GpuWeight

Matrix = PackedMatrix | GpuWeight
_MATRIX = (
    "Tensor packed, Tensor scales, Tensor? group_scales, int rows, int cols, int group, int bits, int mul, int off"
)
_LIB = torch.library.Library("mixbits", "DEF")
_LIB.define(f"linear(Tensor x, {_MATRIX}, Tensor? bias, int activations) -> Tensor")
_LIB.define(f"embedding(Tensor ids, {_MATRIX}) -> Tensor")
_LIB.define(
    f"log_softmax_at(Tensor x, {_MATRIX}, Tensor? bias, Tensor offsets, Tensor targets, int activations) -> (Tensor, Tensor)"
)


def _triton() -> Any:
    """The Triton kernels' operators. Raises KernelUnavailable without Triton."""
    from mixbits.kernels.triton import operators

    return operators


def _matrix(packed: torch.Tensor, *others: Any) -> MatrixStruct | GpuWeight:
    """The matrix of an operator's arguments, in the layout that its tensors have."""
    return _triton().weight_of(packed, *others) if packed.dtype == torch.int32 else _struct(packed, *others)


def _struct(
    packed: torch.Tensor, scales: torch.Tensor, group_scales: torch.Tensor | None, rows: int, cols: int, group: int, bits: int,
    mul: int, off: int,
) -> MatrixStruct:  # fmt: skip
    _check_on_cpu(packed=packed, scales=scales)
    library = cpu.library()
    size, wanted = library.mb_packed_bytes(rows, cols, group, bits), library.mb_num_scales(rows, cols, group)
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() != size:
        raise SpecError(
            f"packed is {packed.dtype} with {packed.numel()} bytes; ({rows}, {cols}) at {bits} bits takes {size} of uint8"
        )
    if bits != 16 and (scales.dtype != torch.float32 or not scales.is_contiguous() or scales.numel() != wanted):
        raise SpecError(f"scales are {scales.dtype} {tuple(scales.shape)}; expected ({wanted},) of float32")
    if group_scales is not None:
        raise SpecError("group_scales are given; in the layout of the CPU they are part of scales")
    return MatrixStruct(packed.data_ptr(), scales.data_ptr() if bits != 16 else None, rows, cols, group, bits, mul, off, 0)  # fmt: skip


def _check_on_cpu(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_cpu:
            raise SpecError(
                f"{name} is on {tensor.device}; a matrix in the layout of the CPU is multiplied there: move the model"
            )


def _rows_of(x: torch.Tensor, cols: int) -> torch.Tensor:
    _check_on_cpu(x=x)
    if x.shape[-1:] != (cols,) or not x.is_floating_point():
        raise SpecError(
            f"x is {x.dtype} {tuple(x.shape)}; expected floating-point numbers, {cols} in the last dimension"
        )
    return x.reshape(-1, cols).to(torch.float32).contiguous()


def _bias(bias: torch.Tensor | None, rows: int) -> tuple[torch.Tensor | None, int | None]:
    if bias is None:
        return None, None
    _check_on_cpu(bias=bias)
    if tuple(bias.shape) != (rows,):
        raise SpecError(f"bias has shape {tuple(bias.shape)}; expected ({rows},)")
    ready = bias.detach().to(torch.float32).contiguous()
    return ready, ready.data_ptr()


def _multiply(x: torch.Tensor, matrix: MatrixStruct, bias: torch.Tensor | None, activations: int) -> torch.Tensor:
    flat, (kept, address) = _rows_of(x, matrix.cols), _bias(bias, matrix.rows)
    out = torch.empty(len(flat), matrix.rows)
    error = cpu.library().mb_linear(
        ctypes.byref(matrix), activations, flat.data_ptr(), len(flat), address, out.data_ptr()
    )
    cpu.check(error, "mixbits::linear")
    del kept
    return out.to(x.dtype).view(*x.shape[:-1], matrix.rows)


def _linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *others, bias, activations = arguments
    matrix = _matrix(*others)
    if isinstance(matrix, GpuWeight):
        return _triton().linear(x, matrix, bias, activations)
    return _multiply(x, matrix, bias, activations)


def _embedding(ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
    matrix = _matrix(*arguments)
    if isinstance(matrix, GpuWeight):
        return _triton().embedding(ids, matrix)
    _check_on_cpu(ids=ids)
    if ids.is_floating_point():
        raise SpecError(f"ids are {ids.dtype}; expected whole numbers")
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    out = torch.empty(len(flat), matrix.cols)
    cpu.check(cpu.library().mb_embedding(ctypes.byref(matrix), flat.data_ptr(), len(flat), out.data_ptr()), "mixbits::embedding")  # fmt: skip
    return out.view(*ids.shape, matrix.cols)


def _log_softmax_at(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *others, bias, offsets, targets, activations = arguments
    matrix = _matrix(*others)
    if isinstance(matrix, GpuWeight):
        return _triton().log_softmax_at(x, matrix, bias, offsets, targets, activations)
    flat, (kept, address) = _rows_of(x, matrix.cols), _bias(bias, matrix.rows)
    _check_on_cpu(offsets=offsets, targets=targets)
    for name, numbers in (("offsets", offsets), ("targets", targets)):
        if numbers.is_floating_point():
            raise SpecError(f"{name} are {numbers.dtype}; expected whole numbers")
    offsets, targets = offsets.to(torch.int64).contiguous(), targets.to(torch.int64).contiguous()
    if tuple(offsets.shape) != (len(flat) + 1,) or targets.dim() != 1 or int(offsets[-1]) != len(targets):
        raise SpecError(
            f"offsets have shape {tuple(offsets.shape)} and targets {tuple(targets.shape)}; expected ({len(flat) + 1},), the last "
            "one the number of targets"
        )
    out, partition = torch.empty(len(targets)), torch.empty(len(flat))
    error = cpu.library().mb_log_softmax_at(
        ctypes.byref(matrix), activations, flat.data_ptr(), len(flat), address, offsets.data_ptr(), targets.data_ptr(),
        out.data_ptr(), partition.data_ptr(),
    )  # fmt: skip
    cpu.check(error, "mixbits::log_softmax_at")
    del kept
    return out, partition.view(x.shape[:-1])


def _refuse_autograd(name: str) -> Any:
    operator = getattr(torch.ops.mixbits, name).default

    def forward(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"mixbits::{name} has no gradient: packed weights are for inference; use torch.no_grad(), or train the full model"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return forward


for _name, _kernel in (("linear", _linear), ("embedding", _embedding), ("log_softmax_at", _log_softmax_at)):
    for _device in ("CPU", "CUDA"):
        _LIB.impl(_name, _kernel, _device)
        _LIB.impl(_name, _refuse_autograd(_name), f"Autograd{_device}")


@torch.library.register_fake("mixbits::linear", lib=_LIB)
def _fake_linear(x: Any, packed: Any, scales: Any, group_scales: Any, rows: int, *others: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.register_fake("mixbits::embedding", lib=_LIB)
def _fake_embedding(
    ids: Any, packed: Any, scales: Any, group_scales: Any, rows: int, cols: int, *others: Any
) -> torch.Tensor:
    return ids.new_empty(*ids.shape, cols, dtype=torch.float32)


@torch.library.register_fake("mixbits::log_softmax_at", lib=_LIB)
def _fake_log_softmax_at(x: Any, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    targets = others[-2]
    return x.new_empty(targets.shape, dtype=torch.float32), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _numbers(matrix: Matrix) -> tuple[Any, ...]:
    if isinstance(matrix, GpuWeight):
        words, rows, groups = matrix.words, matrix.row_scales, matrix.group_scales
        return words, rows, groups, matrix.rows, matrix.cols, matrix.group_size, matrix.bits, matrix.multiply, -matrix.offset  # fmt: skip
    k = matrix.layout
    return matrix.packed, matrix.scales, None, matrix.rows, matrix.cols, k.group, k.bits, k.mul, k.off


def linear(
    x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None, *, activations: Activations = "int8"
) -> torch.Tensor:
    """``x W^T + bias``: x (..., cols) floating; returns (..., rows) in x's dtype, summed in float32.

    ``int8``: x is rounded to 8 bits with one scale per row. ``float32``: it is not; it is multiplied in float32, on a GPU in its own dtype.
    A row of x with NaN or infinity gives a row of NaN (on a GPU with ``float32`` what the product gives). Raises SpecError for shapes
    and devices that do not fit, RuntimeError for an x that needs a gradient, KernelUnavailable.
    """
    number = cpu.activation_number(activations)
    grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if grad or torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return torch.ops.mixbits.linear(x, *_numbers(matrix), bias, number)
    if isinstance(matrix, GpuWeight):
        return _triton().linear(x, matrix, bias, number)
    return _multiply(x, matrix.struct, bias, number)  # the dispatcher takes 30 microseconds for twelve arguments


def embedding(ids: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Rows of the matrix: ids (...) whole numbers; returns (..., cols) float32. An id out of range raises SpecError, on a GPU it gives NaN."""
    return torch.ops.mixbits.embedding(ids, *_numbers(matrix))


def log_softmax_at(
    x: torch.Tensor,
    matrix: Matrix,
    offsets: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activations: Activations = "int8",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of some outputs of a softmax layer, whose logits never exist as a whole.

    x (..., cols), m rows in all; offsets (m + 1,): the targets of row i are ``targets[offsets[i]:offsets[i + 1]]``, ascending.
    Returns log softmax(x W^T + bias) at them, (num_targets,), and the log-partition of each row, (...,). A target out of range
    raises SpecError, on a GPU it gives NaN.
    """
    return torch.ops.mixbits.log_softmax_at(
        x, *_numbers(matrix), bias, offsets, targets, cpu.activation_number(activations)
    )
