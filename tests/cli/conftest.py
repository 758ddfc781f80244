"""A tiny text and a random OPT with its words: enough for the commands that train."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixbits.packing.checkpoint import save_packed
from mixbits.quant.grid import quantize_weight
from mixbits.quant.units import find_units, unit_matrices

LINES = [
    f"the {a} {n} {v} a {m}"
    for a in ("small", "old")
    for n in ("cat", "dog", "bird", "fish")
    for v in ("sees", "likes", "hears")
    for m in ("mouse", "horse", "cow", "sheep")
]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """Folder with text.txt, valid.txt and the model directory ``full``."""
    from mixbits.lm.checkpoint import save_model
    from mixbits.lm.presets import ModelSize, build_model
    from mixbits.lm.tokenizer import word_tokenizer

    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text("\n".join(LINES * 2) + "\n")
    (folder / "valid.txt").write_text("\n".join(LINES[::7]) + "\n")
    tokenizer = word_tokenizer(LINES, max_length=16)
    size = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=32, num_heads=2, context=16)
    save_model(build_model(size, tokenizer, seed=0).eval(), tokenizer, folder / "full")
    return folder


@pytest.fixture(scope="session")
def pack_llama():
    """Function that packs a random tied Llama: directory, function inventory -> allocation; gives (inventory, allocation, weights)."""

    def pack(directory, allocate):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes, **special, tie_word_embeddings=True))
        inventory = find_units(model)
        allocation = allocate(inventory)
        weights = {
            name: quantize_weight(matrix, allocation.specs[name])
            for name, matrix in unit_matrices(model, inventory).items()
            if allocation.specs[name].is_quantized
        }
        save_packed(model, inventory, allocation, weights, directory)
        return inventory, allocation, weights

    return pack
