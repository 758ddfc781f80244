"""Which number format a training run computes in, and keeping it for the whole of the run.

bfloat16 halves memory and is faster where the hardware multiplies it; where it is emulated it is far slower (a matrix product on an
AVX2 CPU: 2.4 against 55 GFLOP/s for float32). ``auto`` therefore asks the machine. A run that was started is resumed in the format it
was started in, on any machine: it is written down beside the checkpoints.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal, cast

import torch

from mixbits.errors import DataError, FormatError
from mixbits.jsonfile import read_json, write_json

RUN_FILE = "mixbits_run.json"
_X86_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # in torch since 2.6; a missing one counts as no

Precision = Literal["bfloat16", "float32"]


def fast_bfloat16(device: Literal["cuda", "cpu"]) -> bool:
    """True when this machine multiplies bfloat16 matrices in hardware: Ampere GPUs on; AVX512-BF16, AMX or ARM bf16 CPUs."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):
        return any(bool(getattr(torch.cpu, name, bool)()) for name in _X86_CHECKS)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN has no fast product either
        return False


def resolve_precision(wanted: Literal["auto", "bfloat16", "float32"], device: Literal["cuda", "cpu"]) -> Precision:
    """What ``wanted`` means on this machine."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if fast_bfloat16(device) else "float32"


def run_precision(
    wanted: Literal["auto", "bfloat16", "float32"], device: Literal["cuda", "cpu"], folder: Path, *, started: bool
) -> Precision:
    """The precision of the run in ``folder``: the one it was started in, or else :func:`resolve_precision`, written down there.

    Raises DataError when the run was ``started`` in another precision than the one asked for by name, FormatError when its
    note is damaged.
    """
    note = folder / RUN_FILE
    if started and note.is_file():
        data = read_json(note)
        found = data.get("precision") if isinstance(data, dict) else None
        if found not in ("bfloat16", "float32"):
            raise FormatError(
                f"{note}: precision is {found!r}; expected bfloat16 or float32; remove {folder} and start again"
            )
        if wanted not in ("auto", found):
            raise DataError(
                f"{folder}: this run was started in {found}, precision is {wanted} now; resume with {found} or auto, "
                "or remove the folder and start again"
            )
        return cast(Precision, found)
    resolved = resolve_precision(wanted, device)
    write_json(note, {"precision": resolved})
    return resolved
