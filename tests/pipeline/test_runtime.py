"""Which runtime scores lists: the native engine for packed models it has, PyTorch otherwise; same scores, separate caches."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mixbits.errors import SpecError
from mixbits.kernels import cpu
from mixbits.lm.checkpoint import load_model
from mixbits.packing.checkpoint import save_packed
from mixbits.pipeline import lm_scores
from mixbits.pipeline.lm_scores import SpeechModel, neural_features
from mixbits.quant.grid import quantize_weight
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import BitAllocation, QuantSpec

_spec = importlib.util.spec_from_file_location("speech_example", Path(__file__).parent / "speech_example.py")
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

FLOAT_NATS = 1e-3  # what the engine promises with float32 activations
INT8_NATS = 0.5  # a sentence of some eight words by a model of width 16


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    example.build_world(folder)
    model, tokenizer = load_model(folder / "trained")
    inventory = find_units(model)
    matrices = unit_matrices(model, inventory)
    for name, text in (("packed", "4"), ("product", "1-product-v8")):
        specs = {u.name: QuantSpec.parse(text) for u in inventory.units}
        weights = {unit: quantize_weight(matrices[unit], spec) for unit, spec in specs.items()}
        save_packed(model, inventory, BitAllocation(specs), weights, folder / name, tokenizer=tokenizer)
    return folder


@pytest.fixture
def lists():
    return example.make_lists("some", 6, 7)


@pytest.mark.skipif(not cpu.is_available(), reason="the compiled kernels are not built")
def test_the_engine_gives_pytorchs_scores(world, lists):
    plain = neural_features(world / "packed", lists, runtime="pytorch")
    exact = neural_features(world / "packed", lists, runtime="float32")
    rounded = neural_features(world / "packed", lists)
    assert np.abs(exact.neural_lm_score - plain.neural_lm_score).max() < FLOAT_NATS
    off = np.abs(rounded.neural_lm_score - plain.neural_lm_score).max()
    assert 0 < off < INT8_NATS
    assert (rounded.num_nodes, rounded.num_unknown.tolist()) == (plain.num_nodes, plain.num_unknown.tolist())


@pytest.mark.skipif(not cpu.is_available(), reason="the compiled kernels are not built")
def test_auto_takes_the_engine_where_it_can(world):
    def auto(name, scoring="trie"):
        return SpeechModel(world / name).runtime("auto", scoring)

    assert auto("packed") == "int8"
    assert auto("packed", "one-by-one") == auto("trained") == auto("product") == "pytorch"
    assert SpeechModel(load_model(world / "trained")).runtime("auto", "trie") == "pytorch"


@pytest.mark.skipif(not cpu.is_available(), reason="the compiled kernels are not built")
@pytest.mark.parametrize(("name", "why"), [("trained", "it is not packed"), ("product", "product-quantized")])
def test_the_engine_asked_for_in_vain_is_an_error(world, lists, name, why):
    with pytest.raises(SpecError, match=why):
        neural_features(world / name, lists, runtime="int8")


def test_the_engine_scores_tries_only(world, lists):
    with pytest.raises(SpecError, match="scores tries"):
        neural_features(world / "packed", lists, runtime="float32", scoring="one-by-one")


@pytest.mark.skipif(not cpu.is_available(), reason="the compiled kernels are not built")
def test_each_runtime_has_its_own_kept_scores(world, lists, tmp_path, monkeypatch):
    first = {
        r: neural_features(world / "packed", lists, runtime=r, cache=tmp_path) for r in ("pytorch", "int8", "auto")
    }
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(lm_scores, "lm_features", None)
    again = neural_features(world / "packed", lists, cache=tmp_path)
    assert again.neural_lm_score.tolist() == first["int8"].neural_lm_score.tolist()
    assert again.neural_lm_score.tolist() != first["pytorch"].neural_lm_score.tolist()


def test_without_the_library_auto_is_pytorch(world, monkeypatch):
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    assert SpeechModel(world / "packed").runtime("auto", "trie") == "pytorch"
