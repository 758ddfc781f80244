"""Is a packed model what it says? Checks of the weight file against ``quantization_config``, before anything is loaded.

Why before: transformers only warns about missing and extra tensors and would then run with random weights. Everything is
checked here on the file alone: header, tensor names, dtypes and shapes against the units, finite numbers, codes in range.
That the names belong to the model's own layers is checked by `mixbits.hf`, which has the model. Limit: no checksum yet, so
a flipped bit inside a valid code goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mixbits.errors import FormatError, SpecError
from mixbits.jsonfile import read_json
from mixbits.packing.bitpack import check_codes
from mixbits.packing.weightfile import WEIGHTS_NAME, WeightFile, read_weight_file
from mixbits.spec import FORMAT_VERSION, QuantSpec, Unit, unit_tensors

QUANT_METHOD = "mixbits"
_KINDS = ("linear", "conv1d", "embedding")


@dataclass(frozen=True)
class PackedUnits:
    """The units a ``quantization_config`` describes, with their specs, in the config's order."""

    units: tuple[Unit, ...]
    specs: Mapping[str, QuantSpec]


def read_units(quantization_config: Any, *, where: str) -> PackedUnits:
    """Parse ``quantization_config`` (a mapping). Raises FormatError naming ``where`` and the field."""
    config = quantization_config
    if not isinstance(config, Mapping) or config.get("quant_method") != QUANT_METHOD:
        method = config.get("quant_method") if isinstance(config, Mapping) else None
        raise FormatError(
            f"{where}: quantization_config.quant_method is {method!r:.100}; expected 'mixbits': not a model packed by mixbits"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{where}: quantization_config.format_version is {config.get('format_version')!r:.100}; this mixbits reads "
            f"{FORMAT_VERSION}. Pack the model again or use the mixbits that wrote it"
        )
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
    return PackedUnits(tuple(units), specs)


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


def check_tensors(weight_file: WeightFile, packed: PackedUnits) -> None:
    """Raise FormatError unless every unit's tensors are there with the right dtype and shape, and no stray bytes are."""
    stored, promised = weight_file.by_name, set()
    for unit in packed.units:
        spec = packed.specs[unit.name]
        for tensor in reversed(unit_tensors(unit, spec)):
            promised.add(tensor.name)
            what = "codes" if tensor.name == unit.weight else tensor.name.rpartition(".")[2]
            what = f"{what} of spec {spec}" if spec.is_quantized else "a 16-bit unit"
            _expect(weight_file, stored, tensor.name, tensor.dtype, tensor.shape, what)
    for name, tensor in stored.items():
        if tensor.dtype == "U8" and name not in promised:
            raise FormatError(
                f"{weight_file.path}: tensor {name!r} is U8 but no unit of quantization_config is stored under that name"
            )


def _expect(file: WeightFile, stored: dict[str, Any], name: str, dtype: str, shape: tuple[int, ...], what: str) -> None:
    found = stored.get(name)
    if found is None:
        raise FormatError(f"{file.path}: tensor {name!r} is missing; quantization_config promises it ({what})")
    if found.dtype != dtype:
        raise FormatError(f"{file.path}: tensor {name!r}: dtype is {found.dtype}; expected {dtype} ({what})")
    if found.shape != shape:
        raise FormatError(f"{file.path}: tensor {name!r}: shape is {found.shape}; expected {shape} ({what})")


def check_values(weight_file: WeightFile, packed: PackedUnits) -> None:
    """Raise FormatError for NaN or infinite numbers, codes that are no level of their grid, and 8-bit scales that are none.

    Reads the whole file.
    """
    units = {u.weight: u for u in packed.units if packed.specs[u.name].is_quantized}
    supers = {f"{u.name}.scales" for u in packed.units if packed.specs[u.name].scale_bits == 8}
    with weight_file.open() as reader:
        for stored in weight_file.tensors:
            tensor, where = reader.tensor(stored), f"{weight_file.path}: tensor {stored.name!r}"
            if stored.dtype == "F16":
                if not bool(torch.isfinite(tensor).all()):
                    raise FormatError(f"{where}: has NaN or infinite values: the file is damaged")
                if stored.name in supers and bool((tensor < 0).any()):
                    raise FormatError(f"{where}: a shared scale is negative: the file is damaged")
            elif stored.name in units:
                unit = units[stored.name]
                spec = packed.specs[unit.name]
                check_codes(tensor, spec, spec.num_codes(unit.rows, unit.cols), where=where)
            elif bool((tensor == 0).any()):
                raise FormatError(f"{where}: a scale code is 0; expected 1 .. 255: the file is damaged")


def verify_weight_file(path: str | Path, quantization_config: Any, *, where: str) -> tuple[WeightFile, PackedUnits]:
    """All checks of one weight file against a ``quantization_config`` read from ``where``. Raises FormatError, DataError."""
    packed = read_units(quantization_config, where=where)
    weight_file = read_weight_file(path)
    check_tensors(weight_file, packed)
    check_values(weight_file, packed)
    return weight_file, packed


def read_quantization_config(directory: str | Path) -> tuple[dict[str, Any], str]:
    """``quantization_config`` of a model directory and the file it stands in. Raises DataError or FormatError."""
    path = Path(directory) / "config.json"
    config = read_json(path)
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: no quantization_config; expected a model packed by mixbits")
    return found, str(path)


def verify_packed(directory: str | Path) -> tuple[WeightFile, PackedUnits]:
    """Check a packed model's directory: header, names, dtypes, shapes, finite numbers, codes in range.

    Returns the parsed weight file and its units. Raises FormatError naming file, tensor and field; DataError if files are
    missing.
    """
    config, where = read_quantization_config(directory)
    return verify_weight_file(Path(directory) / WEIGHTS_NAME, config, where=where)
