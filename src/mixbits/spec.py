"""What one weight matrix is stored as, and exactly how many bytes that takes.

A *unit* is one weight matrix seen as ``(rows = outputs, cols = inputs)`` together with every parameter
tied to it. A :class:`QuantSpec` says how a unit is stored, a :class:`BitAllocation` names one spec per
unit, and a :class:`ModelInventory` lists all tensors of a model, so that the size of the packed weight file is
known to the byte before anything is packed (:func:`predicted_bytes`; `packing` writes the very header
computed here).

Grids (levels are in units of the scale alpha):

* ``papers`` (Xu et al., ICASSP 2021): 1 bit {-1, +1}; 1.58 bit {-1, 0, 1}, which is what the papers call
  2 bit; 3 bit {-3..3}; 4 bit {-7..7}; 8 bit {-127..127}.
* ``half-step``: 2, 3, 4 bit {+-1/2, +-3/2, ...}, all 2^n codes used.
* ``float``: 16 bit, the unit is stored as float16.

Limits: one scale per output row or per tensor, stored as float16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from mixbits.errors import FormatError, SpecError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
HEADER_MULTIPLE = 64
"""The safetensors header (8-byte length included) is padded with spaces to a multiple of this."""
FILE_METADATA: Mapping[str, str] = {"format": "mixbits", "format_version": str(FORMAT_VERSION)}

Grid = Literal["papers", "half-step", "float"]
Granularity = Literal["row", "tensor"]
_WIDTHS: Mapping[str, tuple[float, ...]] = {
    "papers": (1, 1.58, 3, 4, 8),
    "half-step": (2, 3, 4),
    "float": (16,),
}
_DTYPE_BYTES = {"U8": 1, "F16": 2}


def default_grid(bit_width: float) -> Grid:
    """The grid a bare bit-width means: half-step at 2 bits, float at 16, the papers' otherwise."""
    if bit_width == 16:
        return "float"
    return "half-step" if bit_width == 2 else "papers"


@dataclass(frozen=True, order=True)
class QuantSpec:
    """How one unit is stored. ``QuantSpec(2)`` is the 2-bit half-step grid with one scale per output row."""

    bit_width: float
    grid: Grid = ""  # type: ignore[assignment]
    granularity: Granularity = "row"

    def __post_init__(self) -> None:
        if not self.grid:
            object.__setattr__(self, "grid", default_grid(self.bit_width))
        if self.grid not in _WIDTHS:
            raise SpecError(f"unknown grid {self.grid!r}; expected one of {', '.join(_WIDTHS)}")
        if self.bit_width not in _WIDTHS[self.grid]:
            widths = ", ".join(f"{w:g}" for w in _WIDTHS[self.grid])
            hint = (
                " (the papers' 2-bit table is ternary: use 1.58)"
                if (self.bit_width, self.grid) == (2, "papers")
                else ""
            )
            raise SpecError(f"bit width {self.bit_width!r} does not exist on grid {self.grid!r}; it has {widths}{hint}")
        if self.granularity not in ("row", "tensor"):
            raise SpecError(
                f"granularity is {self.granularity!r}; expected 'row' (one scale per output row) or 'tensor'"
            )

    @property
    def levels(self) -> tuple[float, ...]:
        """Grid levels in ascending order, in units of the scale; a stored code is an index into them."""
        if self.grid == "float":
            raise SpecError("a 16-bit float unit has no levels; it is stored as float16")
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

    def num_scales(self, rows: int) -> int:
        """Number of float16 scales for a unit with that many output rows."""
        if not self.is_quantized:
            return 0
        return rows if self.granularity == "row" else 1

    def code_bytes(self, num_weights: int) -> int:
        """Bytes of the codes: dense bits, ternary five codes a byte, float16 two bytes a weight."""
        if self.bit_width == 1.58:
            return -(-num_weights // 5)
        return -(-num_weights * int(self.bit_width) // 8)

    def unit_bytes(self, rows: int, cols: int) -> int:
        """Bytes of codes and scales of a unit of shape (rows, cols), file header aside."""
        return self.code_bytes(rows * cols) + 2 * self.num_scales(rows)

    def __str__(self) -> str:
        return f"{self.bit_width:g}-{self.grid}-{self.granularity}"

    @classmethod
    def parse(cls, text: str | float) -> QuantSpec:
        """Read ``"2"``, ``"1.58"``, ``"2-half-step"`` or ``"2-half-step-row"``. Raises SpecError."""
        parts = str(text).split("-", 1)
        granularity: Granularity = "row"
        rest = parts[1] if len(parts) == 2 else ""
        for name in ("row", "tensor"):
            if rest == name or rest.endswith("-" + name):
                granularity, rest = cast(Granularity, name), rest[: -len(name)].rstrip("-")
        try:
            width = float(parts[0])
        except ValueError:
            raise SpecError(f"cannot read {text!r} as a spec; expected e.g. '2', '1.58' or '2-half-step-row'") from None
        whole = math.isfinite(width) and width == int(width)
        return cls(int(width) if whole else width, cast(Grid, rest), granularity)


@dataclass(frozen=True)
class Unit:
    """One quantizable matrix.

    ``name``: the module that owns it; ``weight``: its parameter name in the checkpoint; ``rows`` x ``cols``: outputs x
    inputs; ``tied``: other modules sharing the parameter; ``kind``: the layer type (a Conv1D keeps its weight transposed).
    """

    name: str
    weight: str
    rows: int
    cols: int
    kind: Literal["linear", "conv1d", "embedding"]
    tied: tuple[str, ...] = ()

    @property
    def num_weights(self) -> int:
        """Number of weights, ties once."""
        return self.rows * self.cols


@dataclass(frozen=True)
class ModelInventory:
    """All distinct tensors of a model: the units, and every other parameter (stored as float16).

    ``unused_position_weights``: weights in position tables beyond the training context (OPT keeps 2 extra rows); they are
    stored, but do not count in ``num_parameters`` and so not in the compression ratio.
    """

    units: tuple[Unit, ...]
    others: tuple[tuple[str, tuple[int, ...]], ...]
    unused_position_weights: int = 0

    @property
    def num_parameters(self) -> int:
        """Distinct parameters: ties once, position table no longer than the training context."""
        total = sum(u.num_weights for u in self.units) + sum(math.prod(shape) for _, shape in self.others)
        return total - self.unused_position_weights

    @property
    def full_bytes(self) -> int:
        """4 bytes times ``num_parameters``: what compression ratios are measured against."""
        return 4 * self.num_parameters


@dataclass(frozen=True)
class BitAllocation:
    """Unit name -> QuantSpec, with where it came from. Immutable; JSON in and out."""

    specs: Mapping[str, QuantSpec]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def check(self, inventory: ModelInventory) -> None:
        """Raise SpecError unless exactly the units of ``inventory`` are named."""
        known = {u.name for u in inventory.units}
        unknown, missing = sorted(set(self.specs) - known), sorted(known - set(self.specs))
        if unknown:
            raise SpecError(
                f"allocation names unknown unit(s) {', '.join(unknown[:5])}; the model has {len(known)} units, "
                f"e.g. {', '.join(sorted(known)[:3])}"
            )
        if missing:
            raise SpecError(
                f"allocation misses unit(s) {', '.join(missing[:5])}; every unit needs a spec (16 keeps float16)"
            )

    @classmethod
    def uniform(cls, inventory: ModelInventory, spec: QuantSpec) -> BitAllocation:
        """The same spec for every unit."""
        return cls({u.name: spec for u in inventory.units}, {"method": f"uniform {spec}"})

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "format": "mixbits-allocation",
            "format_version": FORMAT_VERSION,
            "specs": {name: str(spec) for name, spec in self.specs.items()},
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str = "allocation") -> BitAllocation:
        """Inverse of :meth:`to_json`. Raises FormatError or SpecError naming ``where``."""
        if not isinstance(data, dict) or data.get("format") != "mixbits-allocation":
            raise FormatError(
                f"{where}: not a mixbits allocation; expected a JSON object with format 'mixbits-allocation'"
            )
        if data.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"{where}: format_version is {data.get('format_version')!r}; this mixbits reads {FORMAT_VERSION}"
            )
        specs = data.get("specs")
        if not isinstance(specs, dict):
            raise FormatError(f"{where}: 'specs' is missing or not an object of unit name -> spec")
        try:
            return cls({str(k): QuantSpec.parse(v) for k, v in specs.items()}, data.get("provenance") or {})
        except SpecError as error:
            raise SpecError(f"{where}: {error}") from None


@dataclass(frozen=True)
class QuantizedWeight:
    """A unit's trained weight: what training hands to packing.

    ``codes``: uint8 tensor (rows, cols), indices into ``spec.levels``; ``scales``: float32 tensor (num_scales,) whose values
    are exactly representable in float16. The weight is ``levels[codes] * scale``, computed in float32.
    """

    spec: QuantSpec
    codes: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in the packed file."""

    name: str
    dtype: Literal["U8", "F16"]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


def stored_tensors(inventory: ModelInventory, allocation: BitAllocation) -> tuple[StoredTensor, ...]:
    """The tensors of the packed file, in file order: float16 first (so that they stay aligned), then codes.

    Codes stand under the layer's own ``.weight`` name as flat bytes, so that loading without mixbits raises instead of
    returning random weights; scales stand under ``<module>.scales``.
    """
    allocation.check(inventory)
    floats: list[StoredTensor] = []
    codes: list[StoredTensor] = []
    for unit in inventory.units:
        spec = allocation.specs[unit.name]
        if not spec.is_quantized:
            shape = (unit.cols, unit.rows) if unit.kind == "conv1d" else (unit.rows, unit.cols)
            floats.append(StoredTensor(unit.weight, "F16", shape))
            continue
        floats.append(StoredTensor(f"{unit.name}.scales", "F16", (spec.num_scales(unit.rows),)))
        codes.append(StoredTensor(unit.weight, "U8", (spec.code_bytes(unit.num_weights),)))
    floats += [StoredTensor(name, "F16", shape) for name, shape in inventory.others]
    return tuple(floats + codes)


def safetensors_header(tensors: Sequence[StoredTensor], metadata: Mapping[str, str] = FILE_METADATA) -> bytes:
    """The whole header (8-byte length and JSON), padded with spaces to a multiple of ``HEADER_MULTIPLE``."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for t in tensors:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.num_bytes]}
        offset += t.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(len(text) + 8) // HEADER_MULTIPLE) * HEADER_MULTIPLE - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def predicted_bytes(inventory: ModelInventory, allocation: BitAllocation) -> int:
    """Exact size in bytes of the packed weight file, header included."""
    tensors = stored_tensors(inventory, allocation)
    return len(safetensors_header(tensors)) + sum(t.num_bytes for t in tensors)


def compression_ratio(inventory: ModelInventory, num_bytes: int) -> float:
    """4 bytes x distinct parameters over ``num_bytes`` (see the glossary in the architecture notes)."""
    return inventory.full_bytes / num_bytes


def bits_per_weight(inventory: ModelInventory, num_bytes: int) -> float:
    """Stored bits (scales, header, embeddings: everything) over distinct parameters."""
    return 8 * num_bytes / inventory.num_parameters


def parse_specs(texts: Iterable[str | float]) -> tuple[QuantSpec, ...]:
    """Parse several specs, dropping repeats, keeping the order."""
    return tuple(dict.fromkeys(QuantSpec.parse(t) for t in texts))
