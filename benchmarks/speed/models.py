"""Models to time: configurations of both families at several sizes, packed with random codes, and their dense twins.

The speed of a model does not depend on its weights, so codes are drawn at random and scales chosen so that activations keep their
size. The dense twin holds the very weights of the packed directory in float32, so that what is timed against each other also
computes the same. ``36.6M`` is a word-level language model that does not fit a usual L2 cache in float32 but nearly does in 2 bits.
Llama's gated feed-forward has three matrices where OPT's has two; its width is the multiple of 256 (llama.cpp's k-quants need one)
nearest to the same number of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mixbits.packing.checkpoint import save_packed
from mixbits.packing.modules import PackedUnit
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantizedWeight, QuantSpec

Family = Literal["opt", "llama"]


@dataclass(frozen=True)
class Size:
    """Layers, widths (``gated``: the feed-forward width of Llama), heads, words, positions."""

    layers: int
    width: int
    feed_forward: int
    gated: int
    heads: int
    vocabulary: int = 10_000
    context: int = 256


SIZES = {
    "tiny": Size(2, 256, 512, 256, 4, vocabulary=1000),  # for trying the benchmark out
    "8M": Size(4, 256, 2048, 1280, 4),
    "36.6M": Size(6, 512, 4096, 2816, 8),
    "100M": Size(12, 768, 3584, 2304, 12),
    "300M": Size(24, 1024, 4096, 2816, 16),
}
MAIN = "36.6M"


def configuration(size: Size, family: Family) -> Any:
    """The transformers configuration, embeddings tied; OPT with LayerNorm first and ReLU."""
    from transformers import LlamaConfig, OPTConfig

    shared: dict[str, Any] = {
        "vocab_size": size.vocabulary, "hidden_size": size.width, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "max_position_embeddings": size.context, "tie_word_embeddings": True,
        "pad_token_id": None, "bos_token_id": 2, "eos_token_id": 2, "attention_dropout": 0.0,
    }  # fmt: skip
    if family == "llama":
        return LlamaConfig(
            intermediate_size=size.gated, num_key_value_heads=size.heads, rms_norm_eps=1e-5, hidden_act="silu", **shared
        )
    return OPTConfig(
        ffn_dim=size.feed_forward, word_embed_proj_dim=size.width, do_layer_norm_before=True, activation_function="relu",
        dropout=0.0, layerdrop=0.0, **shared,
    )  # fmt: skip


def _random_weight(rows: int, cols: int, spec: QuantSpec, size: float, generator: torch.Generator) -> QuantizedWeight:
    """Codes drawn uniformly, one scale a row so that weights have standard deviation ``size``, within 20 %."""
    levels = torch.tensor(spec.levels)
    codes = torch.randint(0, len(levels), (rows, cols), dtype=torch.uint8, generator=generator)
    scale = size / float(levels.square().mean().sqrt()) * (0.8 + 0.4 * torch.rand(rows, generator=generator))
    return QuantizedWeight(spec, codes, scale.to(torch.float16).float())


def write_random_packed(config: Any, bit_width: float, directory: Path, *, seed: int) -> None:
    """A packed model directory of ``config`` with random codes, every matrix at ``bit_width`` (positions at 4 bits at least)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        inventory = find_units(AutoModelForCausalLM.from_config(config))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    allocation = BitAllocation.uniform(inventory, QuantSpec(bit_width))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for unit in inventory.units:
        # Embeddings twice as large: tied to the output layer, they give logits of standard deviation about 2.
        size = (2.0 if unit.kind == "embedding" else 1.0) / unit.cols**0.5
        weights[unit.name] = _random_weight(unit.rows, unit.cols, allocation.specs[unit.name], size, generator)
    save_packed(model, inventory, allocation, weights, directory, overwrite=True)


def dense_twin(packed: Any) -> Any:
    """A plain transformers model in float32 with the weights of the packed one, in evaluation mode."""
    import copy

    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(packed.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).eval().float()
    state = packed.state_dict()
    with torch.no_grad():
        for name, module in model.named_modules():
            twin = packed.get_submodule(name)
            for key, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{key}"
                parameter.copy_(
                    twin.matrix(torch.float32) if isinstance(twin, PackedUnit) and key == "weight" else state[full]
                )
    model.tie_weights()
    return model.requires_grad_(False)
