"""Scores of the native engine against the Hugging Face model of the same packed directory, and against themselves."""

import contextlib

import numpy as np
import pytest
import torch

from mixbits.engine import Engine
from mixbits.kernels import cpu
from mixbits.lm.forest import ForestScorer, score_sequences
from mixbits.packing.modules import PackedConv1D, PackedLinear

EXACT_NATS = 5e-5  # float32 activations: sums of rounded numbers, at most 8e-6 seen; the promise is 1e-3
# int8 activations against PyTorch with activations rounded alike: equal but where a last bit of float32 makes a value round
# the other way, which moves it by 1/127 of the row's largest
INT8_MEDIAN_NATS, INT8_MOST_NATS = 1e-4, 0.3


@contextlib.contextmanager
def rounded_activations(model):
    """Inputs of the packed linear layers rounded to 8 bits, one scale a row, by PyTorch."""

    def round_input(module, arguments):
        (x,) = arguments
        most = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        return ((x * (127 / most)).round() * (most / 127),)

    hooks = [
        m.register_forward_pre_hook(round_input) for m in model.modules() if isinstance(m, (PackedLinear, PackedConv1D))
    ]
    assert hooks
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_float32_activations_are_exact(zoo, forest_of, slow_twin, model_name):
    for shift in (0, 2, 5):
        packed = zoo(model_name, shift=shift)
        forest = forest_of(packed.vocabulary)
        expected = slow_twin(packed.twin, forest)
        assert -40 < expected.min() < -5  # a model with opinions
        got = packed.engine(activations="float32").score_forest(forest)
        assert got.dtype == np.float64
        assert np.abs(got - expected).max() < EXACT_NATS
        assert (got[forest.parents < 0] == 0).all()


def test_int8_activations(zoo, forest_of, slow_twin, model_name):
    for shift in (0, 4):
        packed = zoo(model_name, shift=shift)
        forest = forest_of(packed.vocabulary)
        with rounded_activations(packed.twin):
            expected = slow_twin(packed.twin, forest)
        error = np.abs(packed.engine().score_forest(forest) - expected)
        assert np.median(error) < INT8_MEDIAN_NATS
        assert error.max() < INT8_MOST_NATS


@pytest.mark.parametrize("spec", ["1", "1.58", "2", "3", "4", "8", "16", "2-g8-s8", "4-half-step-g32"])
@pytest.mark.parametrize("name", ["opt-post-gelu", "llama-grouped-tied"])
def test_one_spec_everywhere(zoo, forest_of, slow_twin, name, spec):
    packed = zoo(name, (spec,))
    forest = forest_of(packed.vocabulary, trees=5)
    expected = slow_twin(packed.twin, forest)
    exact = packed.engine(activations="float32").score_forest(forest)
    assert np.abs(exact - expected).max() < EXACT_NATS
    if spec == "16":
        assert np.array_equal(packed.engine().score_forest(forest), exact)  # nothing is rounded


def test_layers_of_one_input_in_different_layouts(zoo, forest_of):
    """Few rows share products of q, k, v and of gate and up between threads; many rows do not. The same bits either way."""
    for specs in (("16", "4", "2-g7"), ("4", "16", "3-g5"), ("2-g7", "4", "16"), ("8", "4-g9", "1")):
        for name in ("llama-wide", "opt-post-relu-wide"):
            packed = zoo(name, specs)
            sequence = forest_of(packed.vocabulary, trees=1)
            for activations in ("int8", "float32"):
                engine = packed.engine(activations=activations)
                answers = []
                for threads in (1, 5):  # up to 12 rows a thread are few
                    cpu.set_num_threads(threads)
                    for max_rows in (1, 1000):
                        engine.max_rows = max_rows
                        answers.append(engine.score_forest(sequence))
                assert all(np.array_equal(a, answers[0]) for a in answers), (specs, name, activations)


def test_neither_threads_nor_rows_nor_instruction_sets_change_a_bit(zoo, forest_of, model_name):
    packed = zoo(model_name, shift=1)
    forest = forest_of(packed.vocabulary, seed=3, trees=12)
    for activations in ("int8", "float32"):
        engine = packed.engine(activations=activations)
        expected = engine.score_forest(forest)
        for threads in (1, 2, 3, 5):
            for max_rows in (1, 2, 15, 40, 10**6, 2**70):
                cpu.set_num_threads(threads)
                again = packed.engine(activations=activations, max_rows=max_rows) if max_rows == 15 else engine
                again.max_rows = min(max_rows, 10**6)
                assert np.array_equal(again.score_forest(forest), expected), (threads, max_rows)
        for isa in cpu.isas():
            cpu.set_isa(isa)
            assert np.array_equal(packed.engine(activations=activations).score_forest(forest), expected), isa


def test_sequences(zoo, model_name):
    packed = zoo(model_name)
    rng = np.random.default_rng(7)
    sequences = [rng.integers(0, packed.vocabulary, n).tolist() for n in (2, 15, 1, 7, 0, 3, 15)]
    sequences += [sequences[1]]
    engine = packed.engine(activations="float32")
    got = engine.score(sequences)
    assert got.shape == (8,)
    assert got[2] == got[4] == 0
    assert got[1] == got[7]
    scored = [s for s in sequences if s]
    expected = score_sequences(packed.twin, scored)
    assert np.abs(got[[i for i, s in enumerate(sequences) if s]] - expected).max() < EXACT_NATS
    assert engine.score([]).shape == (0,)
    assert engine.score([[], []]).tolist() == [0, 0]


def test_the_pytorch_scorer_of_forests_agrees(zoo, forest_of):
    packed = zoo("opt-post-gelu")
    forest = forest_of(packed.vocabulary)
    expected = ForestScorer(packed.twin)(forest)
    engine = packed.engine(activations="float32")
    assert np.abs(engine(forest) - expected).max() < EXACT_NATS
    assert engine.max_length == ForestScorer(packed.twin).max_length


def test_large_forests(zoo, slow_twin):
    """Wide and bushy trees with equal siblings, in several parts of max_rows."""
    packed = zoo("llama-grouped-tied")
    rng = np.random.default_rng(0)
    tokens, parents = [], []
    for _ in range(4):
        root, depth = len(tokens), [0]
        tokens.append(1)
        parents.append(-1)
        while len(depth) < 400:
            above = int(rng.integers(0, len(depth)))
            if depth[above] < packed.twin.config.max_position_embeddings:
                tokens.append(int(rng.integers(0, 6)))
                parents.append(root + above)
                depth.append(depth[above] + 1)

    class Forest:
        pass

    forest = Forest()
    forest.tokens, forest.parents = np.array(tokens), np.array(parents)
    expected = slow_twin(packed.twin, forest)
    for max_rows in (16, 512):
        got = packed.engine(activations="float32", max_rows=max_rows).score_forest(forest)
        assert np.abs(got - expected).max() < EXACT_NATS
    assert packed.engine().score_forest(forest).shape == (1600,)


def test_empty_and_rootless_forests(zoo):
    engine = zoo("opt-post-gelu").engine()

    class Forest:
        def __init__(self, tokens, parents):
            self.tokens, self.parents = np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64)

    assert engine.score_forest(Forest([], [])).shape == (0,)
    assert engine.score_forest(Forest([3, 4, 5], [-1, -1, -1])).tolist() == [0, 0, 0]
    both = engine.score_forest(Forest([1, 5, 1, 6, 7], [-1, 0, -1, 2, 3]))
    assert both[1] == engine.score_forest(Forest([1, 5], [-1, 0]))[1]
    assert np.array_equal(both[2:], engine.score_forest(Forest([1, 6, 7], [-1, 0, 1])))


def test_the_context_is_used_to_its_end(zoo, slow_twin):
    """Sequences of context + 1 ids: the last one is predicted, never read."""
    for name in ("opt-post-gelu", "llama-rope-yarn"):
        packed = zoo(name)
        engine = packed.engine(activations="float32")
        ids = np.random.default_rng(1).integers(0, packed.vocabulary, engine.max_length).tolist()
        assert engine.score([ids])[0] == pytest.approx(score_sequences(packed.twin, [ids])[0], abs=EXACT_NATS)


def test_nan_in_the_middle_of_a_model_is_seen(zoo):
    """Scores become NaN, for every instruction set, and nothing crashes."""
    packed = zoo("llama-wide", ("8",))
    for activations in ("int8", "float32"):
        engine = packed.engine(activations=activations)
        vectors = [kept for kept in engine._build.kept if isinstance(kept, torch.Tensor) and kept.shape == (136,)]
        vectors[1][3] = float("nan")
        for isa in cpu.isas():
            cpu.set_isa(isa)
            assert np.isnan(engine.score([[1, 2, 3]])).all()


def test_imported_lazily():
    import mixbits

    assert mixbits.Engine is Engine
