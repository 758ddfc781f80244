"""The layout that the GPU kernels read, and the repacking from the one on disk (docs/formats/packed.md).

Strips of 16 rows, blocks of 256 columns, 32-bit words: ``words[strip, block, plane, row, lane]``, shape (strips, blocks, bits, 16, 8).
Column ``256 * block + 8 * j + lane`` (j = 0 .. 31) of a row lies in the bits of its 32 / bits neighbours in j: bits
``bits * (j % per)`` and up of plane ``j // per``, ``per = 32 / bits`` codes a word. Three bits are two planes of the low two bits and
one plane of the high bit. So

* a strip is one stream, read front to back as K grows; a warp reads 16 rows x 8 lanes = 512 consecutive bytes;
* a code is one shift and one mask, and codes of one shift are 8 neighbouring columns: no shuffles between threads;
* 1, 2, 3, 4 and 8 bits take exactly that many bits a weight; ternary runs as 2 bits (base 3 is for disk).

The weight is ``(code * multiply + offset) * group_scales[group, row] * row_scales[row]``, the bracket a whole number (half steps count
twice; the half is in ``row_scales``), group scales as float16 or, of 8-bit scales, as their bytes with the shared number in
``row_scales``. Every product but the last is exact in float32, so the result is the packed layers' weight bit for bit.

Rows and columns are padded here, whatever the shape: at most 15 rows and 255 columns, worth at most twice the size from 128
columns on. Limits: product units are refused (:func:`is_supported`; they run in PyTorch); plain torch operations, on any
device, a few million codes at a time; at most 2^31 words (8 GiB) a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mixbits.errors import SpecError
from mixbits.scales import join_scale
from mixbits.spec import QuantSpec

STRIP_ROWS, BLOCK_COLS, LANES = 16, 256, 8
_PER_LANE = BLOCK_COLS // LANES
_TERNARY = 1.58
_CHUNK_CODES = 1 << 22


@dataclass(frozen=True, eq=False)
class GpuWeight:
    """A (rows, cols) matrix as the Triton kernels read it; made by :func:`repack`.

    ``words``: int32 (strips, blocks, bits, 16, 8). ``row_scales``: float32 (padded rows,). ``group_scales``: (groups, padded rows)
    float16 or uint8, or None; ``group_size`` columns share one (0: no groups). ``bits``: 1, 2, 3, 4 or 8.
    """

    rows: int
    cols: int
    bits: int
    multiply: int
    offset: int
    group_size: int
    words: torch.Tensor
    row_scales: torch.Tensor
    group_scales: torch.Tensor | None

    @property
    def device(self) -> torch.device:
        """Where the words are."""
        return self.words.device

    @property
    def padded_rows(self) -> int:
        """Rows in memory, a multiple of 16."""
        return self.words.shape[0] * STRIP_ROWS

    @property
    def num_blocks(self) -> int:
        """Blocks of 256 columns."""
        return self.words.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of words and scales, padding included."""
        held = (self.words, self.row_scales, self.group_scales)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def to(self, device: torch.device | str) -> GpuWeight:
        """The same weight on another device."""
        moved = None if self.group_scales is None else self.group_scales.to(device)
        fixed = (self.rows, self.cols, self.bits, self.multiply, self.offset, self.group_size)
        return GpuWeight(*fixed, self.words.to(device), self.row_scales.to(device), moved)


def is_supported(spec: QuantSpec) -> bool:
    """Whether units of ``spec`` have a GPU layout: all but 16-bit and product units."""
    return spec.is_quantized and not spec.is_product


def repack(
    packed: torch.Tensor,
    spec: QuantSpec,
    rows: int,
    cols: int,
    *,
    scales: torch.Tensor,
    scale_codes: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> GpuWeight:
    """The GPU layout of a unit as it lies in the file: ``packed`` uint8 (code bytes,), ``scales`` float16, ``scale_codes`` uint8.

    ``device``: where to (default: where ``packed`` is); the bytes are moved first and repacked there. Codes are taken as checked
    (``mixbits.packing.bitpack.check_codes``). Raises SpecError for a spec without a GPU layout and for tensors of another size or dtype.
    """
    if not is_supported(spec):
        raise SpecError(f"spec {spec} has no GPU layout; expected 1 to 8 bits with levels: run this unit in PyTorch")
    _check(packed, spec, rows, cols, scales, scale_codes)
    packed = packed.to(device) if device is not None else packed
    bits = 2 if spec.bit_width == _TERNARY else int(spec.bit_width)
    strips, blocks = -(-rows // STRIP_ROWS), -(-cols // BLOCK_COLS)
    words = torch.zeros(strips, blocks, bits, STRIP_ROWS, LANES, dtype=torch.int32, device=packed.device)
    if words.numel() >= 1 << 31:
        raise SpecError(f"({rows}, {cols}) at {bits} bits takes {words.numel()} words; expected fewer than 2^31")
    step = max(_CHUNK_CODES // max(blocks * BLOCK_COLS * STRIP_ROWS, 1), 1)
    for first in range(0, strips, step):
        top = min((first + step) * STRIP_ROWS, rows)
        codes = _codes(packed, spec.code_bits, first * STRIP_ROWS * cols, top * cols).view(-1, cols)
        padding = (0, blocks * BLOCK_COLS - cols, 0, -len(codes) % STRIP_ROWS)
        words[first : first + step] = _to_words(torch.nn.functional.pad(codes, padding), bits, blocks)
    low, unit = spec.levels[0], 0.5 if spec.levels[0] % 1 else 1.0
    row_scales, group_scales = _scales(spec, rows, cols, strips * STRIP_ROWS, unit, scales, scale_codes, packed.device)
    multiply, offset = int((spec.levels[1] - low) / unit), int(low / unit)
    return GpuWeight(rows, cols, bits, multiply, offset, spec.group_size or 0, words, row_scales, group_scales)


def repack_unit(unit: Any, *, device: torch.device | str | None = None) -> GpuWeight:
    """The GPU layout of a packed layer (``mixbits.packing.modules.PackedUnit``; of a tied one, that of its owner)."""
    held = unit.storage
    tensors = {"scales": getattr(held, "scales", None), "scale_codes": getattr(held, "scale_codes", None)}
    return repack(held.weight, held.spec, held.rows, held.cols, device=device, **tensors)  # type: ignore[arg-type]


def _check(
    packed: torch.Tensor,
    spec: QuantSpec,
    rows: int,
    cols: int,
    scales: torch.Tensor,
    scale_codes: torch.Tensor | None,
) -> None:
    if rows < 1 or cols < 1:
        raise SpecError(f"the unit's shape is ({rows}, {cols}); expected at least (1, 1)")
    wanted = [("packed", packed, torch.uint8, spec.code_bytes(rows * cols))]
    wanted.append(("scales", scales, torch.float16, spec.num_float_scales(rows, cols)))
    if spec.scale_bits == 8:
        if scale_codes is None:
            raise SpecError(f"spec {spec} has 8-bit scales; got no scale_codes: pass the unit's")
        wanted.append(("scale_codes", scale_codes, torch.uint8, spec.num_scales(rows, cols)))
    for name, tensor, dtype, size in wanted:
        if tensor.dtype != dtype or tensor.numel() != size:
            raise SpecError(
                f"{name} is {tensor.dtype} of {tensor.numel()} elements; ({rows}, {cols}) of spec {spec} needs {size} of {dtype}"
            )


def _codes(packed: torch.Tensor, code_bits: float, start: int, stop: int) -> torch.Tensor:
    """Codes start .. stop of the unit's stream, uint8."""
    if code_bits == 8:
        return packed[start:stop]
    if code_bits == _TERNARY:
        per, size, radix = 5, 1, 3
    else:
        per, size, radix = (8, 3, 8) if code_bits == 3 else (8 // int(code_bits), 1, 2 ** int(code_bits))
    first = start // per
    piece = packed[first * size : -(-stop // per) * size]
    piece = torch.nn.functional.pad(piece, (0, -piece.numel() % size)).view(-1, size).to(torch.int32)
    number = sum((piece[:, b] << (8 * b) for b in range(1, size)), piece[:, 0])
    digits = []
    for _ in range(per):
        digits.append((number % radix).to(torch.uint8))
        number = torch.div(number, radix, rounding_mode="floor")
    return torch.stack(digits, 1).view(-1)[start - first * per : stop - first * per]


def _to_words(codes: torch.Tensor, bits: int, blocks: int) -> torch.Tensor:
    """(16 strips, 256 blocks) uint8 codes -> int32 (strips, blocks, bits, 16, 8)."""
    split = codes.view(-1, STRIP_ROWS, blocks, _PER_LANE, LANES)
    planes = [split] if bits != 3 else [split & 3, split >> 2]
    words = []
    for plane, width in zip(planes, (2, 1) if bits == 3 else (bits,), strict=True):
        per = 32 // width
        fields = plane.reshape(*plane.shape[:3], width, per, LANES)
        word = fields[..., 0, :].to(torch.int32)
        for s in range(1, per):
            word |= fields[..., s, :].to(torch.int32) << (s * width)  # wraps into the sign bit
        words.append(word)
    return torch.cat(words, 3).permute(0, 2, 3, 1, 4)


def _scales(
    spec: QuantSpec,
    rows: int,
    cols: int,
    padded: int,
    unit: float,
    scales: torch.Tensor,
    scale_codes: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Row scales float32 (padded,) with the grid's unit in them, and group scales (groups, padded) or None."""
    row_scales = torch.zeros(padded, dtype=torch.float32, device=device)
    scales = scales.to(device)
    if spec.granularity != "group":
        if spec.scale_bits == 8:
            assert scale_codes is not None
            scales = join_scale(scales, scale_codes.to(device))
        row_scales[:rows] = scales.float() * unit
        return row_scales, None
    stored = scales if spec.scale_bits == 16 else scale_codes
    assert stored is not None
    row_scales[:rows] = unit if spec.scale_bits == 16 else scales.float() / 256 * unit
    table = stored.to(device).view(rows, spec.num_groups(cols))
    return row_scales, torch.nn.functional.pad(table, (0, 0, 0, padded - rows)).T.contiguous()
