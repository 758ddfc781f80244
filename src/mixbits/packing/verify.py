"""Is a packed model what it says? Checks of the weight files against ``quantization_config``, before anything is loaded.

Why before: transformers only warns about missing and extra tensors and would then run with random weights. Everything is
checked here on the files alone: header, tensor names, dtypes and shapes against the units, finite numbers, codes in range, and
each tensor's checksum. That the names belong to the model's own layers is checked by `mixbits.hf`, which has the model.

Checksums stand in config.json, by tensor name, not in the weight file: they bind the two files together, the weight file's bytes
are those of version 1, and byte budgets are not touched. CRC-32 of zlib, about 0.05 s for 100 MB, and tensors are
checked in parallel, in place in the memory map. Limits: no protection against malice, only against damage and mix-ups; files of
version 1 have no checksums, so there a flipped bit inside a valid code goes unnoticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mixbits.errors import FormatError, SpecError
from mixbits.packing.archive import ARCHIVE_METHOD
from mixbits.packing.bitpack import check_codes
from mixbits.packing.config import read_config
from mixbits.packing.weightfile import TensorReader, checksum
from mixbits.packing.weightset import WeightSet, read_weights
from mixbits.spec import QuantSpec, StoredTensor, Unit, unit_tensors

QUANT_METHOD = "mixbits"
CONFIG_VERSION = 2
"""``quantization_config.format_version`` as written; version 1 had no checksums and no byte order and is read as well."""
BYTE_ORDER = "little"
_KINDS = ("linear", "conv1d", "embedding")
_CHECKSUM = re.compile(r"[0-9a-f]{8}")
_SMALL_BYTES, _MAX_THREADS = 4 << 20, 4


@dataclass(frozen=True)
class PackedUnits:
    """The units a ``quantization_config`` describes, with their specs, in the config's order.

    ``checksums``: tensor name -> checksum; None in version 1.
    """

    units: tuple[Unit, ...]
    specs: Mapping[str, QuantSpec]
    checksums: Mapping[str, str] | None = None


def read_units(quantization_config: Any, *, where: str) -> PackedUnits:
    """Parse ``quantization_config`` (a mapping). Raises FormatError naming ``where`` and the field."""
    config = quantization_config
    if not isinstance(config, Mapping) or config.get("quant_method") != QUANT_METHOD:
        method = config.get("quant_method") if isinstance(config, Mapping) else None
        raise FormatError(
            f"{where}: quantization_config.quant_method is {method!r:.100}; expected 'mixbits': not a model packed by mixbits"
        )
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= CONFIG_VERSION:
        raise FormatError(
            f"{where}: quantization_config.format_version is {version!r:.100}; this mixbits reads 1 to "
            f"{CONFIG_VERSION}. Pack the model again or use the mixbits that wrote it"
        )
    if config.get("archive", ARCHIVE_METHOD) != ARCHIVE_METHOD:
        raise FormatError(
            f"{where}: quantization_config.archive is {config['archive']!r:.100}; this mixbits reads {ARCHIVE_METHOD!r}"
        )
    checksums = None if version == 1 else _read_checksums(config, where)
    entries = config.get("units")
    if not isinstance(entries, Mapping) or not entries:
        raise FormatError(f"{where}: quantization_config.units is missing or not an object of unit name -> description")
    units, specs, seen = [], {}, set(entries)
    for name, entry in entries.items():
        unit, spec = _read_unit(str(name), entry, f"{where}: quantization_config.units[{str(name)[:200]!r}]")
        for other in unit.tied:
            if other in seen:
                raise FormatError(f"{where}: {other[:200]!r} is tied to {str(name)[:200]!r} and is also another unit")
            seen.add(other)
        units.append(unit)
        specs[unit.name] = spec
    return PackedUnits(tuple(units), specs, checksums)


def _read_checksums(config: Mapping[str, Any], where: str) -> Mapping[str, str]:
    """What version 2 has besides: byte order and checksums."""
    if config.get("byte_order") != BYTE_ORDER:
        raise FormatError(
            f"{where}: quantization_config.byte_order is {config.get('byte_order')!r:.100}; expected {BYTE_ORDER!r}"
        )
    found = config.get("checksums")
    if not isinstance(found, Mapping):
        raise FormatError(
            f"{where}: quantization_config.checksums is missing or not an object of tensor name -> CRC-32"
        )
    for name, value in found.items():
        if not isinstance(value, str) or not _CHECKSUM.fullmatch(value):
            raise FormatError(
                f"{where}: quantization_config.checksums[{str(name)[:200]!r}] is {value!r:.100}; expected a CRC-32 of "
                "eight hexadecimal digits"
            )
    return found


def _read_unit(name: str, entry: Any, where: str) -> tuple[Unit, QuantSpec]:
    if not isinstance(entry, Mapping):
        raise FormatError(f"{where}: expected an object with spec, rows, cols and kind")
    try:
        spec = QuantSpec.parse(entry["spec"]) if isinstance(entry.get("spec"), str) else None
    except SpecError as error:
        raise FormatError(f"{where}.spec: {error}") from None
    if spec is None:
        raise FormatError(f"{where}.spec is {entry.get('spec')!r:.100}; expected e.g. '2-half-step-row'")
    for key in ("rows", "cols"):
        value = entry.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 40:
            raise FormatError(f"{where}.{key} is {value!r:.100}; expected a positive number")
    kind, tied = entry.get("kind"), entry.get("tied", [])
    if kind not in _KINDS:
        raise FormatError(f"{where}.kind is {kind!r:.100}; expected one of {', '.join(_KINDS)}")
    if not isinstance(tied, (list, tuple)) or not all(isinstance(t, str) for t in tied):
        raise FormatError(f"{where}.tied is {tied!r:.100}; expected a list of layer names")
    return Unit(name, f"{name}.weight", entry["rows"], entry["cols"], cast(Any, kind), tuple(tied)), spec


def check_tensors(weights: WeightSet, packed: PackedUnits) -> None:
    """Raise FormatError unless every unit's tensors are there with the right dtype and shape, and nothing is that should not be:
    bytes of no unit, a tensor of its own for a tied layer, tensors with no checksum.
    """
    stored, promised = weights.by_name, set()
    for unit in packed.units:
        spec = packed.specs[unit.name]
        for tensor in reversed(unit_tensors(unit, spec)):
            promised.add(tensor.name)
            what = "codes" if tensor.name == unit.weight else tensor.name.rpartition(".")[2]
            what = f"{what} of spec {spec}" if spec.is_quantized else "a 16-bit unit"
            _expect(weights, stored, tensor.name, tensor.dtype, tensor.shape, what)
        for other in unit.tied:
            if f"{other}.weight" in stored:
                raise FormatError(
                    f"{weights.paths[f'{other}.weight']}: tensor {other[:200] + '.weight'!r} is stored, but quantization_config ties "
                    f"it to {unit.name[:200]!r}"
                )
    for name, tensor in stored.items():
        if tensor.dtype == "U8" and name not in promised:
            raise FormatError(
                f"{weights.paths[name]}: tensor {name[:200]!r} is U8 but no unit of quantization_config is stored under that name"
            )
    if packed.checksums is None:
        return
    for name in stored:
        if name not in packed.checksums:
            raise FormatError(
                f"{weights.paths[name]}: tensor {name[:200]!r} has no checksum in quantization_config: not the weights it was "
                "written with"
            )
    for name in packed.checksums:
        if name not in stored:
            raise FormatError(
                f"{weights.path}: tensor {name[:200]!r} is missing; quantization_config.checksums promises it"
            )


def _expect(
    weights: WeightSet, stored: Mapping[str, StoredTensor], name: str, dtype: str, shape: tuple[int, ...], what: str
) -> None:
    found = stored.get(name)
    if found is None:
        raise FormatError(f"{weights.path}: tensor {name[:200]!r} is missing; quantization_config promises it ({what})")
    where = f"{weights.paths[name]}: tensor {name[:200]!r}"
    if found.dtype != dtype:
        raise FormatError(f"{where}: dtype is {found.dtype}; expected {dtype} ({what})")
    if found.shape != shape:
        raise FormatError(f"{where}: shape is {found.shape!s:.100}; expected {shape} ({what})")


def check_values(weights: WeightSet, packed: PackedUnits) -> None:
    """Raise FormatError for NaN or infinite numbers, codes that are no level of their grid, 8-bit scales that are none, and
    (not in version 1) for a tensor whose checksum differs.

    Reads all files, in place, several tensors at a time; the error is that of the first tensor in file order.
    """
    units = {u.weight: u for u in packed.units if packed.specs[u.name].is_quantized}
    shared = {f"{u.name}.scales" for u in packed.units if packed.specs[u.name].scale_bits == 8}

    def check(stored: StoredTensor, reader: TensorReader) -> None:
        where = f"{weights.paths[stored.name]}: tensor {stored.name[:200]!r}"
        raw = reader.raw(stored)
        if stored.dtype == "F16":
            _check_numbers(raw.view("<u2"), is_shared_scale=stored.name in shared, where=where)
        elif stored.name in units:
            unit = units[stored.name]
            spec = packed.specs[unit.name]
            check_codes(raw, spec, spec.num_codes(unit.rows, unit.cols), where=where)
        elif not raw.all():
            raise FormatError(f"{where}: a scale code is 0; expected 1 .. 255: the file is damaged")
        wanted = packed.checksums[stored.name] if packed.checksums is not None else None
        if wanted is not None and (found := checksum(raw.data)) != wanted:
            raise FormatError(
                f"{where}: its checksum is {found}, quantization_config.checksums says {wanted}: damaged; copy it again"
            )

    reader = weights.reader()
    threads = min(_MAX_THREADS, os.cpu_count() or 1) if weights.file_bytes > _SMALL_BYTES else 1
    if threads == 1:
        for stored in weights.tensors:
            check(stored, reader)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda stored: check(stored, reader), weights.tensors):
            pass


_NUMBERS_AT_ONCE = 1 << 16


def _check_numbers(bits: npt.NDArray[np.uint16], *, is_shared_scale: bool, where: str) -> None:
    """``bits``: float16 numbers as they are stored; a chunk at a time, so that nothing of their size is allocated."""
    for start in range(0, len(bits), _NUMBERS_AT_ONCE):
        part = bits[start : start + _NUMBERS_AT_ONCE]
        if int((part & 0x7FFF).max()) >= 0x7C00:
            raise FormatError(f"{where}: has NaN or infinite values: the file is damaged")
        if is_shared_scale and int(part.max()) > 0x8000:  # the sign bit, and not just -0
            raise FormatError(f"{where}: a shared scale is negative: the file is damaged")


def verify_weights(weights: WeightSet, packed: PackedUnits) -> None:
    """All checks of weight files against what ``quantization_config`` says of them. Raises FormatError or DataError."""
    check_tensors(weights, packed)
    check_values(weights, packed)


def read_quantization_config(directory: str | Path) -> tuple[dict[str, Any], str]:
    """``quantization_config`` of a model directory and the file it stands in. Raises DataError or FormatError."""
    return read_config(directory)["quantization_config"], str(Path(directory) / "config.json")


def verify_packed(directory: str | Path) -> tuple[WeightSet, PackedUnits]:
    """Check a packed model's directory: headers, names, dtypes, shapes, finite numbers, codes in range, checksums.

    Returns the parsed weight files (archived ones unpacked in memory) and their units. Raises FormatError naming file, tensor and
    field; DataError if files are missing.
    """
    config, where = read_quantization_config(directory)
    packed = read_units(config, where=where)
    weights = read_weights(directory)
    verify_weights(weights, packed)
    return weights, packed
