"""Codes to bytes and back: a dense little-endian bit stream, or five ternary digits a byte.

Dense widths (1, 2, 3, 4, 8 bits): code ``i`` of the unit, counted row by row over the whole matrix, occupies bits
``[i * n, (i + 1) * n)`` of the stream; bit ``b`` of the stream is bit ``b % 8`` (least significant first) of byte ``b // 8``.
Ternary (bit width 1.58): byte ``j`` holds codes ``5j .. 5j + 4`` as ``sum(code[5j + k] * 3**k)``, so 243 values of a byte
are used (1.6 bits a weight). Whatever is left of the last byte is zero. Rows are not padded: a unit takes exactly
``QuantSpec.code_bytes(num_codes)`` bytes. Codes of a product unit are bytes (8 bits), one per vector of columns.

Why this way: one stream a unit is the smallest fixed-width layout, and every code can be read alone
(:func:`gather_codes`), which is all an embedding lookup needs. Limits: plain PyTorch, a few tensor passes per unit.
"""

from __future__ import annotations

import functools

import torch

from mixbits.errors import FormatError, SpecError
from mixbits.spec import QuantSpec

TERNARY = 1.58
_DENSE_WIDTHS = (1, 2, 3, 4, 8)
_POWERS_OF_3 = (1, 3, 9, 27, 81)


def _check_width(bit_width: float) -> None:
    if bit_width != TERNARY and bit_width not in _DENSE_WIDTHS:
        raise SpecError(f"cannot pack {bit_width!r} bits a code; expected 1, 1.58, 2, 3, 4 or 8")


def _num_bytes(bit_width: float, num_weights: int) -> int:
    return -(-num_weights // 5) if bit_width == TERNARY else -(-num_weights * int(bit_width) // 8)


def _group(bit_width: float) -> tuple[int, int]:
    """Smallest whole group as (codes, bytes)."""
    if bit_width == TERNARY:
        return 5, 1
    return (8, 3) if bit_width == 3 else (8 // int(bit_width), 1)


def pack_codes(codes: torch.Tensor, bit_width: float) -> torch.Tensor:
    """Pack ``codes`` (uint8, any shape, read row by row) into a 1-D uint8 tensor of ``QuantSpec.code_bytes`` bytes.

    ``bit_width``: bits of one code, ``QuantSpec.code_bits``.
    Raises SpecError for another dtype, an unknown width, or a code that does not fit the width.
    """
    _check_width(bit_width)
    if codes.dtype != torch.uint8:
        raise SpecError(f"codes have dtype {codes.dtype}; expected torch.uint8 indices into the levels")
    flat = codes.reshape(-1)
    top = 2 if bit_width == TERNARY else 2 ** int(bit_width) - 1
    if flat.numel() and int(flat.max()) > top:
        raise SpecError(f"code {int(flat.max())} does not fit {bit_width:g} bits; expected 0 .. {top}")
    if bit_width == 8:
        return flat.clone()
    per_group, group_bytes = _group(bit_width)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % per_group)).view(-1, per_group)
    words = torch.zeros(len(padded), dtype=torch.int32, device=codes.device)
    for k in range(per_group):
        digit = padded[:, k].to(torch.int32)
        words += digit * _POWERS_OF_3[k] if bit_width == TERNARY else digit << (k * int(bit_width))
    packed = torch.stack([(words >> (8 * b)) & 255 for b in range(group_bytes)], dim=1).to(torch.uint8)
    return packed.reshape(-1)[: _num_bytes(bit_width, flat.numel())].clone()


@functools.cache
def _ternary_digits(device: torch.device) -> torch.Tensor:
    """(256, 5) table: the five digits of every byte; ten times faster than dividing."""
    digits = [[byte // power % 3 for power in _POWERS_OF_3] for byte in range(256)]
    with torch.inference_mode(False):
        return torch.tensor(digits, dtype=torch.uint8, device=device)


def expand_codes(packed: torch.Tensor, bit_width: float, num_weights: int) -> torch.Tensor:
    """The unchecked inverse of :func:`pack_codes`, for bytes already checked: uint8 codes, shape (num_weights,)."""
    if bit_width == 8:
        return packed
    if bit_width == TERNARY:
        return torch.index_select(_ternary_digits(packed.device), 0, packed.int()).reshape(-1)[:num_weights]
    per_group, group_bytes = _group(bit_width)
    if group_bytes > 1:
        bytes_ = torch.nn.functional.pad(packed, (0, -packed.numel() % group_bytes)).view(-1, group_bytes)
        words = bytes_[:, 0].to(torch.int32)
        for b in range(1, group_bytes):
            words |= bytes_[:, b].to(torch.int32) << (8 * b)
    else:
        words = packed
    codes = torch.empty(len(words), per_group, dtype=torch.uint8, device=packed.device)
    for k in range(per_group):
        codes[:, k] = (words >> (k * int(bit_width))) & (2 ** int(bit_width) - 1)
    return codes.reshape(-1)[:num_weights]


def gather_codes(packed: torch.Tensor, bit_width: float, indices: torch.Tensor) -> torch.Tensor:
    """Codes at the flat positions ``indices`` (int64, any shape), without unpacking the rest. Unchecked; uint8."""
    if bit_width == 8:
        return packed[indices]
    if bit_width == TERNARY:
        powers = torch.tensor(_POWERS_OF_3, dtype=torch.uint8, device=packed.device)
        byte = packed[torch.div(indices, 5, rounding_mode="floor")]
        return torch.div(byte, powers[indices % 5], rounding_mode="floor") % 3
    width = int(bit_width)
    bits = indices * width
    word = packed[bits >> 3].to(torch.int32)
    if width == 3:  # the only width that can straddle two bytes
        word |= packed[((bits >> 3) + 1).clamp_max(max(packed.numel() - 1, 0))].to(torch.int32) << 8
    return ((word >> (bits & 7)) & (2**width - 1)).to(torch.uint8)


def check_codes(packed: torch.Tensor, spec: QuantSpec, num_codes: int, *, where: str = "codes") -> None:
    """Raise FormatError naming ``where`` unless ``packed`` is a canonical packing of ``num_codes`` codes of ``spec``.

    Checked: dtype and length, every code an existing level, unused bits of the last byte zero.
    """
    _check_width(spec.code_bits)
    expected = _num_bytes(spec.code_bits, num_codes)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != expected:
        raise FormatError(
            f"{where}: got {packed.dtype} of shape {tuple(packed.shape)}; {num_codes} codes of spec {spec} take "
            f"({expected},) of torch.uint8"
        )
    if not num_codes:
        return
    if spec.code_bits == TERNARY:
        largest = int(packed.max())
        if largest > 242:
            raise FormatError(f"{where}: a byte is {largest}; five ternary codes give at most 242: the file is damaged")
    elif spec.num_levels < 2 ** int(spec.code_bits):
        _check_largest_code(packed, spec, num_codes, where)
    per_group, _ = _group(spec.code_bits)
    last = num_codes % per_group
    if last:
        tail = packed[_num_bytes(spec.code_bits, num_codes - last) :].tolist()
        used = 3**last if spec.code_bits == TERNARY else 1 << (last * int(spec.code_bits))
        if int.from_bytes(bytes(tail), "little") >= used:
            raise FormatError(f"{where}: unused bits after the last code are not zero: the file is damaged")


def _check_largest_code(packed: torch.Tensor, spec: QuantSpec, num_codes: int, where: str) -> None:
    chunk = 3 << 22  # a multiple of every group, so that a huge unit is not unpacked at once
    for start in range(0, packed.numel(), chunk):
        part = packed[start : start + chunk]
        count = min(num_codes - start * 8 // int(spec.code_bits), part.numel() * 8 // int(spec.code_bits))
        codes = expand_codes(part, spec.code_bits, count)
        if int(codes.max()) >= spec.num_levels:
            raise FormatError(
                f"{where}: code {int(codes.max())} is out of range; spec {spec} has codes 0 .. {spec.num_levels - 1}: "
                "the file is damaged"
            )


def unpack_codes(
    packed: torch.Tensor, bit_width: float, num_weights: int, *, spec: QuantSpec | None = None, where: str = "codes"
) -> torch.Tensor:
    """Checked inverse of :func:`pack_codes`: uint8 codes, shape (num_weights,).

    ``spec``: whose levels the codes must lie in (default: any code of the width). Raises FormatError naming ``where`` for
    another length or dtype, a code that is no level, or padding that is not zero.
    """
    _check_width(bit_width)
    if spec is None:
        spec = QuantSpec(bit_width, "half-step" if bit_width in (2, 3, 4) else "papers")
        if bit_width == 8:  # every byte is a code of the width, though not of the 8-bit grid
            if packed.dtype != torch.uint8 or tuple(packed.shape) != (num_weights,):
                raise FormatError(f"{where}: got shape {tuple(packed.shape)}; expected ({num_weights},) of torch.uint8")
            return packed.clone()
    elif spec.code_bits != bit_width:
        raise SpecError(f"bit_width is {bit_width:g} but spec is {spec}; they must agree")
    check_codes(packed, spec, num_weights, where=where)
    return expand_codes(packed, bit_width, num_weights).clone()
