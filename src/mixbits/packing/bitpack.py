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

import numpy as np
import numpy.typing as npt
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


def check_codes(
    packed: torch.Tensor | npt.NDArray[np.uint8], spec: QuantSpec, num_codes: int, *, where: str = "codes"
) -> None:
    """Raise FormatError naming ``where`` unless ``packed`` is a canonical packing of ``num_codes`` codes of ``spec``.

    Checked: dtype and length, every code an existing level, unused bits of the last byte zero. A numpy array is read in
    place, a chunk at a time.
    """
    _check_width(spec.code_bits)
    expected = _num_bytes(spec.code_bits, num_codes)
    is_bytes = packed.dtype == (np.uint8 if isinstance(packed, np.ndarray) else torch.uint8)
    if not is_bytes or tuple(packed.shape) != (expected,):
        raise FormatError(
            f"{where}: got {packed.dtype} of shape {tuple(packed.shape)}; {num_codes} codes of spec {spec} take "
            f"({expected},) of torch.uint8"
        )
    if not num_codes:
        return
    stream: npt.NDArray[np.uint8] = packed if isinstance(packed, np.ndarray) else packed.cpu().numpy()
    if spec.code_bits == TERNARY:
        largest = int(stream.max())
        if largest > 242:
            raise FormatError(f"{where}: a byte is {largest}; five ternary codes give at most 242: the file is damaged")
    elif spec.num_levels < 2 ** int(spec.code_bits) and _has_top_code(stream, int(spec.code_bits)):
        raise FormatError(
            f"{where}: code {2 ** int(spec.code_bits) - 1} is out of range; spec {spec} has codes 0 .. "
            f"{spec.num_levels - 1}: the file is damaged"
        )
    per_group, _ = _group(spec.code_bits)
    last = num_codes % per_group
    if last:
        tail = stream[_num_bytes(spec.code_bits, num_codes - last) :].tobytes()
        used = 3**last if spec.code_bits == TERNARY else 1 << (last * int(spec.code_bits))
        if int.from_bytes(tail, "little") >= used:
            raise FormatError(f"{where}: unused bits after the last code are not zero: the file is damaged")


_CHUNK_BYTES = 24 << 11
"""Whole 64-bit words and whole 3-bit codes, small enough that all that is computed from them stays in the cache."""
_FIRST_BITS = np.tile(np.array([0x9249249249249249, 0x4924924924924924, 0x2492492492492492], "<u8"), _CHUNK_BYTES // 24)
"""Every third bit: where the 3-bit codes of a chunk begin, word by word."""


def _has_top_code(stream: npt.NDArray[np.uint8], width: int) -> bool:
    """Whether a code has all its bits set: the one code that grids of ``2 ** width - 1`` levels (3, 4, 8 bits) do not use."""
    for start in range(0, len(stream), _CHUNK_BYTES):
        part = stream[start : start + _CHUNK_BYTES]
        if width == 8:
            found = int(part.max()) == 255
        elif width == 4:
            found = int(part.max()) >= 0xF0 or int((part | 0xF0).max()) == 255
        else:
            found = _has_code_7(part)
        if found:
            return True
    return False


def _has_code_7(part: npt.NDArray[np.uint8]) -> bool:
    """Three bits, 64 codes in three words at a time; what is padded has code 0."""
    words = np.zeros(-(-len(part) // 24) * 3 + 1, dtype="<u8")
    words.view(np.uint8)[: len(part)] = part
    # Bit i of `run` is set where bits i, i + 1 and i + 2 of the stream are: a 7 if a code begins there.
    run = words[:-1] >> np.uint64(1)
    run |= words[1:] << np.uint64(63)
    run &= words[:-1]
    pairs = words[:-1] >> np.uint64(2)
    pairs |= words[1:] << np.uint64(62)
    run &= pairs
    run &= _FIRST_BITS[: len(run)]
    return bool(run.any())


def code_histogram(stream: npt.NDArray[np.uint8], spec: QuantSpec, num_codes: int) -> npt.NDArray[np.int64]:
    """How often each code stands in the packed ``stream`` (checked before): int64 counts, shape (num_levels,).

    Counts symbols of several codes, bytes or (3 bits) 12 bits, and adds up what they hold.
    """
    width = spec.code_bits
    per_group, group_bytes = _group(width)
    whole = num_codes // per_group * group_bytes
    rest = expand_codes(torch.from_numpy(stream[whole:].copy()), width, num_codes % per_group)
    counts = np.bincount(rest.numpy(), minlength=256)
    symbol_bits = 12 if width == 3 else 8
    seen = np.zeros(1 << symbol_bits, dtype=np.int64)
    for start in range(0, whole, _CHUNK_BYTES):
        part = stream[start : min(start + _CHUNK_BYTES, whole)]
        if width == 3:
            first, middle, last = part.reshape(-1, 3).astype(np.uint16).T
            seen += np.bincount(first | (middle & 15) << 8, minlength=4096)
            part = middle >> 4 | last << 4  # type: ignore[assignment]
        seen += np.bincount(part, minlength=1 << symbol_bits)
    symbols = np.arange(1 << symbol_bits)
    for k in range(5 if width == TERNARY else symbol_bits // int(width)):
        code = symbols // 3**k % 3 if width == TERNARY else symbols >> (k * int(width)) & (2 ** int(width) - 1)
        counts += np.bincount(code, weights=seen, minlength=256).astype(np.int64)
    return counts[: spec.num_levels]


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
