"""Makes the packed models under ``golden``: a tiny OPT with every kind of unit, whose numbers all come from formulas.

    python tests/packing/make_golden.py FOLDER

``v2``: as written today. ``v1``: what format version 1 wrote, the same weight file and a configuration without checksums and byte
order. ``v2-shards``: split at 1500 bytes. ``v2-archive``: archived. The committed files are never made again: a change of the
format gets a new folder, and the old ones stay readable. A test makes ``v2`` again and compares it byte by byte.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from mixbits.packing.archive import archive_packed
from mixbits.packing.checkpoint import save_packed
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantizedWeight, QuantSpec

LAYER = "model.decoder.layers.0"
SPECS = {
    "model.decoder.embed_tokens": "1.58-papers-row-s8",
    "model.decoder.embed_positions": "4-papers-row",
    f"{LAYER}.self_attn.k_proj": "1-papers-tensor",
    f"{LAYER}.self_attn.v_proj": "2-half-step-g3-s8",
    f"{LAYER}.self_attn.q_proj": "3-papers-row",
    f"{LAYER}.self_attn.out_proj": "8-papers-g4",
    f"{LAYER}.fc1": "4-product-v2",
    f"{LAYER}.fc2": "16-float-row",
}
SHARD_BYTES = 1500


def code(i: int, num_levels: int) -> int:
    """Code number i of a unit."""
    return (3 * i * i + 7 * i + 1) % num_levels


def float_scale(i: int) -> float:
    """Scale number i that is stored as float16, and the number shared by a set of byte scales."""
    return (i % 13 + 1) / 64


def scale_code(i: int, per_set: int) -> int:
    """Byte scale number i; the first of each set that shares a float16 number is the largest."""
    return 255 if i % per_set == 0 else (37 * i) % 254 + 1


def centroid(i: int) -> float:
    """Number i of a codebook, row by row."""
    return (i % 61 - 30) / 16


def other(i: int) -> float:
    """Number i of a parameter that is stored as float16."""
    return (i % 7 - 3) / 8


def scales(spec: QuantSpec, rows: int, cols: int) -> list[float]:
    """All scales of a unit, row by row."""
    count = spec.num_scales(rows, cols)
    if spec.scale_bits == 16:
        return [float_scale(i) for i in range(count)]
    per_set = spec.num_groups(cols) if spec.granularity == "group" else rows
    return [scale_code(i, per_set) * float_scale(i // per_set) / 256 for i in range(count)]


def build() -> OPTForCausalLM:
    """The model, its parameters filled by :func:`other`."""
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 11, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = OPTConfig(vocab_size=13, num_hidden_layers=1, max_position_embeddings=6, **sizes, **special)
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.tensor([other(i) for i in range(parameter.numel())])
            parameter.copy_(numbers.view(parameter.shape))
    return model


def make(directory: Path, **options: int) -> None:
    """Write the model packed."""
    model = build()
    inventory = find_units(model)
    allocation = BitAllocation({name: QuantSpec.parse(text) for name, text in SPECS.items()})
    weights = {}
    for unit in inventory.units:
        spec = allocation.specs[unit.name]
        if spec.is_quantized:
            count = spec.num_codes(unit.rows, unit.cols)
            codes = torch.tensor([code(i, spec.num_levels) for i in range(count)], dtype=torch.uint8)
            numbers = [centroid(i) for i in range(256 * spec.vector_size)]
            codebook = torch.tensor(numbers).view(256, -1) if spec.is_product else None
            scale = torch.tensor(scales(spec, unit.rows, unit.cols))
            weights[unit.name] = QuantizedWeight(spec, codes.view(unit.rows, -1), scale, codebook, unit.cols)
    save_packed(model, inventory, allocation, weights, directory, **options)
    for name in ("README.md", "generation_config.json"):
        (directory / name).unlink()


def main(folder: Path) -> None:
    """Write all golden models into ``folder``."""
    make(folder / "v2")
    make(folder / "v2-shards", max_shard_bytes=SHARD_BYTES)
    shutil.copytree(folder / "v2", folder / "v2-archive")
    archive_packed(folder / "v2-archive")
    shutil.copytree(folder / "v2", folder / "v1")
    config = json.loads((folder / "v1" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    for key in ("checksums", "byte_order"):
        del config["quantization_config"][key]
    (folder / "v1" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
