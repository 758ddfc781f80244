"""Calls of the Triton kernels on repacked weights: linear, embedding, dequantize, log-sum-exp with targets, int8 activations.

Every function takes a :class:`~mixbits.kernels.triton.layout.GpuWeight` on the activations' device and returns new tensors; inference
only, no gradients. Activations are float16, bfloat16 or float32; sums are float32. Float32 activations are multiplied in full precision
(``ieee``, no TF32): the reference mode. NaN and infinities pass through as in ``x @ W.T`` (with int8 activations the whole
row becomes NaN).

Limits: no synchronization on a GPU, so ids there are not checked and give NaN rows; on a CPU, where the kernels run in Triton's
interpreter (``TRITON_INTERPRET=1`` before Triton is imported), they raise. Importing this module needs Triton.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import torch

from mixbits.errors import KernelUnavailable, SpecError
from mixbits.kernels.triton.dispatch import GEMV_ROWS, KERNELS, Launch, bucket, choose_kernel, dot_rows
from mixbits.kernels.triton.layout import BLOCK_COLS, STRIP_ROWS, GpuWeight

try:
    import triton
except ImportError:
    raise KernelUnavailable("the GPU kernels need Triton, which is not installed; pip install 'mixbits[gpu]'") from None

from mixbits.kernels.triton import linear_kernels, table_kernels

INTERPRETED = not isinstance(linear_kernels.gemv_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, decided when Triton was first imported."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of activations and biases."""
_LSE_PROGRAMS = 264


def linear(
    x: torch.Tensor,
    weight: GpuWeight,
    bias: torch.Tensor | None = None,
    *,
    kernel: Literal["auto", "gemv", "dot", "dense"] | Launch = "auto",
    activations: Literal["float", "int8"] = "float",
) -> torch.Tensor:
    """``x W^T + b``: x (..., cols), bias (rows,) floating -> (..., rows) in x's dtype.

    ``kernel``: by :func:`~mixbits.kernels.triton.dispatch.choose_kernel`, by name with default tiles, or a whole Launch. ``activations``:
    'int8' quantizes x per row first and multiplies whole numbers (kernel 'dot' only; group sizes must be multiples of 32).
    Raises SpecError for shapes, dtypes, devices and combinations that do not fit, KernelUnavailable without a GPU or interpreter.
    """
    rows = _rows(x, weight, bias)
    num = len(rows)
    if num == 0:
        return x.new_zeros(*x.shape[:-1], weight.rows)
    launch = _launch(kernel, num, weight, x, activations)
    if launch.kernel == "dense":
        return torch.nn.functional.linear(
            x, dequantize(weight, dtype=x.dtype), None if bias is None else bias.to(x.dtype)
        )
    blocks_each = -(-weight.num_blocks // launch.splits)
    splits = -(-weight.num_blocks // blocks_each)
    out = torch.empty(num, weight.rows, dtype=x.dtype, device=x.device)
    target = out if splits == 1 else torch.empty(splits, num, weight.rows, dtype=torch.float32, device=x.device)
    given, x_scales = quantize_rows(rows) if activations == "int8" else (rows, weight.row_scales)
    sizes = (num, weight.rows, weight.cols, weight.num_blocks, weight.padded_rows, blocks_each, given.stride(0))
    options: dict[str, Any] = {
        **_grid_options(weight), "HAS_BIAS": bias is not None, "IS_SPLIT": splits > 1, "BM": launch.block_m, "BN": launch.block_n,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip
    groups, offset = _groups(weight), weight.row_scales if bias is None else bias
    tiles = -(-weight.rows // launch.block_n)
    with _on(x.device):
        if launch.kernel == "gemv":
            run: Any = linear_kernels.gemv_kernel[(tiles, splits)]
            run(given, weight.words, groups, weight.row_scales, offset, target, *sizes, **options)
        else:
            options |= {"INT8": activations == "int8", "UPCAST": _upcast(x.dtype)}
            run = linear_kernels.dot_kernel[(tiles * -(-num // launch.block_m), splits)]
            run(given, weight.words, groups, weight.row_scales, offset, x_scales, target, *sizes, **options)
        if splits > 1:
            flags = {"INT8": activations == "int8", "HAS_BIAS": bias is not None, "BN": 256}
            finish: Any = linear_kernels.finish_kernel[(num, -(-weight.rows // 256))]
            finish(target, weight.row_scales, offset, x_scales, out, num, weight.rows, splits, **flags)
    return out.view(*x.shape[:-1], weight.rows)


def embedding(ids: torch.Tensor, weight: GpuWeight, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows ``ids`` (integer, any shape) of the matrix, (..., cols) in ``dtype``; float32 is exact.

    Raises SpecError for other dtypes, IndexError for an id out of range on a CPU; on a GPU such a row is NaN.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise SpecError(f"ids have dtype {ids.dtype}; expected torch.int64 or torch.int32")
    _check_index("token id", ids, weight.rows)
    return _table(ids.reshape(-1), weight, dtype).view(*ids.shape, weight.cols)


def dequantize(weight: GpuWeight, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The whole matrix, (rows, cols) in ``dtype``; float32 is the packed layers' matrix bit for bit."""
    return _table(None, weight, dtype)


def log_sum_exp(
    x: torch.Tensor,
    weight: GpuWeight,
    targets: torch.Tensor,
    sources: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    activations: Literal["float", "int8"] = "float",
    tiles: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of the logits ``x W^T + b`` of each row, and the logits of single targets, without the logits in memory.

    x: (n, cols). targets: integer (t,) rows of W; sources: integer (t,) rows of x they belong to (default: one each, 0 .. n - 1).
    Returns float32 (n,) and (t,); ``logits - lse[sources]`` are log-probabilities in nats. ``tiles``: rows of x and of W a tile (tests,
    tuning). Raises SpecError as :func:`linear`, IndexError for an index out of range on a CPU; on a GPU such a logit is NaN.
    """
    if x.dim() != 2:
        raise SpecError(f"x has shape {tuple(x.shape)}; expected (rows, {weight.cols})")
    given = _rows(x, weight, bias)
    num = len(given)
    targets, sources = _target_pairs(targets, sources, num, x.device)
    _check_index("target", targets, weight.rows)
    _check_index("source row", sources, num)
    logits = torch.empty(len(targets), dtype=torch.float32, device=x.device)
    if num == 0:
        return logits.new_empty(0), logits.fill_(math.nan)
    int8 = activations == "int8"
    _check_int8(weight, activations)
    values, x_scales = quantize_rows(given) if int8 else (given, weight.row_scales)
    block_m, block_n = tiles or (dot_rows(num, x.dtype), 64)
    num_tiles, m_tiles = -(-weight.rows // block_n), -(-num // block_m)
    each = -(-num_tiles // max(1, min(num_tiles, _LSE_PROGRAMS // m_tiles)))
    splits = -(-num_tiles // each)
    parts = torch.empty(splits, num, dtype=torch.float32, device=x.device)
    options: dict[str, Any] = {**_grid_options(weight), "HAS_BIAS": bias is not None, "INT8": int8}
    tensors = (
        values,
        weight.words,
        _groups(weight),
        weight.row_scales,
        weight.row_scales if bias is None else bias,
        x_scales,
    )
    sizes = (num, weight.rows, weight.cols, weight.num_blocks, weight.padded_rows)
    with _on(x.device):
        reduce: Any = table_kernels.log_sum_exp_kernel[(m_tiles, splits)]
        tile_options = {"UPCAST": _upcast(x.dtype), "BM": block_m, "BN": block_n, "num_warps": 4, "num_stages": 2}
        reduce(*tensors, parts, *sizes, each, values.stride(0), **options, **tile_options)
        if len(targets):
            del options["HOIST"]
            gather: Any = table_kernels.targets_kernel[(len(targets),)]
            gather(*tensors, targets, sources, logits, *sizes, values.stride(0), **options)
    return parts[0] if splits == 1 else torch.logsumexp(parts, 0), logits


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x (n, k) as int8 with one scale a row, float32 (n,): ``max|x| / 127``, rounded half to even; NaN for a row that is not finite."""
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        with _on(x.device):
            run: Any = linear_kernels.quantize_kernel[(len(x),)]
            run(x, values, scales, x.shape[1], x.stride(0), BK=min(bucket(max(x.shape[1], 16)), 1024))
    return values, scales


def _table(ids: torch.Tensor | None, weight: GpuWeight, dtype: torch.dtype) -> torch.Tensor:
    if dtype not in DTYPES:
        raise SpecError(f"dtype is {dtype}; expected float16, bfloat16 or float32")
    _check_device(weight, ids)
    num, tile = (weight.rows, STRIP_ROWS) if ids is None else (len(ids), 1)
    out = torch.empty(num, weight.cols, dtype=dtype, device=weight.device)
    if num:
        options = {**_grid_options(weight), "HAS_IDS": ids is not None, "BR": tile}
        del options["HOIST"]
        sizes = (num, weight.rows, weight.cols, weight.num_blocks, weight.padded_rows)
        with _on(weight.device):
            run: Any = table_kernels.rows_kernel[(-(-num // tile), weight.num_blocks)]
            run(
                weight.words if ids is None else ids,
                weight.words,
                _groups(weight),
                weight.row_scales,
                out,
                *sizes,
                **options,
            )
    return out


def _rows(x: torch.Tensor, weight: GpuWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x as (n, cols) with neighbouring columns adjacent, after the checks that all products share."""
    if x.dim() == 0 or x.shape[-1] != weight.cols:
        raise SpecError(
            f"x has shape {tuple(x.shape)}; expected (..., {weight.cols}) for a ({weight.rows}, {weight.cols}) weight"
        )
    if x.dtype not in DTYPES:
        raise SpecError(f"x has dtype {x.dtype}; expected float16, bfloat16 or float32")
    if bias is not None and (tuple(bias.shape) != (weight.rows,) or bias.dtype not in DTYPES or bias.stride(0) != 1):
        raise SpecError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; expected a contiguous floating ({weight.rows},)"
        )
    _check_device(weight, x, bias)
    flat = x.detach().reshape(-1, weight.cols)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _check_device(weight: GpuWeight, *tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.device != weight.device:
            raise SpecError(f"the weight is on {weight.device}, a tensor on {tensor.device}; move them together")
    if weight.device.type == "cpu" and not INTERPRETED:
        raise KernelUnavailable(
            "the weight is on the CPU; Triton kernels need a GPU, or its interpreter: set TRITON_INTERPRET=1 before Python starts"
        )


def _check_int8(weight: GpuWeight, activations: str) -> None:
    if activations not in ("float", "int8"):
        raise SpecError(f"activations is {activations!r}; expected 'float' or 'int8'")
    if activations == "float":
        return
    if weight.group_size % 32:
        raise SpecError(
            f"group size {weight.group_size} is no multiple of 32; int8 activations need one, or row scales: take the others (of a "
            "loaded model: kernels='float32')"
        )
    if weight.group_size == 0 and weight.cols > 1 << 17:
        raise SpecError(f"{weight.cols} columns may overflow int32 sums; int8 activations take at most {1 << 17}")


def _check_index(name: str, index: torch.Tensor, size: int) -> None:
    """On a GPU a check would wait for it; there the kernel answers NaN."""
    if index.device.type != "cpu" or not index.numel():
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= size:
        raise IndexError(f"{name} out of range: got {low} .. {high}; there are {size} rows")


def _target_pairs(
    targets: torch.Tensor, sources: torch.Tensor | None, num: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    if sources is None:
        sources = torch.arange(num, device=device)
    for name, index in (("targets", targets), ("sources", sources)):
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32) or index.device != device:
            raise SpecError(
                f"{name} is {index.dtype} {tuple(index.shape)} on {index.device}; expected one-dimensional integers on {device}"
            )
    if len(targets) != len(sources):
        raise SpecError(f"there are {len(targets)} targets and {len(sources)} source rows; expected as many")
    return targets.contiguous(), sources.contiguous()


def _launch(kernel: str | Launch, num: int, weight: GpuWeight, x: torch.Tensor, activations: str) -> Launch:
    _check_int8(weight, activations)
    if isinstance(kernel, Launch):
        launch = kernel
    elif kernel == "auto" and activations == "float":
        facts = {"group_size": weight.group_size, "dtype": x.dtype, "device": x.device}
        launch = choose_kernel(num, weight.rows, weight.cols, weight.bits, **facts)  # type: ignore[arg-type]
    elif kernel in ("auto", *KERNELS):
        name = "dot" if kernel == "auto" else kernel
        size = bucket(num) if name == "gemv" else dot_rows(num, x.dtype)
        launch = Launch(name, block_m=size)  # type: ignore[arg-type]
    else:
        raise SpecError(f"unknown kernel {kernel!r}; expected 'auto', {', '.join(map(repr, KERNELS))} or a Launch")
    if launch.kernel == "gemv" and (num > GEMV_ROWS or num > launch.block_m):
        raise SpecError(
            f"kernel 'gemv' with block_m {launch.block_m} got {num} rows; it takes up to block_m and {GEMV_ROWS}: use 'dot'"
        )
    if activations == "int8" and launch.kernel != "dot":
        raise SpecError(f"kernel {launch.kernel!r} has no int8 activations; use 'dot' or 'auto'")
    return launch


def _grid_options(weight: GpuWeight) -> dict[str, Any]:
    grid = {"BITS": weight.bits, "MULTIPLY": weight.multiply, "OFFSET": weight.offset}
    return grid | {
        "GROUP": weight.group_size,
        "HOIST": math.gcd(weight.group_size, BLOCK_COLS) if weight.group_size else BLOCK_COLS,
    }


def _groups(weight: GpuWeight) -> torch.Tensor:
    """The group scales, or any tensor in their place: the kernel does not look."""
    return weight.row_scales if weight.group_scales is None else weight.group_scales


def _upcast(dtype: torch.dtype) -> bool:
    return INTERPRETED and dtype == torch.bfloat16


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device; make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
