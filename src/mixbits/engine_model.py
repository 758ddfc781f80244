"""A packed model's files as the CPU library's structures: what :class:`mixbits.engine.Engine` computes with.

Tensors are read one at a time and repacked into the run-time layout, so neither the file's bytes nor full-precision weights are held
beside it. As strict as loading into transformers: every tensor and tie of the files must belong to the architecture that
config.json describes, and every tensor of the architecture must be there. Limits: :func:`unsupported`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixbits.errors import FormatError, SpecError
from mixbits.kernels import cpu
from mixbits.kernels.cpu import LayerStruct, MatrixStruct, ModelStruct, PackedMatrix
from mixbits.packing.config import read_config
from mixbits.packing.verify import read_units, verify_packed
from mixbits.packing.weightfile import TensorReader
from mixbits.scales import stored_scale
from mixbits.spec import QuantSpec, StoredTensor

_ACTIVATION_NUMBERS = {
    "relu": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "gelu_fast": 2,
    "silu": 3,
    "swish": 3,
}
_FAMILIES = {"opt": "OPTForCausalLM", "llama": "LlamaForCausalLM"}
_ROTARY = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the input's length
_OPT_OFFSET = 2
_MAX_ROTARY = 1 << 26
_NAMES = {
    "opt": {
        "embedding": "model.decoder.embed_tokens", "positions": "model.decoder.embed_positions",
        "final": "model.decoder.final_layer_norm", "layers": "model.decoder.layers",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj",
        "up": "fc1", "down": "fc2", "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm",
    },
    "llama": {
        "embedding": "model.embed_tokens", "final": "model.norm", "layers": "model.layers",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    },
}  # fmt: skip


def unsupported(directory: str | Path) -> str | None:
    """Why the engine cannot run the packed model in ``directory``, in words; None if it can. Reads config.json only.

    Raises DataError, FormatError for a directory that is no packed model.
    """
    if not cpu.is_available():
        return cpu.why_unavailable()
    config = read_config(directory)
    packed = read_units(config["quantization_config"], where=str(Path(directory) / "config.json"))
    for unit in packed.units:
        if packed.specs[unit.name].is_product:
            return f"unit {unit.name} is product-quantized ({packed.specs[unit.name]})"
    return _unsupported_config(config)


def _unsupported_config(config: Mapping[str, Any]) -> str | None:
    kind = config.get("model_type")
    names = config.get("architectures")
    names = [str(name) for name in names] if isinstance(names, list) else []
    if not isinstance(kind, str) or kind not in _FAMILIES or names != [_FAMILIES[kind]]:
        return f"it is a {', '.join(names) or kind}; the engine has {' and '.join(_FAMILIES.values())}"
    act = config.get("activation_function", "relu") if kind == "opt" else config.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in _ACTIVATION_NUMBERS:
        return f"its activation function {act!r:.100} is not among {', '.join(_ACTIVATION_NUMBERS)}"
    if kind == "opt":
        if config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")):
            return "its embeddings are projected to another width"
        if not config.get("layer_norm_elementwise_affine", True):
            return "its norms have no weights"
        return None
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = rotary.get("rope_type", rotary.get("type", "default")) if isinstance(rotary, dict) else rotary
    if found not in _ROTARY:
        return f"its rotary positions are {found!r:.100}; the engine has {', '.join(_ROTARY)}"
    return None


@dataclass(frozen=True)
class Loaded:
    """Verified files: configuration, specs and shapes of units, tied name -> unit, tensors by name."""

    config: Any
    specs: Mapping[str, QuantSpec]
    shapes: Mapping[str, tuple[int, int]]
    ties: Mapping[str, str]
    stored: Mapping[str, StoredTensor]
    reader: TensorReader


def read_model(directory: Path) -> Loaded:
    """Verify a packed model's files. Raises DataError, FormatError."""
    from transformers import AutoConfig

    weights, packed = verify_packed(directory)
    ties = {other: unit.name for unit in packed.units for other in unit.tied}
    shapes = {unit.name: (unit.rows, unit.cols) for unit in packed.units}
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a damaged field can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{directory / 'config.json'}: transformers cannot read it ({reason:.200})") from None
    return Loaded(config, packed.specs, shapes, ties, {t.name: t for t in weights.tensors}, weights.reader())


class Builder:
    """Fills the library's structures from the tensors and keeps what they point to, ``num_bytes`` in all."""

    def __init__(self, loaded: Loaded, where: Path) -> None:
        self._loaded, self._where = loaded, where
        self.kept: list[Any] = []
        self.num_bytes = 0
        self._done: dict[str, PackedMatrix] = {}
        self._used: set[str] = set()

    def is_tied(self, name: str) -> bool:
        """Whether a layer has its matrix from another one."""
        return name in self._loaded.ties

    def matrix(self, name: str) -> MatrixStruct:
        """Of a layer, tied or not, packed or of 16 bits."""
        self._used.add(name)
        name = self._loaded.ties.get(name, name)
        if name not in self._done:
            matrix = self._done[name] = self._repack(name)
            self.num_bytes += matrix.num_bytes
        return self._done[name].struct

    def _repack(self, name: str) -> PackedMatrix:
        codes = self._tensor(f"{name}.weight")
        spec = self._loaded.specs.get(name, QuantSpec(16))
        if not spec.is_quantized:
            if codes.dim() != 2 or codes.dtype != torch.float16:
                raise FormatError(
                    f"{self._where}: tensor {name + '.weight'!r} is {codes.dtype} {tuple(codes.shape)}; expected a float16 matrix"
                )
            return cpu.repack(codes, None, spec, *codes.shape)
        rows, cols = self._loaded.shapes[name]
        scale_codes = self._tensor(f"{name}.scale_codes") if spec.scale_bits == 8 else None
        scale = stored_scale(self._tensor(f"{name}.scales"), scale_codes, spec, cols)
        return cpu.repack(codes, scale, spec, rows, cols)

    def vector(self, name: str, size: int, *, wanted: bool = True) -> int | None:
        """Address of a vector in float32; None where the architecture has none."""
        if not wanted:
            return None
        found = self._tensor(name)
        if tuple(found.shape) != (size,):
            raise FormatError(f"{self._where}: tensor {name!r} has shape {tuple(found.shape)}; expected ({size},)")
        return self.keep(found.float())

    def keep(self, tensor: torch.Tensor) -> int:
        """Hold a float32 tensor for as long as the builder lives; returns its address."""
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        self.num_bytes += 4 * tensor.numel()
        return tensor.data_ptr()

    def finish(self) -> None:
        """Raise FormatError for tensors and ties that no part of the model asked for; forget the files."""
        for name in self._loaded.stored:
            if name not in self._used:
                raise FormatError(
                    f"{self._where}: tensor {name[:200]!r} is not part of the model config.json describes"
                )
        for name in self._loaded.ties:
            if name not in self._used:
                raise FormatError(
                    f"{self._where}: {name[:200]!r}, tied to {self._loaded.ties[name][:200]!r}, is not part of the model "
                    "config.json describes"
                )
        self.kept.extend(self._done.values())
        del self._loaded, self._done

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self._loaded.stored.get(name)
        if stored is None:
            raise FormatError(f"{self._where}: tensor {name!r} is missing; the model config.json describes has it")
        self._used.add(name)
        return self._loaded.reader.tensor(stored)


def build_model(loaded: Loaded, where: Path) -> tuple[ModelStruct, Builder]:
    """The whole model. The builder keeps the memory it points to. Raises FormatError, SpecError."""
    config, kind = loaded.config, loaded.config.model_type
    names, build, opt = _NAMES[kind], Builder(loaded, where), kind == "opt"
    model = ModelStruct(family=0 if opt else 1, norm_first=int(config.do_layer_norm_before) if opt else 1)
    _sizes(model, config, opt=opt, where=where, most_layers=len(loaded.stored))
    model.activation = _ACTIVATION_NUMBERS[config.activation_function if opt else config.hidden_act]
    model.position_offset = _OPT_OFFSET if opt else 0
    model.eps = 1e-5 if opt else config.rms_norm_eps
    model.attention_scale = model.head_dim**-0.5
    model.embedding = build.matrix(names["embedding"])
    own_head = not config.tie_word_embeddings or build.is_tied("lm_head")
    model.head = build.matrix("lm_head" if own_head else names["embedding"])
    if opt:
        model.positions = build.matrix(names["positions"])
        if model.positions.rows != model.context + _OPT_OFFSET:
            raise FormatError(
                f"{where}: {model.positions.rows} positions are stored; max_position_embeddings of config.json says {model.context} "
                f"and {_OPT_OFFSET}"
            )
    else:
        cosine, sine = _rotary(config, model.head_dim, where)
        model.rope_cos, model.rope_sin = build.keep(cosine), build.keep(sine)
    final = not opt or (config.do_layer_norm_before and not config._remove_final_layer_norm)
    model.final_gain = build.vector(f"{names['final']}.weight", model.hidden, wanted=final)
    model.final_bias = build.vector(f"{names['final']}.bias", model.hidden, wanted=final and opt)
    layers = (LayerStruct * model.num_layers)()
    for i, layer in enumerate(layers):
        _fill_layer(layer, build, f"{names['layers']}.{i}.", names, config, opt=opt)
    build.kept.append(layers)
    model.layers = ctypes.cast(layers, ctypes.POINTER(LayerStruct))
    build.finish()
    if error := cpu.library().mb_check_model(ctypes.byref(model)):
        text = cpu.library().mb_error_text(error).decode()
        raise FormatError(f"{where}: its tensors do not make up the model config.json describes: {text}")
    return model, build


def _sizes(model: ModelStruct, config: Any, *, opt: bool, where: Path, most_layers: int) -> None:
    fields = {
        "num_layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
        "kv_heads": "num_attention_heads" if opt else "num_key_value_heads", "feed_forward": "ffn_dim" if opt else "intermediate_size",
        "context": "max_position_embeddings",
    }  # fmt: skip
    for ours, theirs in fields.items():
        value, most = getattr(config, theirs), most_layers if ours == "num_layers" else 1 << 30
        if not isinstance(value, int) or not 1 <= value <= most:
            raise FormatError(f"{where / 'config.json'}: {theirs} is {value!r:.100}; expected 1 to {most}")
        setattr(model, ours, value)
    dim = None if opt else getattr(config, "head_dim", None)
    dim = dim or model.hidden // model.heads
    if not 1 <= dim * model.heads <= 1 << 30 or (opt and dim * model.heads != model.hidden):
        raise FormatError(
            f"{where / 'config.json'}: {model.heads} heads of {dim} in a hidden size of {model.hidden}: impossible"
        )
    model.head_dim = dim


def _fill_layer(layer: LayerStruct, build: Builder, prefix: str, names: Mapping[str, str], config: Any, *, opt: bool) -> None:  # fmt: skip
    for short in ("q", "k", "v", "o", "gate", "up", "down"):
        if short not in names:
            continue
        matrix = build.matrix(prefix + names[short])
        setattr(layer, short, matrix)
        biased = config.enable_bias if opt else config.attention_bias if short in "qkvo" else config.mlp_bias
        setattr(layer, f"{short}_bias", build.vector(f"{prefix}{names[short]}.bias", matrix.rows, wanted=biased))
    for short in ("norm1", "norm2"):
        name = prefix + names[short]
        setattr(layer, f"{short}_gain", build.vector(f"{name}.weight", config.hidden_size))
        setattr(layer, f"{short}_bias", build.vector(f"{name}.bias", config.hidden_size, wanted=opt))


def _rotary(config: Any, head_dim: int, where: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(context, head_dim) cosines and sines, by transformers' own module, whatever the scaling."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    context = config.max_position_embeddings
    if context * head_dim > _MAX_ROTARY:
        raise SpecError(
            f"{where / 'config.json'}: rotary positions of {context} places x {head_dim} are more than {_MAX_ROTARY} numbers"
        )
    try:
        cosine, sine = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(context)[None])
    except Exception as error:  # a damaged field can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{where / 'config.json'}: no rotary positions come of it ({reason:.200})") from None
    if tuple(cosine.shape) != (1, context, head_dim):
        raise SpecError(
            f"{where / 'config.json'}: rotary positions turn {cosine.shape[-1]} of {head_dim} columns of a head; the native engine "
            "turns all; mixbits.load can run it"
        )
    return cosine[0].float(), sine[0].float()
