"""Packed models in transformers: ``import mixbits.hf``, then ``AutoModelForCausalLM.from_pretrained(directory)``.

Importing this module registers the quantization method ``mixbits``. On loading, the files are verified first, then the units'
layers are replaced by packed ones (:mod:`mixbits.packing.modules`) before transformers fills in the tensors. Tied layers share
the packed tensors of their owner and have none of their own, so they are taken out of transformers' tying.
``save_pretrained`` of a loaded model writes the tensors it was read with: unchanged, they are the same files.

Why names stand under ``.weight``: without this module, transformers meets uint8 codes of another shape and raises, where
a name it does not know would only have been a warning. On the CPU the packed tensors stay in transformers' memory map of the
weight files: nothing is copied. Limits: inference only; the class the model was packed from (not a bare base model); no upload
from ``save_pretrained``; archives are opened by :func:`load` only.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.kernels.cpu import Activations, activation_number, is_available, say_unavailable
from mixbits.layers import layer_kind
from mixbits.packing.archive import unarchived
from mixbits.packing.checkpoint import to_float16
from mixbits.packing.kernel_layers import use_kernels
from mixbits.packing.modules import PackedUnit, packed_layer, set_weight_cache
from mixbits.packing.verify import (
    BYTE_ORDER,
    CONFIG_VERSION,
    QUANT_METHOD,
    PackedUnits,
    read_quantization_config,
    read_units,
    verify_weights,
)
from mixbits.packing.weightset import WeightSet, archived, read_weight_files, weight_paths, write_weights
from mixbits.spec import MAX_SHARD_BYTES, StoredTensor, Unit


class MixbitsConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed model, kept exactly as it stands in config.json."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        for key, value in fields.items():
            setattr(self, key, value)


class MixbitsQuantizer(HfQuantizer):
    """Builds the packed layers of a model that transformers is loading. Only for models already packed."""

    requires_calibration = True
    stored: tuple[StoredTensor, ...] = ()

    def is_serializable(self) -> bool:
        """Packed models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """Reached only if the model lost its own ``save_pretrained`` (it was pickled). Raises SpecError."""
        raise SpecError("this copy of a packed model cannot be saved; load it from its directory and save that")

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Reached before transformers looks for weight files. Raises FormatError for an archive, whose files it would not find."""
        if "archive" in self.quantization_config.to_dict():
            raise FormatError(
                "this packed model is archived, which from_pretrained cannot read; load it with mixbits.load(directory), or unpack "
                "it with: mixbits unarchive DIRECTORY"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise FormatError("a packed model is loaded from its weight files; got none. Load it from its directory")
        config = self.quantization_config.to_dict()
        where = str(Path(checkpoint_files[0]).with_name("config.json"))
        packed = read_units(config, where=where)
        weights = read_weight_files(checkpoint_files)
        verify_weights(weights, packed)
        replace_units(model, packed, where=where)
        check_names(model, weights)
        self.stored = weights.tensors

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, PackedUnit) and not module.is_intact():
                raise SpecError(f"{name}: transformers cast the packed tensors while loading; please report this")
        model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[method-assign]


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(MixbitsConfig)
    register_quantizer(QUANT_METHOD)(MixbitsQuantizer)


def replace_units(model: PreTrainedModel, packed: PackedUnits, *, where: str) -> None:
    """Replace the layers of all packed units, in place. Raises FormatError naming ``where`` and the unit.

    Every name must be a layer of the model with the unit's kind and shape; ties must agree with those of the model.
    """
    model_ties = model.all_tied_weights_keys
    for unit in packed.units:
        spec = packed.specs[unit.name]
        layers = {name: _layer(model, name, unit, where) for name in (unit.name, *unit.tied)}
        if layer_kind(layers[unit.name]) != unit.kind:
            raise FormatError(
                f"{where}: unit {unit.name!r} is a {type(layers[unit.name]).__name__} in {type(model).__name__}; "
                f"its kind says {unit.kind!r}"
            )
        names = {f"{name}.weight" for name in layers}
        touched = {key for pair in model_ties.items() for key in pair if names & set(pair)}
        if not touched <= names:
            raise FormatError(
                f"{where}: {type(model).__name__} ties {', '.join(sorted(touched))}; unit {unit.name!r} lists as tied: "
                f"{', '.join(unit.tied) or 'nothing'}"
            )
        if not spec.is_quantized:
            continue
        owner: PackedUnit | None = None
        for name, layer in layers.items():
            new = packed_layer(unit, spec, layer, owner=owner)
            owner = owner or new
            model.set_submodule(name, new)
        for key in names & set(model_ties):
            del model_ties[key]


def _layer(model: PreTrainedModel, name: str, unit: Unit, where: str) -> nn.Module:
    role = "unit" if name == unit.name else f"tied to {unit.name!r}:"
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    kind = layer_kind(layer) if layer is not None and name else None
    if layer is None or kind is None:
        raise FormatError(
            f"{where}: {role} {name!r} is not a Linear, Conv1D or Embedding of {type(model).__name__}: a wrong layer name, or "
            "another class than the one that was packed (load causal LMs with AutoModelForCausalLM)"
        )
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    shape = tuple(weight.T.shape if kind == "conv1d" else weight.shape)
    if shape != (unit.rows, unit.cols) or (kind == "conv1d") != (unit.kind == "conv1d"):
        raise FormatError(
            f"{where}: {role} {name!r} is a {type(layer).__name__} with (outputs, inputs) = {shape} in config.json; "
            f"quantization_config says {unit.kind} ({unit.rows}, {unit.cols})"
        )
    return layer


def check_names(model: PreTrainedModel, weights: WeightSet) -> None:
    """Raise FormatError unless the files hold exactly the tensors of ``model`` (packed layers in place), in their shapes."""
    stored, state = weights.by_name, model.state_dict()
    ties = [{target, source} for target, source in model.all_tied_weights_keys.items()]
    for name, tensor in state.items():
        if name not in stored:
            if not any(name in pair and pair & set(stored) for pair in ties):
                raise FormatError(f"{weights.path}: tensor {name!r} of {type(model).__name__} is missing")
        elif stored[name].shape != tuple(tensor.shape):
            raise FormatError(
                f"{weights.paths[name]}: tensor {name!r}: shape is {stored[name].shape}; {type(model).__name__} has {tuple(tensor.shape)}"
            )
    extra = sorted(set(stored) - set(state))
    if extra:
        raise FormatError(
            f"{weights.paths[extra[0]]}: tensor {extra[0]!r} is not part of {type(model).__name__} ({len(extra)} such): a wrong layer "
            "name, or another class than the one that was packed"
        )


def check_model(directory: str | Path, weights: WeightSet, packed: PackedUnits) -> str:
    """Whether the model that config.json describes has exactly these units, ties and tensors. Returns the name of its class.

    Builds it without weights. Raises FormatError, also for a configuration that transformers cannot build a model of.
    """
    where = str(Path(directory) / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a damaged field can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FormatError(f"{where}: transformers cannot build the model it describes ({reason:.200})") from None
    replace_units(model, packed, where=where)
    check_names(model, weights)
    return type(model).__name__


def save_pretrained(
    self: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = MAX_SHARD_BYTES,
    **kwargs: Any,
) -> None:
    """Write config, generation config and weight files of a packed model; everything not packed rounded to float16.

    max_shard_size: data bytes of one weight file, a number or text as "5GB". Other arguments of transformers' method (variant,
    ...) do not apply and are ignored. Raises SpecError for ``push_to_hub``, a size that cannot be read and a model whose tensors
    changed shape, DataError for values that do not fit float16.
    """
    if push_to_hub:
        raise SpecError("a packed model is not uploaded by save_pretrained; save it to a directory and upload that")
    if not is_main_process:
        return
    tensors = dict(self.state_dict() if state_dict is None else state_dict)
    quantizer = self.hf_quantizer
    assert isinstance(quantizer, MixbitsQuantizer)
    stored = quantizer.stored
    ready = {entry.name: _stored_value(entry, tensors.get(entry.name)) for entry in stored}
    directory, limit = Path(save_directory), _num_bytes(max_shard_size)
    directory.mkdir(parents=True, exist_ok=True)
    written = write_weights(directory, stored, ready, max_shard_bytes=limit)
    config = copy.deepcopy(self.config)
    described: Any = config.quantization_config
    described.format_version, described.byte_order = CONFIG_VERSION, BYTE_ORDER
    described.checksums = written.checksums
    if written.file_bytes != described.file_bytes:
        described.file_bytes = written.file_bytes
        described.compression_ratio = round(4 * described.num_parameters / written.file_bytes, 4)
        described.bits_per_weight = round(8 * written.file_bytes / described.num_parameters, 4)
    config.architectures = [type(self).__name__]
    config.dtype = str(self.dtype).removeprefix("torch.")
    config.save_pretrained(directory)
    if self.can_generate() and self.generation_config is not None:
        self.generation_config.save_pretrained(directory)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def _num_bytes(size: int | str) -> int:
    found = re.fullmatch(r"([0-9]{1,18})(|[KMG]I?B)", str(size).strip().upper())
    if found is None:
        raise SpecError(f"max_shard_size is {size!r}; expected a number of bytes or text as '5GB'")
    return int(found[1]) * _UNITS[found[2]]


def _stored_value(entry: StoredTensor, tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None or tuple(tensor.shape) != entry.shape or (tensor.dtype == torch.uint8) != (entry.dtype == "U8"):
        found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise SpecError(f"{entry.name}: {found}; it was loaded as {entry.dtype} {entry.shape} and cannot be saved so")
    return tensor if entry.dtype == "U8" else to_float16(tensor, entry.name)


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    cache_weights: bool = False,
    kernels: Activations | None = None,
) -> PreTrainedModel:
    """Load a packed causal LM from a directory, in evaluation mode. An archive is unpacked into a temporary folder for it.

    dtype: of activations (default float32); cache_weights: keep the unpacked matrices after first use, 4 bytes a weight
    in float32, which makes repeated scoring faster; kernels: multiply with the compiled kernels, and with Triton's after ``.to("cuda")``,
    activations in ``int8`` or ``float32`` (:func:`~mixbits.packing.kernel_layers.use_kernels`); without the compiled library that is
    said once and PyTorch does it. Raises DataError (no such directory, files missing), FormatError, SpecError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; expected one written by mixbits")
    config, where = read_quantization_config(directory)
    read_units(config, where=where)
    paths = weight_paths(directory)
    if all(path.exists() for path in paths):
        model = _from_pretrained(directory, dtype, is_unpacked="archive" in config)
    elif any(archived(path).exists() for path in paths):
        with unarchived(directory) as folder:
            model = _from_pretrained(folder, dtype)
        model.config.name_or_path = model.name_or_path = str(directory)
    else:
        missing = next(path for path in paths if not path.exists())
        raise DataError(f"{missing}: no such file; {paths[0].parent} names it as a weight file of the model")
    if kernels is not None:
        activation_number(kernels)
        if is_available():
            use_kernels(model, kernels)
        else:
            say_unavailable()
    if cache_weights:
        set_weight_cache(model)
    return model


def _from_pretrained(directory: Path, dtype: torch.dtype | str | None, *, is_unpacked: bool = False) -> PreTrainedModel:
    """``is_unpacked``: by another program, which does not know of ``quantization_config.archive``."""
    options: dict[str, Any] = {"dtype": dtype or torch.float32, "local_files_only": True}
    if is_unpacked:
        options["config"] = AutoConfig.from_pretrained(directory, local_files_only=True)
        options["config"].quantization_config.pop("archive")
    return AutoModelForCausalLM.from_pretrained(directory, **options)
