"""The CPU library (csrc/): finding it, its types, and packed matrices in its run-time layout.

The library is plain C behind ctypes: no Python or torch ABI, so one build serves every version of both; calls release the GIL. It
is compiled when the package is installed, if there is a C++ compiler; otherwise :func:`library` gives None and callers take the
PyTorch path, slower, which is said once. `MIXBITS_ISA` forces an instruction set, `MIXBITS_THREADS` the number of threads
(default: OMP_NUM_THREADS, or the cores this process may use).

Limits: at most 65,536 columns; product units have no run-time layout.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mixbits.errors import KernelUnavailable, SpecError
from mixbits.quantspec import QuantSpec

ABI_VERSION = 1
TOO_LONG, NO_MEMORY = 6, 7
"""Error numbers that callers tell apart: ``MB_TOO_LONG``, ``MB_NO_MEMORY`` of csrc/mixbits.h."""
MAX_THREADS = 1024
Activations = Literal["int8", "float32"]
_NUMBER = {"int8": 0, "float32": 1}
_LIBRARY_NAMES = {"win32": "mixbits_cpu.dll", "darwin": "libmixbits_cpu.dylib"}
LIBRARY_NAME = _LIBRARY_NAMES.get(sys.platform, "libmixbits_cpu.so")

_i32, _i64, _f32, _ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class MatrixStruct(ctypes.Structure):
    """``mb_matrix`` of csrc/mixbits.h."""

    _fields_ = [
        ("packed", _ptr), ("scales", _ptr), ("rows", _i64), ("cols", _i64), ("group", _i64), ("bits", _i32), ("mul", _i32),
        ("off", _i32), ("reserved", _i32),
    ]  # fmt: skip


class LayerStruct(ctypes.Structure):
    """``mb_layer``."""

    _fields_ = [
        *((name, MatrixStruct) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((f"{name}_bias", _ptr) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((f"norm{i}_{what}", _ptr) for i in (1, 2) for what in ("gain", "bias")),
    ]


class ModelStruct(ctypes.Structure):
    """``mb_model``."""

    _fields_ = [
        *((name, _i32) for name in (
            "family", "num_layers", "hidden", "heads", "kv_heads", "head_dim", "feed_forward", "context", "activation",
            "norm_first", "position_offset", "reserved",
        )),
        ("eps", _f32), ("attention_scale", _f32),
        *((name, MatrixStruct) for name in ("embedding", "positions", "head")),
        *((name, _ptr) for name in ("final_gain", "final_bias", "head_bias", "rope_cos", "rope_sin")),
        ("layers", ctypes.POINTER(LayerStruct)),
    ]  # fmt: skip


_MATRIX = ctypes.POINTER(MatrixStruct)
_MODEL = ctypes.POINTER(ModelStruct)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "mb_abi_version": (_i32, []),
    "mb_error_text": (ctypes.c_char_p, [_i32]),
    "mb_isa": (ctypes.c_char_p, []),
    "mb_isas": (ctypes.c_char_p, []),
    "mb_set_isa": (_i32, [ctypes.c_char_p]),
    "mb_set_num_threads": (None, [_i32]),
    "mb_get_num_threads": (_i32, []),
    "mb_packed_bytes": (_i64, [_i64, _i64, _i64, _i32]),
    "mb_num_scales": (_i64, [_i64, _i64, _i64]),
    "mb_repack": (_i32, [_ptr, _i64, _i64, _i64, _i64, _i32, _i32, _ptr]),
    "mb_repack_scales": (_i32, [_ptr, _i64, _f32, _i64, _i64, _i64, _ptr]),
    "mb_linear": (_i32, [_MATRIX, _i32, _ptr, _i64, _ptr, _ptr]),
    "mb_embedding": (_i32, [_MATRIX, _ptr, _i64, _ptr]),
    "mb_log_softmax_at": (_i32, [_MATRIX, _i32, _ptr, _i64, _ptr, _ptr, _ptr, _ptr, _ptr]),
    "mb_score_forest": (_i32, [_MODEL, _i32, _ptr, _ptr, _i64, _i64, _ptr]),
    "mb_state_new": (_ptr, [_MODEL, _i32, _i64]),
    "mb_state_free": (None, [_ptr]),
    "mb_state_reset": (_i32, [_ptr, _i64]),
    "mb_state_length": (_i64, [_ptr, _i64]),
    "mb_step": (_i32, [_ptr, _ptr, _ptr, _i64, _ptr]),
    "mb_check_model": (_i32, [_MODEL]),
}


def _candidates() -> list[Path]:
    """Where the library may lie: the one asked for, beside this file, where the installed package has it (editable installs)."""
    asked = os.environ.get("MIXBITS_LIBRARY")
    if asked:
        return [Path(asked)]
    found = [Path(__file__).with_name(LIBRARY_NAME)]
    from importlib import metadata

    try:
        files = metadata.files("mixbits") or []
    except metadata.PackageNotFoundError:
        files = []
    return found + [Path(str(f.locate())) for f in files if f.name == LIBRARY_NAME]


def _threads() -> int:
    for name in ("MIXBITS_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").strip()
        if text.isdecimal() and len(text) < 10 and 1 <= int(text) <= MAX_THREADS:
            return int(text)
        if text and name == "MIXBITS_THREADS":
            raise SpecError(
                f"MIXBITS_THREADS is {text[:100]!r}; expected a whole number of threads, 1 to {MAX_THREADS}"
            )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and where it is, or None and why not."""
    reasons = []
    for path in _candidates():
        if not path.is_file():
            reasons.append(
                f"no {path.name} beside the package" if "MIXBITS_LIBRARY" not in os.environ else f"no {path}"
            )
            continue
        try:
            found = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(found, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            reasons.append(f"{path} cannot be loaded ({str(error)[:200]})")
            continue
        if (version := found.mb_abi_version()) != ABI_VERSION:
            reasons.append(f"{path} has interface {version}, this mixbits needs {ABI_VERSION}: install again")
            continue
        found.mb_set_num_threads(_threads())
        asked = os.environ.get("MIXBITS_ISA")
        if found.mb_set_isa(asked.encode() if asked else None):
            raise SpecError(
                f"MIXBITS_ISA is {asked!r}; this machine and build have {found.mb_isas().decode().replace(',', ', ')}"
            )
        return found, str(path)
    return None, "; ".join(dict.fromkeys(reasons))


def is_available() -> bool:
    """Whether the compiled library can be used. Raises SpecError for a MIXBITS_ISA or MIXBITS_THREADS that makes no sense."""
    return _load()[0] is not None


def why_unavailable() -> str:
    """The reason why :func:`is_available` is false; where the library is otherwise."""
    return _load()[1]


@functools.cache
def say_unavailable() -> None:
    """Warn, once a process, that the slow path is taken."""
    warnings.warn(
        f"mixbits runs without its compiled kernels, several times slower: {why_unavailable()}. "
        "Install a C++ compiler and install mixbits again.",
        stacklevel=3,
    )


def library() -> ctypes.CDLL:
    """The loaded library. Raises KernelUnavailable saying why there is none."""
    found, reason = _load()
    if found is None:
        raise KernelUnavailable(f"the compiled kernels of mixbits are missing: {reason}; install with a C++ compiler")
    return found


def check(error: int, where: str) -> None:
    """Raise SpecError (MemoryError) with the library's words for an error number other than 0."""
    if error:
        text = f"{where}: {library().mb_error_text(error).decode()}"
        raise MemoryError(text) if error == NO_MEMORY else SpecError(text)


def isa() -> str:
    """Instruction set in use, e.g. ``avx512-vnni``."""
    return library().mb_isa().decode()


def isas() -> list[str]:
    """Instruction sets this machine and build can use, best first; the last one is ``scalar``."""
    return library().mb_isas().decode().split(",")


def set_isa(name: str | None) -> None:
    """Use the instruction set ``name`` in this process, None: the best. Raises SpecError for one that is not there."""
    if library().mb_set_isa(None if name is None else name.encode()):
        raise SpecError(f"no instruction set {name!r} here; this machine and build have {', '.join(isas())}")


def num_threads() -> int:
    """Threads of the library, the calling one included."""
    return library().mb_get_num_threads()


def set_num_threads(count: int) -> None:
    """For the whole process. Raises SpecError unless ``count`` is from 1 to 1024."""
    if not 1 <= count <= MAX_THREADS:
        raise SpecError(f"threads is {count}; expected 1 to {MAX_THREADS}")
    library().mb_set_num_threads(count)


def activation_number(activations: str) -> int:
    """``int8`` or ``float32`` as the library counts them. Raises SpecError for anything else."""
    if activations not in _NUMBER:
        raise SpecError(f"activations is {activations!r}; expected {' or '.join(get_args(Activations))}")
    return _NUMBER[activations]


@dataclass(frozen=True)
class Layout:
    """Numbers that describe a matrix in the run-time layout: weight = (mul * code - off) * scale, scales times ``factor``."""

    bits: int
    mul: int
    off: int
    group: int
    ternary: bool
    factor: float

    @staticmethod
    def of(spec: QuantSpec) -> Layout:
        """Raises SpecError for a product unit."""
        if spec.is_product:
            raise SpecError(f"spec {spec}: product units have no run-time layout")
        if not spec.is_quantized:
            return Layout(16, 1, 0, 0, False, 1.0)
        ternary = spec.bit_width == 1.58
        bits, levels = (2 if ternary else int(spec.bit_width)), spec.levels
        step = levels[1] - levels[0]
        factor = 0.5 if levels[0] != int(levels[0]) else 1.0
        return Layout(bits, round(step / factor), round(-levels[0] / factor), spec.group_size or 0, ternary, factor)


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (rows, cols) in the run-time layout: ``packed`` uint8, ``scales`` float32 (empty with 16 bits)."""

    packed: torch.Tensor
    scales: torch.Tensor
    rows: int
    cols: int
    layout: Layout

    @property
    def num_bytes(self) -> int:
        """Of codes and scales, as they lie in memory."""
        return self.packed.numel() + 4 * self.scales.numel()

    @functools.cached_property
    def struct(self) -> MatrixStruct:
        """For the library; the tensors must outlive it."""
        k = self.layout
        scales = self.scales.data_ptr() if self.scales.numel() else None
        return MatrixStruct(self.packed.data_ptr(), scales, self.rows, self.cols, k.group, k.bits, k.mul, k.off, 0)


def repack(codes: torch.Tensor, scale: torch.Tensor | None, spec: QuantSpec, rows: int, cols: int) -> PackedMatrix:
    """From the file's codes (1-D uint8; 16 bits: float16 (rows, cols)) and compact scale, (rows, 1), (rows, groups) or (1, 1).

    Raises SpecError for product units, tensors that do not fit and shapes the library refuses, KernelUnavailable without library.
    """
    lib, layout = library(), Layout.of(spec)
    where = f"({rows}, {cols}) of {spec}"
    size = lib.mb_packed_bytes(rows, cols, layout.group, layout.bits)
    if size < 0:
        raise SpecError(f"{where}: {lib.mb_error_text(1).decode()}")
    wanted = torch.uint8 if spec.is_quantized else torch.float16
    if codes.dtype != wanted or codes.device.type != "cpu":
        raise SpecError(f"{where}: codes are {codes.dtype} on {codes.device}; expected {wanted} on the CPU")
    codes = codes.contiguous()
    packed = torch.empty(size, dtype=torch.uint8)
    num_bytes = codes.numel() * codes.element_size()
    check(lib.mb_repack(codes.data_ptr(), num_bytes, rows, cols, layout.group, layout.bits, layout.ternary, packed.data_ptr()), where)  # fmt: skip
    if not spec.is_quantized:
        return PackedMatrix(packed, torch.empty(0), rows, cols, layout)
    groups = spec.num_groups(cols)
    expected = (1, 1) if spec.granularity == "tensor" else (rows, groups)
    if scale is None or tuple(scale.shape) != expected:
        shape = None if scale is None else tuple(scale.shape)
        raise SpecError(f"{where}: scales have shape {shape}; expected {expected}")
    scale = scale.to(torch.float32).contiguous()
    scales = torch.empty(lib.mb_num_scales(rows, cols, layout.group))
    per_row = 0 if spec.granularity == "tensor" else groups
    check(lib.mb_repack_scales(scale.data_ptr(), per_row, layout.factor, rows, cols, layout.group, scales.data_ptr()), where)  # fmt: skip
    return PackedMatrix(packed, scales, rows, cols, layout)
