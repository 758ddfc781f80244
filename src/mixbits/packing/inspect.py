"""What a packed model's files hold: tensors, bits, bytes, entropy of the codes, statistics of the scales. Verifies the files on
the way.

The entropy is the empirical one of single codes, ``-sum p log2 p`` bits: no coder that takes codes one by one needs less on
average. What it lacks to the bits a code is stored in is what an archive could save at best, but for dependence between codes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixbits.errors import FormatError
from mixbits.packing.bitpack import code_histogram
from mixbits.packing.verify import read_quantization_config, verify_packed
from mixbits.packing.weightfile import TensorReader
from mixbits.scales import stored_scale
from mixbits.spec import QuantSpec, Unit, unit_tensors


@dataclass(frozen=True)
class UnitInfo:
    """One unit as stored. ``num_bytes`` and ``bits_per_weight``: codes, scales and codebook; ``share`` of the files' bytes;
    ``bits_per_code`` as stored (a code of a product unit stands for several weights) and ``code_entropy``, in bits: None at 16 bits.
    """

    name: str
    spec: str
    kind: str
    rows: int
    cols: int
    tied: tuple[str, ...]
    bits_per_weight: float
    num_bytes: int
    share: float
    bits_per_code: float | None
    code_entropy: float | None
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
class FileInfo:
    """A weight file on the disk. ``num_bytes``: as the file system counts them."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class PackedInfo:
    """Everything ``mixbits inspect`` shows.

    ``file_bytes``: of all weight files, unpacked; ``header_bytes`` of them are headers, with 8-byte lengths and padding.
    ``disk_bytes``: on the disk, less if they are archived; the ratio and the bits per weight do not count that gain.
    ``has_checksums``: each tensor's was compared (format version 2); without, only structure and values were checked.
    """

    directory: str
    format_version: int
    has_checksums: bool
    files: tuple[FileInfo, ...]
    units: tuple[UnitInfo, ...]
    others: tuple[TensorInfo, ...]
    header_bytes: int
    file_bytes: int
    disk_bytes: int
    num_parameters: int
    compression_ratio: float
    bits_per_weight: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(share * np.log2(share)).sum()))


def _unit_info(unit: Unit, spec: QuantSpec, reader: TensorReader, file_bytes: int) -> UnitInfo:
    num_bytes = spec.unit_bytes(unit.rows, unit.cols)
    stored = unit_tensors(unit, spec)
    bits_per_code = entropy = low = mean = high = None
    if spec.is_quantized:
        num_codes = spec.num_codes(unit.rows, unit.cols)
        entropy = _entropy(code_histogram(reader.raw(stored[-1]), spec, num_codes))
        bits_per_code = 1.6 if spec.code_bits == 1.58 else float(spec.code_bits)
    if spec.has_scales:
        tensors = {t.name: reader.tensor(t) for t in stored[:-1]}
        scale_codes = tensors.get(f"{unit.name}.scale_codes")
        scales = stored_scale(tensors[f"{unit.name}.scales"], scale_codes, spec, unit.cols).to(torch.float64)
        low, mean, high = float(scales.min()), float(scales.mean()), float(scales.max())
    return UnitInfo(
        name=unit.name,
        spec=str(spec),
        kind=unit.kind,
        rows=unit.rows,
        cols=unit.cols,
        tied=unit.tied,
        bits_per_weight=8 * num_bytes / unit.num_weights,
        num_bytes=num_bytes,
        share=num_bytes / file_bytes,
        bits_per_code=bits_per_code,
        code_entropy=entropy,
        scale_min=low,
        scale_mean=mean,
        scale_max=high,
    )


def inspect_packed(directory: str | Path) -> PackedInfo:
    """Read and verify a packed model's directory. Raises FormatError or DataError as :func:`verify_packed` does."""
    weights, packed = verify_packed(directory)
    config, where = read_quantization_config(directory)
    file_bytes = weights.file_bytes
    order = {tensor.name: i for i, tensor in enumerate(weights.tensors)}  # the model's own, which JSON may have lost
    in_order = sorted(packed.units, key=lambda unit: order[unit_tensors(unit, packed.specs[unit.name])[0].name])
    reader = weights.reader()
    units = tuple(_unit_info(unit, packed.specs[unit.name], reader, file_bytes) for unit in in_order)
    own = {t.name for unit in packed.units for t in unit_tensors(unit, packed.specs[unit.name])}
    others = tuple(
        TensorInfo(t.name, t.shape, t.num_bytes, t.num_bytes / file_bytes) for t in weights.tensors if t.name not in own
    )
    files = tuple(FileInfo(file.path.name, file.path.stat().st_size) for file in weights.files)
    num_parameters = config.get("num_parameters")
    held = sum(u.num_weights for u in packed.units) + sum(math.prod(t.shape) for t in others)
    if not isinstance(num_parameters, int) or isinstance(num_parameters, bool) or not 0 < num_parameters <= held:
        raise FormatError(
            f"{where}: quantization_config.num_parameters is {num_parameters!r:.100}; the file holds {held} (unused rows of "
            "position tables may be left out, no more)"
        )
    disk_bytes = sum(file.num_bytes for file in files)
    return PackedInfo(
        directory=str(directory),
        format_version=config["format_version"],
        has_checksums=packed.checksums is not None,
        files=files,
        units=units,
        others=others,
        header_bytes=file_bytes - sum(t.num_bytes for t in weights.tensors),
        file_bytes=file_bytes,
        disk_bytes=disk_bytes,
        num_parameters=num_parameters,
        compression_ratio=4 * num_parameters / file_bytes,
        bits_per_weight=8 * file_bytes / num_parameters,
    )
