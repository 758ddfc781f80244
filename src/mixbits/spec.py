"""What one weight matrix is stored as, and exactly how many bytes that takes.

A *unit* is one weight matrix seen as ``(rows = outputs, cols = inputs)`` together with every parameter
tied to it. A :class:`QuantSpec` (:mod:`mixbits.quantspec`) says how a unit is stored, a :class:`BitAllocation` names one spec per
unit, and a :class:`ModelInventory` lists all tensors of a model, so that the size of the packed weight file is
known to the byte before anything is packed (:func:`predicted_bytes`; `packing` writes the very header
computed here).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mixbits.errors import FormatError, SpecError
from mixbits.quantspec import NUM_CENTROIDS, Granularity, Grid, QuantSpec, default_grid

if TYPE_CHECKING:
    import torch

__all__ = [
    "FILE_METADATA",
    "FORMAT_VERSION",
    "HEADER_MULTIPLE",
    "MAX_SHARD_BYTES",
    "NUM_CENTROIDS",
    "BitAllocation",
    "Granularity",
    "Grid",
    "ModelInventory",
    "QuantSpec",
    "QuantizedWeight",
    "StoredTensor",
    "Unit",
    "bits_per_weight",
    "compression_ratio",
    "default_grid",
    "is_position_table",
    "parse_specs",
    "predicted_bytes",
    "safetensors_header",
    "shards",
    "stored_tensors",
    "unit_tensors",
]

FORMAT_VERSION = 1
HEADER_MULTIPLE = 64
"""The safetensors header (8-byte length included) is padded with spaces to a multiple of this."""
MAX_SHARD_BYTES = 50 * 10**9
"""Data bytes of one weight file, above which it is split: what transformers does, too."""
FILE_METADATA: Mapping[str, str] = {"format": "mixbits", "format_version": str(FORMAT_VERSION)}

_DTYPE_BYTES = {"U8": 1, "F16": 2}


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

    @property
    def is_position_table(self) -> bool:
        """True for a table of learned positions, told by its name as everywhere (:func:`is_position_table`)."""
        return self.kind == "embedding" and is_position_table(self.name)


def is_position_table(name: str) -> bool:
    """Whether an embedding of that module name holds learned positions (``embed_positions``, GPT-2's ``wpe``)."""
    return "position" in name or name.endswith("wpe")


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
    def uniform(cls, inventory: ModelInventory, spec: QuantSpec, *, everywhere: bool = False) -> BitAllocation:
        """The same spec for every unit, but 4 bits a position at least; ``everywhere``: position tables too.

        Tables of learned positions are tiny and the papers keep them in full precision: below 4 bits they get ``4``, with
        scales of as many bits.
        """
        if everywhere:
            return cls({u.name: spec for u in inventory.units}, {"method": f"uniform {spec}, position tables too"})
        positions = QuantSpec(4, scale_bits=spec.scale_bits) if spec.bit_width < 4 else spec
        specs = {u.name: positions if u.is_position_table else spec for u in inventory.units}
        return cls(specs, {"method": f"uniform {spec}"})

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

    ``codes``: uint8 tensor (rows, cols), indices into ``spec.levels``; ``scales``: float32 tensor (num_scales,), row by row,
    whose values are exactly representable as they are stored. The weight is ``levels[codes] * scale``, computed in float32.

    Product units: ``codes`` (rows, ceil(cols / v)) are indices into ``codebook`` (256, v), float32 of float16 values, and
    ``cols`` says how many of the columns are meant.
    """

    spec: QuantSpec
    codes: torch.Tensor
    scales: torch.Tensor
    codebook: torch.Tensor | None = None
    cols: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the weight."""
        return self.codes.shape[0], self.codes.shape[1] if self.cols is None else self.cols


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


def unit_tensors(unit: Unit, spec: QuantSpec) -> tuple[StoredTensor, ...]:
    """The tensors of one unit, in file order: ``.scales``, ``.codebook`` (F16), ``.scale_codes``, codes (U8).

    A 16-bit unit is its weight in the module's own orientation.
    """
    if not spec.is_quantized:
        shape = (unit.cols, unit.rows) if unit.kind == "conv1d" else (unit.rows, unit.cols)
        return (StoredTensor(unit.weight, "F16", shape),)
    found = []
    if spec.has_scales:
        found.append(StoredTensor(f"{unit.name}.scales", "F16", (spec.num_float_scales(unit.rows, unit.cols),)))
    if spec.is_product:
        found.append(StoredTensor(f"{unit.name}.codebook", "F16", (NUM_CENTROIDS, spec.vector_size)))
    if spec.scale_bits == 8:
        found.append(StoredTensor(f"{unit.name}.scale_codes", "U8", (spec.num_scales(unit.rows, unit.cols),)))
    num_bytes = spec.code_bytes(spec.num_codes(unit.rows, unit.cols))
    return (*found, StoredTensor(unit.weight, "U8", (num_bytes,)))


def stored_tensors(inventory: ModelInventory, allocation: BitAllocation) -> tuple[StoredTensor, ...]:
    """The tensors of the packed file, in file order: float16 first (so that they stay aligned), then bytes.

    Codes stand under the layer's own ``.weight`` name as flat bytes, so that loading without mixbits raises instead of
    returning random weights; see :func:`unit_tensors` for the other names.
    """
    allocation.check(inventory)
    tensors = [t for u in inventory.units for t in unit_tensors(u, allocation.specs[u.name])]
    others = [StoredTensor(name, "F16", shape) for name, shape in inventory.others]
    return (*[t for t in tensors if t.dtype == "F16"], *others, *[t for t in tensors if t.dtype == "U8"])


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


def shards(
    tensors: Sequence[StoredTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[tuple[StoredTensor, ...], ...]:
    """The tensors of each weight file: filled in order up to ``max_shard_bytes`` of data, a larger tensor stands alone.

    Raises SpecError for a limit below one byte.
    """
    if max_shard_bytes < 1:
        raise SpecError(f"max_shard_bytes is {max_shard_bytes}; expected a number of bytes, e.g. {MAX_SHARD_BYTES}")
    files: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if files[-1] and filled + tensor.num_bytes > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += tensor.num_bytes
    return tuple(map(tuple, files))


def predicted_bytes(
    inventory: ModelInventory, allocation: BitAllocation, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Exact size in bytes of the packed weight file, header included; of all of them if it is split."""
    files = shards(stored_tensors(inventory, allocation), max_shard_bytes)
    return sum(len(safetensors_header(tensors)) + sum(t.num_bytes for t in tensors) for tensors in files)


def compression_ratio(inventory: ModelInventory, num_bytes: int) -> float:
    """4 bytes x distinct parameters over ``num_bytes`` (see the glossary in the architecture notes)."""
    return inventory.full_bytes / num_bytes


def bits_per_weight(inventory: ModelInventory, num_bytes: int) -> float:
    """Stored bits (scales, header, embeddings: everything) over distinct parameters."""
    return 8 * num_bytes / inventory.num_parameters


DEFAULT_SPECS = ("1-row-s8", "1.58-row-s8", "2-row-s8", "3-row-s8", "4-row-s8", "8-row-s8")
"""What bits are learned among if nothing is said: one byte a scale, the best of the formats compared in docs/methods.md."""


def parse_specs(texts: Iterable[str | float]) -> tuple[QuantSpec, ...]:
    """Parse several specs, dropping repeats, keeping the order."""
    return tuple(dict.fromkeys(QuantSpec.parse(t) for t in texts))
