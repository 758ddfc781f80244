"""How one weight matrix is stored: bits of a code, grid, what shares a scale, and the bytes that takes.

Grids (levels are in units of the scale alpha):

* ``papers`` (Xu et al., ICASSP 2021): 1 bit {-1, +1}; 1.58 bit {-1, 0, 1}, which is what the papers call
  2 bit; 3 bit {-3..3}; 4 bit {-7..7}; 8 bit {-127..127}.
* ``half-step``: 2, 3, 4 bit {+-1/2, +-3/2, ...}, all 2^n codes used.
* ``float``: 16 bit, the unit is stored as float16.
* ``product``: 8/v bit, one byte names one of 256 learned vectors (the unit's codebook, float16) for v input columns of a row.

One scale per output row, per ``group_size`` input columns of a row, or per tensor, as float16 or (``scale_bits=8``) as a
byte times a shared float16 (:mod:`mixbits.scales`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from mixbits.errors import SpecError

Grid = Literal["papers", "half-step", "float", "product"]
Granularity = Literal["row", "tensor", "group"]
_WIDTHS: Mapping[str, tuple[float, ...]] = {
    "papers": (1, 1.58, 3, 4, 8),
    "half-step": (2, 3, 4),
    "float": (16,),
}
_GRIDS = (*_WIDTHS, "product")
NUM_CENTROIDS = 256
"""Vectors in the codebook of a product unit: one byte an index."""
MIN_GROUP_SIZE, MAX_GROUP_SIZE = 2, 1 << 16
MIN_VECTOR_SIZE, MAX_VECTOR_SIZE = 2, 64
_WIDTH_TOLERANCE = 0.005  # 8 / 12 bits may be written 0.667


def default_grid(bit_width: float) -> Grid:
    """The grid a bare bit-width means: product below 1 bit, half-step at 2, float at 16, the papers' otherwise."""
    if bit_width == 16:
        return "float"
    if 0 < bit_width < 1:
        return "product"
    return "half-step" if bit_width == 2 else "papers"


@dataclass(frozen=True, order=True)
class QuantSpec:
    """How one unit is stored. ``QuantSpec(2)`` is the 2-bit half-step grid with one float16 scale per output row.

    ``group_size``: input columns that share a scale, with granularity 'group' only; the last group of a row may be
    shorter. ``scale_bits``: 16, or 8 for one byte a scale. A product unit has one 8-bit scale per row, or with granularity 'tensor'
    none: its codebook carries the scale.
    """

    bit_width: float
    grid: Grid = ""  # type: ignore[assignment]
    granularity: Granularity = "row"
    group_size: int | None = None
    scale_bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        if not self.grid:
            object.__setattr__(self, "grid", default_grid(self.bit_width))
        if self.grid not in _GRIDS:
            raise SpecError(f"unknown grid {self.grid!r}; expected one of {', '.join(_GRIDS)}")
        if self.granularity not in ("row", "tensor", "group"):
            raise SpecError(
                f"granularity is {self.granularity!r}; expected 'row' (one scale per output row), 'group' (one per "
                "group_size columns of a row) or 'tensor'"
            )
        if self.grid == "product":
            self._check_product()
        elif self.bit_width not in _WIDTHS[self.grid]:
            widths = ", ".join(f"{w:g}" for w in _WIDTHS[self.grid])
            hint = (
                " (the papers' 2-bit table is ternary: use 1.58)"
                if (self.bit_width, self.grid) == (2, "papers")
                else ""
            )
            raise SpecError(f"bit width {self.bit_width!r} does not exist on grid {self.grid!r}; it has {widths}{hint}")
        self._check_scales()

    def _check_product(self) -> None:
        size = round(8 / self.bit_width) if math.isfinite(self.bit_width) and self.bit_width > 0.01 else 0
        if not MIN_VECTOR_SIZE <= size <= MAX_VECTOR_SIZE or abs(self.bit_width * size / 8 - 1) > _WIDTH_TOLERANCE:
            raise SpecError(
                f"bit width {self.bit_width!r} does not exist on grid 'product'; it has 8 / v bits for vectors of v = "
                f"{MIN_VECTOR_SIZE} .. {MAX_VECTOR_SIZE} columns, e.g. 1 (v8) or 0.5 (v16)"
            )
        if self.granularity == "group":
            raise SpecError("a product unit has one 8-bit scale per row ('row') or none ('tensor'); got 'group'")
        object.__setattr__(self, "bit_width", 8 // size if 8 % size == 0 else 8 / size)
        if self.granularity == "row":
            object.__setattr__(self, "scale_bits", 8)

    def _check_scales(self) -> None:
        size = self.group_size
        if self.granularity == "group":
            if not isinstance(size, int) or isinstance(size, bool) or not MIN_GROUP_SIZE <= size <= MAX_GROUP_SIZE:
                raise SpecError(
                    f"group_size is {size!r}; granularity 'group' needs a whole number of columns from "
                    f"{MIN_GROUP_SIZE} to {MAX_GROUP_SIZE}, e.g. 64"
                )
        elif size is not None:
            raise SpecError(f"group_size is {size!r} but granularity is {self.granularity!r}; expected 'group'")
        if self.scale_bits not in (8, 16):
            raise SpecError(f"scale_bits is {self.scale_bits!r}; expected 16 (float16) or 8")
        if self.granularity == "tensor" and self.scale_bits == 8:
            raise SpecError("a single scale per tensor is stored as float16; 8-bit scales need 'row' or 'group'")
        if self.grid == "float" and (self.granularity == "group" or self.scale_bits == 8):
            raise SpecError("a 16-bit float unit has no scales: neither groups nor 8-bit scales")

    @property
    def levels(self) -> tuple[float, ...]:
        """Grid levels in ascending order, in units of the scale; a stored code is an index into them.

        Raises SpecError for grids without levels: float and product.
        """
        if self.grid == "float":
            raise SpecError("a 16-bit float unit has no levels; it is stored as float16")
        if self.grid == "product":
            raise SpecError("a product unit has no levels; its codes are indices into its own codebook")
        if self.grid == "half-step":
            half = 2 ** (int(self.bit_width) - 1)
            return tuple(k + 0.5 for k in range(-half, half))
        if self.bit_width == 1:
            return (-1.0, 1.0)
        top = 1 if self.bit_width == 1.58 else 2 ** (int(self.bit_width) - 1) - 1
        return tuple(float(k) for k in range(-top, top + 1))

    @property
    def is_quantized(self) -> bool:
        """False for 16-bit float storage."""
        return self.grid != "float"

    @property
    def is_product(self) -> bool:
        """True when codes are indices into a codebook of vectors rather than into ``levels``."""
        return self.grid == "product"

    @property
    def has_scales(self) -> bool:
        """False for 16-bit storage, and for a product unit whose codebook carries the scale."""
        return self.is_quantized and not (self.is_product and self.granularity == "tensor")

    @property
    def vector_size(self) -> int:
        """Input columns that one code stands for: v of a product unit, else 1."""
        return round(8 / self.bit_width) if self.is_product else 1

    @property
    def num_levels(self) -> int:
        """Number of valid codes: levels of the grid, or vectors in the codebook."""
        return NUM_CENTROIDS if self.is_product else len(self.levels)

    @property
    def code_bits(self) -> float:
        """Bits of one stored code: 8 for a product unit, else ``bit_width``."""
        return 8 if self.is_product else self.bit_width

    def num_groups(self, cols: int) -> int:
        """Scales of one row of ``cols`` columns (1 with one scale per tensor)."""
        return -(-cols // self.group_size) if self.group_size else 1

    def num_scales(self, rows: int, cols: int) -> int:
        """Number of scales of a unit of shape (rows, cols), whatever their storage."""
        if not self.has_scales:
            return 0
        return 1 if self.granularity == "tensor" else rows * self.num_groups(cols)

    def num_float_scales(self, rows: int, cols: int) -> int:
        """Number of float16 scales stored: all of them, or with ``scale_bits=8`` one per row (groups) or per unit (rows)."""
        if self.scale_bits == 16:
            return self.num_scales(rows, cols)
        return rows if self.granularity == "group" else 1

    def num_codes(self, rows: int, cols: int) -> int:
        """Number of stored codes: one a weight, or one per ``vector_size`` columns of each row (the last padded)."""
        return rows * -(-cols // self.vector_size)

    def code_bytes(self, num_codes: int) -> int:
        """Bytes of that many codes: dense bits, ternary five codes a byte, product one byte, float16 two bytes."""
        if self.bit_width == 1.58:
            return -(-num_codes // 5)
        return -(-num_codes * int(self.code_bits) // 8)

    def unit_bytes(self, rows: int, cols: int) -> int:
        """Bytes of codes, scales and codebook of a unit of shape (rows, cols), file header aside."""
        codes = self.code_bytes(self.num_codes(rows, cols))
        scales = 2 * self.num_float_scales(rows, cols)
        scale_codes = self.num_scales(rows, cols) if self.scale_bits == 8 else 0
        codebook = 2 * NUM_CENTROIDS * self.vector_size if self.is_product else 0
        return codes + scales + scale_codes + codebook

    def __str__(self) -> str:
        if self.is_product:
            ending = "-tensor" if self.granularity == "tensor" else ""
            return f"{self.bit_width:.3g}-product-v{self.vector_size}{ending}"
        granularity = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        return f"{self.bit_width:g}-{self.grid}-{granularity}" + ("-s8" if self.scale_bits == 8 else "")

    @classmethod
    def parse(cls, text: str | float) -> QuantSpec:
        """Read ``<bits>[-<grid>][-row | -tensor | -g<size>][-s8]`` or ``<bits>[-product][-v<size>][-tensor]``; raises SpecError.

        Examples: ``2``, ``1.58-row-s8``, ``2-half-step-g64-s8`` (``2-g64s8`` is the same), ``0.5-product-v16``.
        """
        first, _, rest = str(text).partition("-")
        found = _ENDING.fullmatch(rest)
        assert found is not None  # the pattern takes anything as the grid
        grid = found["grid"] or ""
        try:
            width = float(first)
        except ValueError:
            raise SpecError(f"cannot read {text!r} as a spec; expected e.g. '2', '1.58' or '2-half-step-row'") from None
        size = int(found["group"]) if found["group"] else None
        granularity = "group" if found["group"] else found["granularity"] or "row"
        if found["vector"]:
            grid, vector_size = grid or "product", int(found["vector"])
            if grid == "product" and not (vector_size and abs(width * vector_size / 8 - 1) <= _WIDTH_TOLERANCE):
                raise SpecError(
                    f"{text!r}: one byte per {vector_size} columns is not {first} bits; write e.g. 0.5-product-v16"
                )
            if grid != "product":
                raise SpecError(f"{text!r}: v{vector_size} belongs to grid 'product', e.g. 0.5-product-v16")
        whole = math.isfinite(width) and width == int(width)
        return cls(
            int(width) if whole else width,
            cast(Grid, grid),
            cast(Granularity, granularity),
            size,
            8 if found["scale"] else 16,
        )


_ENDING = re.compile(
    r"(?P<grid>.*?)(?:(?:^|-)v(?P<vector>[0-9]{1,9}))?(?:(?:^|-)(?:(?P<granularity>row|tensor)|g(?P<group>[0-9]{1,9})))?"
    r"(?P<scale>(?:^|-)s8|(?<=[0-9])s8)?",
    re.DOTALL,
)
"""What may follow the width: a grid, then what shares a scale (or the columns of a vector), then 8-bit scales."""
