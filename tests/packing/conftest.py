"""A small tied OPT, its inventory, an allocation of several widths and the quantized weights."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from mixbits.packing.checkpoint import save_packed
from mixbits.quant.grid import quantize_weight
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight, QuantSpec

WIDTHS = (1.58, 3, 4, 8, 16, 1, 2)


@dataclass
class Job:
    model: Any
    inventory: ModelInventory
    allocation: BitAllocation
    weights: dict[str, QuantizedWeight]

    def save(self, directory, **kwargs):
        return save_packed(self.model, self.inventory, self.allocation, self.weights, directory, **kwargs)


@pytest.fixture
def job() -> Job:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 21, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = OPTConfig(vocab_size=23, num_hidden_layers=1, max_position_embeddings=12, **sizes, **special)
    model = OPTForCausalLM(config).eval()
    inventory = find_units(model)
    others = [u.name for u in inventory.units if not u.is_position_table]
    specs = {u.name: QuantSpec(4, granularity="tensor") for u in inventory.units}
    specs |= {name: QuantSpec(WIDTHS[i % len(WIDTHS)]) for i, name in enumerate(others)}
    matrices = unit_matrices(model, inventory)
    weights = {name: quantize_weight(matrices[name], spec) for name, spec in specs.items() if spec.is_quantized}
    return Job(model, inventory, BitAllocation(specs), weights)


@pytest.fixture
def packed(job, tmp_path):
    """Directory of the packed model."""
    job.save(tmp_path / "model")
    return tmp_path / "model"
