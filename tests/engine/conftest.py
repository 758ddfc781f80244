"""Tiny random OPT and Llama models, packed at mixed bits, and their Hugging Face twins from the same directories."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from mixbits.asr.trie import TokenForest, build_forest
from mixbits.engine import Engine
from mixbits.hf import load
from mixbits.kernels import cpu
from mixbits.packing.checkpoint import save_packed
from mixbits.quant.grid import quantize_weight
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import BitAllocation, QuantSpec

MIXED = ("4-g7", "1.58", "16", "3-half-step", "8", "2-row-s8", "1", "4-g32-s8", "3-tensor")
CONTEXT = 14
_OPT = {"hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 41, "max_position_embeddings": CONTEXT}  # fmt: skip
_LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 41, "max_position_embeddings": CONTEXT}  # fmt: skip


def _opt(**fields: Any) -> Any:
    fields = {**_OPT, **fields}
    return OPTForCausalLM(OPTConfig(word_embed_proj_dim=fields["hidden_size"], pad_token_id=0, **fields))


def _llama(rope: Any = None, **fields: Any) -> Any:
    extra = {} if rope is None else {"rope_parameters": {"rope_theta": 100.0, **rope}}
    return LlamaForCausalLM(LlamaConfig(pad_token_id=0, **{**_LLAMA, **extra, **fields}))


ZOO = {
    "opt-post-gelu": lambda: _opt(do_layer_norm_before=False, activation_function="gelu"),
    "opt-post-relu-wide": lambda: _opt(do_layer_norm_before=False, hidden_size=132, ffn_dim=150, vocab_size=1100),
    "opt-pre-relu-untied": lambda: _opt(tie_word_embeddings=False),
    "opt-pre-gelu-tanh-no-bias": lambda: _opt(activation_function="gelu_new", enable_bias=False),
    "opt-pre-no-final-norm": lambda: _opt(_remove_final_layer_norm=True, activation_function="gelu_fast"),
    "llama-grouped-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-untied-biased": lambda: _llama(
        tie_word_embeddings=False, attention_bias=True, mlp_bias=True, num_key_value_heads=4, head_dim=10
    ),
    "llama-one-key-head": lambda: _llama(num_key_value_heads=1, head_dim=16, hidden_act="gelu", rms_norm_eps=1e-3),
    "llama-wide": lambda: _llama(hidden_size=136, intermediate_size=200, head_dim=34, vocab_size=1100),
    "llama-rope-llama3": lambda: _llama(
        {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 7,
        }
    ),
    "llama-rope-linear": lambda: _llama({"rope_type": "linear", "factor": 2.5}),
    "llama-rope-yarn": lambda: _llama({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 7}),
}  # fmt: skip


def pytest_generate_tests(metafunc):
    """A test that takes ``model_name`` runs for every model."""
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", ZOO)


@dataclass
class Packed:
    """A packed directory and the same weights as a Hugging Face model in float32."""

    name: str
    directory: Path

    @cached_property
    def twin(self) -> Any:
        return load(self.directory)

    def engine(self, **settings: Any) -> Engine:
        return Engine(self.directory, **settings)

    @property
    def vocabulary(self) -> int:
        return self.twin.config.vocab_size


def pack_model(name: str, directory: Path, specs: tuple[str, ...] = MIXED, shift: int = 0) -> Packed:
    """Random weights large enough that every layer matters; unit i at ``specs[(i + shift) % len(specs)]``."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model = ZOO[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                size = 0.35 if parameter.dim() == 2 else 0.3
                parameter.copy_(torch.randn_like(parameter) * size / max(1, parameter.shape[-1] / 16) ** 0.5)
            for key, parameter in model.named_parameters():
                if "norm" in key and key.endswith("weight"):
                    parameter.add_(1.0)
    inventory = find_units(model)
    allocation = {u.name: QuantSpec.parse(specs[(i + shift) % len(specs)]) for i, u in enumerate(inventory.units)}
    matrices = unit_matrices(model, inventory)
    weights = {n: quantize_weight(matrices[n], spec) for n, spec in allocation.items() if spec.is_quantized}
    save_packed(model, inventory, BitAllocation(allocation), weights, directory)
    return Packed(name, directory)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """``zoo(name)``: a model of :data:`ZOO`, packed once a session."""
    made: dict[Any, Packed] = {}

    def get(name: str, specs: tuple[str, ...] = MIXED, shift: int = 0) -> Packed:
        key = (name, specs, shift)
        if key not in made:
            made[key] = pack_model(name, tmp_path_factory.mktemp("engine") / "model", specs, shift)
        return made[key]

    return get


def random_forest(vocabulary: int, seed: int = 0, trees: int = 9, length: int = CONTEXT + 1) -> TokenForest:
    """Trees of sequences that share prefixes, of every length up to the longest one; a tree of one node; a deep chain."""
    rng = np.random.default_rng(seed)
    forest: list[list[list[int]]] = [[[1]]]
    for number in range(trees):
        stem = [1, *rng.integers(0, vocabulary, length - 1).tolist()]
        sequences = [stem[: 2 + number % (length - 1)]]
        for _ in range(number % 5):
            keep = int(rng.integers(1, length))
            sequences.append(
                stem[:keep] + rng.integers(0, vocabulary, int(rng.integers(0, length - keep + 1))).tolist()
            )
        forest.append(sequences)
        if number % 4 == 0:
            forest.append([[1]])
    forest.append([[1, *rng.integers(0, vocabulary, length - 1).tolist()]])
    return build_forest(forest)


@pytest.fixture(scope="session")
def forest_of():
    """``forest_of(vocabulary, seed=0, trees=9, length=CONTEXT + 1)``."""
    return random_forest


@torch.no_grad()
def node_scores(model: Any, forest: Any) -> np.ndarray:
    """The slow twin: every leaf's path by itself through the Hugging Face model, full log-softmax."""
    parents = np.asarray(forest.parents)
    tokens = np.asarray(forest.tokens)
    scores = np.zeros(len(parents))
    for leaf in sorted(set(range(len(parents))) - set(parents.tolist())):
        path = [leaf]
        while parents[path[-1]] >= 0:
            path.append(int(parents[path[-1]]))
        path.reverse()
        if len(path) > 1:
            logits = model(input_ids=torch.from_numpy(tokens[path[:-1]])[None], use_cache=False).logits[0].double()
            scores[path[1:]] = logits.log_softmax(-1)[range(len(path) - 1), tokens[path[1:]]].numpy()
    return scores


@pytest.fixture(scope="session")
def slow_twin():
    """``slow_twin(model, forest)``: :func:`node_scores`."""
    return node_scores


@pytest.fixture(autouse=True)
def as_before():
    """Instruction set and threads as they were."""
    if not cpu.is_available():
        pytest.skip("no compiled library (no C++ compiler here)")
    isa, threads = cpu.isa(), cpu.num_threads()
    yield
    cpu.set_isa(isa)
    cpu.set_num_threads(threads)
