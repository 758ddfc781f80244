"""Writing a packed model: a directory with config.json, model.safetensors, tokenizer, generation config and README.md.

The weight files are written with the very headers `spec.py` predicts, so their size is known to the byte before; that is checked
again on the files. The whole directory is written under a temporary name, synced and renamed. Everything is checked before the
first byte is written: names, shapes, codes, scales, NaN, float16 overflow, ties that config.json would not restore.

Limits: every tensor that is not packed is stored as float16; models whose class is not part of transformers are not carried
along.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixbits.errors import DataError, SpecError
from mixbits.jsonfile import write_text
from mixbits.packing.archive import archive_packed
from mixbits.packing.bitpack import pack_codes
from mixbits.packing.card import model_card
from mixbits.packing.verify import BYTE_ORDER, CONFIG_VERSION, QUANT_METHOD
from mixbits.packing.weightfile import sync_folder
from mixbits.packing.weightset import write_weights
from mixbits.scales import compact_scale, join_scale, split_scale
from mixbits.spec import (
    MAX_SHARD_BYTES,
    NUM_CENTROIDS,
    BitAllocation,
    ModelInventory,
    QuantizedWeight,
    QuantSpec,
    Unit,
    bits_per_weight,
    compression_ratio,
    predicted_bytes,
    stored_tensors,
)


@dataclass(frozen=True)
class SavedModel:
    """Where a packed model was written and how large its weight files are; ``disk_bytes`` is less where they are archived.

    The ratio and the bits per weight are those of ``file_bytes``, archived or not.
    """

    directory: Path
    file_bytes: int
    disk_bytes: int
    compression_ratio: float
    bits_per_weight: float


def save_packed(
    model: nn.Module,
    inventory: ModelInventory,
    allocation: BitAllocation,
    weights: Mapping[str, QuantizedWeight],
    directory: str | Path,
    *,
    tokenizer: Any = None,
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    archive: bool = False,
) -> SavedModel:
    """Write ``model`` as a packed model directory.

    model: the transformers model whose other parameters (and 16-bit units) are stored as float16; weights: one entry for each
    unit with a quantized spec; card: facts for the model card, name -> text or number; overwrite: replace a model directory
    that is there; max_shard_bytes: data bytes of one weight file; archive: keep the weight files compressed where that saves
    at least 3 % (:mod:`mixbits.packing.archive`). Raises SpecError (names, shapes, scales, ties, directory in use), DataError (NaN,
    float16 overflow).
    """
    tensors = packed_tensors(model, inventory, allocation, weights)
    target = _usable_target(Path(directory), overwrite)
    expected = predicted_bytes(inventory, allocation, max_shard_bytes=max_shard_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        stored = stored_tensors(inventory, allocation)
        written = write_weights(temporary, stored, tensors, max_shard_bytes=max_shard_bytes)
        assert written.file_bytes == expected, f"predicted {expected} bytes, wrote {written.file_bytes}"
        quantization_config = describe(inventory, allocation, expected, written.checksums)
        _save_configs(model, quantization_config, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        counts = Counter(_label(allocation.specs[u.name]) for u in inventory.units)
        write_text(temporary / "README.md", model_card(model, quantization_config, counts, dict(card or {})))
        on_disk = archive_packed(temporary) if archive else expected
        _sync(temporary)
        _take_name(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return SavedModel(
        target, expected, on_disk, compression_ratio(inventory, expected), bits_per_weight(inventory, expected)
    )


def _label(spec: QuantSpec) -> str:
    return str(spec) if spec.is_quantized else "16 (float16)"


def describe(
    inventory: ModelInventory, allocation: BitAllocation, file_bytes: int, checksums: Mapping[str, str]
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: plain data. ``checksums``: tensor name -> checksum."""
    units = {
        u.name: {
            "spec": str(allocation.specs[u.name]),
            "rows": u.rows,
            "cols": u.cols,
            "kind": u.kind,
            "tied": list(u.tied),
        }
        for u in inventory.units
    }
    return {
        "quant_method": QUANT_METHOD,
        "format_version": CONFIG_VERSION,
        "byte_order": BYTE_ORDER,
        "units": units,
        "checksums": dict(checksums),
        "file_bytes": file_bytes,
        "num_parameters": inventory.num_parameters,
        "compression_ratio": round(compression_ratio(inventory, file_bytes), 4),
        "bits_per_weight": round(bits_per_weight(inventory, file_bytes), 4),
    }


def packed_tensors(
    model: nn.Module, inventory: ModelInventory, allocation: BitAllocation, weights: Mapping[str, QuantizedWeight]
) -> dict[str, torch.Tensor]:
    """Every tensor of the packed file by its stored name, all of them checked. Raises SpecError or DataError."""
    allocation.check(inventory)
    _check_weight_names(inventory, allocation, weights)
    _check_ties(model, [u for u in inventory.units if allocation.specs[u.name].is_quantized])
    state = model.state_dict()
    found: dict[str, torch.Tensor] = {}
    for unit in inventory.units:
        spec = allocation.specs[unit.name]
        shape = (unit.cols, unit.rows) if unit.kind == "conv1d" else (unit.rows, unit.cols)
        weight = _stored_parameter(state, unit.weight, shape)
        if not spec.is_quantized:
            found[unit.weight] = to_float16(weight, unit.weight)
            continue
        if getattr(model.get_submodule(unit.name), "max_norm", None) is not None:
            raise SpecError(f"{unit.name}: an Embedding with max_norm rescales its own rows and cannot be packed")
        quantized = weights[unit.name]
        _check_quantized(unit, spec, quantized)
        found[unit.weight] = pack_codes(quantized.codes, spec.code_bits)
        found |= _stored_scales(unit, spec, quantized)
        if quantized.codebook is not None:
            found[f"{unit.name}.codebook"] = quantized.codebook.to(torch.float16)
    for name, other_shape in inventory.others:
        found[name] = to_float16(_stored_parameter(state, name, other_shape), name)
    kept = {state[name].data_ptr() for name in found if name in state}
    for name, tensor in state.items():
        if name not in found and tensor.data_ptr() not in kept and tensor.numel():
            raise SpecError(
                f"{name}: {tensor.dtype} tensor of the model is neither a unit nor listed in the inventory; it would be lost"
            )
    return found


def _check_weight_names(
    inventory: ModelInventory, allocation: BitAllocation, weights: Mapping[str, QuantizedWeight]
) -> None:
    wanted = {u.name for u in inventory.units if allocation.specs[u.name].is_quantized}
    missing, unknown = sorted(wanted - set(weights)), sorted(set(weights) - wanted)
    if missing:
        raise SpecError(f"no quantized weight for unit(s) {', '.join(missing[:5])}; the allocation stores them packed")
    if unknown:
        raise SpecError(
            f"quantized weights for unit(s) {', '.join(unknown[:5])}, which the allocation does not store packed (unknown, or 16 bits)"
        )


def _stored_parameter(state: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = state.get(name)
    if tensor is None:
        raise SpecError(f"{name}: in the inventory but not in the model; make the inventory from this very model")
    if tuple(tensor.shape) != tuple(shape):
        raise SpecError(f"{name}: shape is {tuple(tensor.shape)}; the inventory says {tuple(shape)}")
    return tensor


def to_float16(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """``tensor`` as stored: float16. Raises DataError naming ``name`` for NaN, infinite or too large values."""
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{name}: has NaN or infinite values; repair or retrain the model before packing it")
    half = tensor.detach().to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise DataError(f"{name}: {float(tensor.abs().max()):.4g} does not fit float16 (at most 65504)")
    return half


def _check_quantized(unit: Unit, spec: QuantSpec, quantized: QuantizedWeight) -> None:
    codes, scales = quantized.codes, quantized.scales
    if quantized.spec != spec:
        raise SpecError(f"{unit.name}: weight was quantized to {quantized.spec}, the allocation says {spec}")
    shape = (unit.rows, spec.num_codes(unit.rows, unit.cols) // unit.rows)
    if codes.dtype != torch.uint8 or tuple(codes.shape) != shape:
        raise SpecError(
            f"{unit.name}: codes are {codes.dtype} of shape {tuple(codes.shape)}; expected torch.uint8 {shape}"
        )
    if codes.numel() and int(codes.max()) >= spec.num_levels:
        raise SpecError(f"{unit.name}: code {int(codes.max())} is out of range; {spec} has {spec.num_levels} levels")
    num_scales = spec.num_scales(unit.rows, unit.cols)
    if scales.numel() != num_scales:
        raise SpecError(f"{unit.name}: {scales.numel()} scales; {spec} needs {num_scales}")
    if not bool(torch.isfinite(scales).all()):
        raise SpecError(f"{unit.name}: a scale is NaN or infinite; quantize it again")
    if spec.scale_bits == 16 and not torch.equal(scales.to(torch.float16).to(scales.dtype), scales):
        raise SpecError(f"{unit.name}: scales are not exactly float16 numbers; round them before choosing the codes")
    _check_codebook(unit, spec, quantized)


def _check_codebook(unit: Unit, spec: QuantSpec, quantized: QuantizedWeight) -> None:
    codebook = quantized.codebook
    if not spec.is_product:
        if codebook is not None:
            raise SpecError(f"{unit.name}: has a codebook, but {spec} has fixed levels")
        return
    shape = (NUM_CENTROIDS, spec.vector_size)
    if codebook is None or tuple(codebook.shape) != shape or quantized.cols != unit.cols:
        found = None if codebook is None else tuple(codebook.shape)
        raise SpecError(
            f"{unit.name}: codebook {found} for {quantized.cols} columns; {spec} needs {shape} for {unit.cols}"
        )
    if not bool(torch.isfinite(codebook).all()) or not torch.equal(codebook.half().to(codebook.dtype), codebook):
        raise SpecError(f"{unit.name}: the codebook is not exactly float16 numbers; round it before choosing the codes")


def _stored_scales(unit: Unit, spec: QuantSpec, quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Scales as float16, or as shared float16 numbers and bytes. Raises SpecError for scales that are no such product."""
    if not spec.has_scales:
        return {}
    if spec.scale_bits == 16:
        return {f"{unit.name}.scales": quantized.scales.to(torch.float16).reshape(-1)}
    scale = compact_scale(quantized.scales.float(), spec, unit.cols)
    supers, codes = split_scale(scale, spec)
    if not torch.equal(join_scale(supers, codes), scale):
        raise SpecError(
            f"{unit.name}: scales are not exactly 8-bit scales of {spec}; round them before choosing the codes"
        )
    return {f"{unit.name}.scales": supers.reshape(-1), f"{unit.name}.scale_codes": codes.reshape(-1)}


def _check_ties(model: nn.Module, packed: Sequence[Unit]) -> None:
    """Ties of packed units come back from quantization_config; all others must be those transformers makes by itself."""
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    declared = expand(all_submodels=True) if expand is not None else {}
    sharing: dict[int, set[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        sharing.setdefault(id(tensor), set()).add(name)
    for target, source in declared.items():
        if target in state and source in state and state[target] is not state[source]:
            raise SpecError(f"config.json ties {target} to {source}, but they differ; set tie_word_embeddings=False")
    restored = set(declared) | set(declared.values())
    own = {f"{name}.weight" for u in packed for name in (u.name, *u.tied)}
    for names in sharing.values():
        if len(names) > 1 and not names <= own and (names & own or not names <= restored):
            raise SpecError(f"{' and '.join(sorted(names))} share one tensor in a way that loading would not restore")


def _save_configs(model: Any, quantization_config: dict[str, Any], directory: Path) -> None:
    config = copy.deepcopy(model.config)
    config.quantization_config = quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def _sync(directory: Path) -> None:
    """Have everything in ``directory`` on the disk: configuration and tokenizer are written by others, who do not see to it."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    sync_folder(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _usable_target(directory: Path, overwrite: bool) -> Path:
    target = directory.absolute()
    if target.exists() and not target.is_dir():
        raise SpecError(f"{directory}: is a file; expected a directory to write the model to")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise SpecError(f"{directory}: is not empty; choose another directory or ask to overwrite it")
        if not (target / "config.json").is_file():
            raise SpecError(f"{directory}: is not a model directory (no config.json); it is not overwritten")
    return target


def _take_name(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``; a directory already there is moved aside first and then removed."""
    if not target.exists():
        os.replace(temporary, target)
        sync_folder(target.parent)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.replace(target, aside / "model")
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(aside / "model", target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(target.parent)
