"""What a packed model's files hold: tensors, bits, bytes, statistics of the scales. Verifies the files on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mixbits.errors import FormatError
from mixbits.packing.verify import PackedUnits, read_quantization_config, verify_packed
from mixbits.packing.weightfile import WeightFile
from mixbits.scales import compact_scale, join_scale
from mixbits.spec import QuantSpec, Unit, unit_tensors


@dataclass(frozen=True)
class UnitInfo:
    """One unit as stored. ``num_bytes`` and ``bits_per_weight``: codes, scales and codebook; ``share`` of the file's bytes."""

    name: str
    spec: str
    kind: str
    rows: int
    cols: int
    tied: tuple[str, ...]
    bits_per_weight: float
    num_bytes: int
    share: float
    scale_min: float | None
    scale_mean: float | None
    scale_max: float | None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that is no unit, stored as float16."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    share: float


@dataclass(frozen=True)
class PackedInfo:
    """Everything ``mixbits inspect`` shows. ``header_bytes`` includes the 8-byte length and padding."""

    directory: str
    units: tuple[UnitInfo, ...]
    others: tuple[TensorInfo, ...]
    header_bytes: int
    file_bytes: int
    num_parameters: int
    compression_ratio: float
    bits_per_weight: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _in_file_order(weight_file: WeightFile, packed: PackedUnits) -> list[Unit]:
    """Units as their first tensors (scales, codebooks or float16 weights) follow each other in the file, which is the model's own order."""

    def offset(unit: Unit) -> int:
        return weight_file.offsets[unit_tensors(unit, packed.specs[unit.name])[0].name]

    return sorted(packed.units, key=offset)


def _scales(unit: Unit, spec: QuantSpec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    stored = tensors[f"{unit.name}.scales"].view(-1, 1)
    if spec.scale_bits == 16:
        return stored
    return join_scale(stored, compact_scale(tensors[f"{unit.name}.scale_codes"], spec, unit.cols))


def inspect_packed(directory: str | Path) -> PackedInfo:
    """Read and verify a packed model's directory. Raises FormatError or DataError as :func:`verify_packed` does."""
    weight_file, packed = verify_packed(directory)
    config, where = read_quantization_config(directory)
    stored, file_bytes = weight_file.by_name, weight_file.file_bytes
    units, own = [], set[str]()
    with weight_file.open() as reader:
        for unit in _in_file_order(weight_file, packed):
            spec = packed.specs[unit.name]
            num_bytes = spec.unit_bytes(unit.rows, unit.cols)
            low = mean = high = None
            tensors = {t.name: reader.tensor(stored[t.name]) for t in unit_tensors(unit, spec)}
            own |= set(tensors)
            if spec.has_scales:
                scales = _scales(unit, spec, tensors).to(torch.float64)
                low, mean, high = float(scales.min()), float(scales.mean()), float(scales.max())
            units.append(
                UnitInfo(
                    name=unit.name,
                    spec=str(spec),
                    kind=unit.kind,
                    rows=unit.rows,
                    cols=unit.cols,
                    tied=unit.tied,
                    bits_per_weight=8 * num_bytes / unit.num_weights,
                    num_bytes=num_bytes,
                    share=num_bytes / file_bytes,
                    scale_min=low,
                    scale_mean=mean,
                    scale_max=high,
                )
            )
    others = tuple(
        TensorInfo(t.name, t.shape, t.num_bytes, t.num_bytes / file_bytes)
        for t in weight_file.tensors
        if t.name not in own
    )
    num_parameters = config.get("num_parameters")
    held = sum(u.num_weights for u in packed.units) + sum(math.prod(t.shape) for t in others)
    if not isinstance(num_parameters, int) or isinstance(num_parameters, bool) or not 0 < num_parameters <= held:
        raise FormatError(
            f"{where}: quantization_config.num_parameters is {num_parameters!r:.100}; the file holds {held} (unused rows of "
            "position tables may be left out, no more)"
        )
    return PackedInfo(
        directory=str(directory),
        units=tuple(units),
        others=others,
        header_bytes=file_bytes - sum(t.num_bytes for t in weight_file.tensors),
        file_bytes=file_bytes,
        num_parameters=num_parameters,
        compression_ratio=4 * num_parameters / file_bytes,
        bits_per_weight=8 * file_bytes / num_parameters,
    )
