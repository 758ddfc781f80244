"""Decoding one token a stream: against whole sequences through Hugging Face, in any order of streams, and refused arguments."""

import itertools

import numpy as np
import pytest
import torch

from mixbits.errors import DataError, SpecError
from mixbits.kernels import cpu

LOGITS = 1e-4  # absolute, float32 activations; logits are below 30


def full_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def test_step_by_step_against_whole_sequences(zoo, model_name):
    packed = zoo(model_name)
    engine = packed.engine(activations="float32")
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, packed.vocabulary, engine.context).tolist() for _ in range(3)]
    expected = [full_logits(packed.twin, ids) for ids in sequences]
    engine.open_streams(3)
    for position in range(engine.context):
        logits = engine.step([ids[position] for ids in sequences])
        assert logits.dtype == np.float32
        for stream in range(3):
            assert np.abs(logits[stream] - expected[stream][position]).max() < LOGITS


def test_streams_in_any_order_and_number(zoo, model_name):
    """Streams at different lengths, some resting, some starting over: the same bits as one stream alone."""
    packed = zoo(model_name, shift=3)
    engine, alone = packed.engine(), packed.engine()
    rng = np.random.default_rng(1)
    engine.open_streams(5)
    alone.open_streams(1)
    history: list[list[int]] = [[] for _ in range(5)]
    answers = {}
    for _ in range(25):
        chosen = rng.permutation(5)[: rng.integers(1, 6)].tolist()
        for stream in chosen:
            if len(history[stream]) == engine.context or rng.random() < 0.1:
                engine.reset(stream)
                history[stream] = []
            history[stream].append(int(rng.integers(0, packed.vocabulary)))
        logits = engine.step([history[s][-1] for s in chosen], chosen)
        answers |= {tuple(history[s]): row for s, row in zip(chosen, logits, strict=True)}
    longest = [ids for ids in answers if not any(o[: len(ids)] == ids and o != ids for o in answers)]
    for ids in longest:
        alone.reset()
        for length in range(1, len(ids) + 1):
            row = alone.step([ids[length - 1]])[0]
            if ids[:length] in answers:
                assert np.array_equal(answers[ids[:length]], row)


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_steps_and_scores_are_the_same_numbers(zoo, model_name, activations):
    """int8 included: the hidden states are the same bits, only the log-softmax is another one."""
    packed = zoo(model_name, shift=1)
    engine = packed.engine(activations=activations)
    ids = np.random.default_rng(2).integers(0, packed.vocabulary, engine.max_length).tolist()
    total = 0.0
    for token, following in itertools.pairwise(ids):
        logits = engine.step([token])[0].astype(np.float64)
        total += logits[following] - np.logaddexp.reduce(logits)
    assert engine.score([ids])[0] == pytest.approx(total, abs=5e-5)


def test_threads_and_many_streams_do_not_change_a_bit(zoo):
    """40 streams are many rows for 1 and 3 threads, few for 5: two ways through the model."""
    for name in ("opt-post-relu-wide", "llama-wide"):
        packed = zoo(name, ("16", "4-g7", "2"))
        tokens = np.random.default_rng(3).integers(0, packed.vocabulary, (4, 40))
        for activations in ("int8", "float32"):
            answers = []
            for threads in (1, 2, 3, 5):
                engine = packed.engine(activations=activations, threads=threads)
                answers.append(np.stack([engine.step(row) for row in tokens]))
            assert all(np.array_equal(a, answers[0]) for a in answers)
            for isa in cpu.isas():
                cpu.set_isa(isa)
                engine = packed.engine(activations=activations)
                assert np.array_equal(np.stack([engine.step(row) for row in tokens]), answers[0]), isa
            one = packed.engine(activations=activations)
            assert np.array_equal(np.stack([one.step(row[17:18])[0] for row in tokens]), answers[0][:, 17])


def test_results_into_an_array(zoo):
    engine = zoo("opt-post-gelu").engine()
    engine.open_streams(2)
    out = np.full((4, engine.vocabulary_size), 7, np.float32)
    assert engine.step([3, 4], out=out[1:3]).base is out
    assert (out[[0, 3]] == 7).all()
    assert not (out[1:3] == 7).any()
    engine.reset()
    assert np.array_equal(engine.step(np.array([3, 4], dtype=np.int32)), out[1:3])
    engine.reset()
    assert np.array_equal(engine.step(iter([4, 3]), iter([1, 0])), out[[2, 1]])
    frozen = np.empty((2, engine.vocabulary_size), np.float32)
    frozen.flags.writeable = False
    for bad in (out, out[:2].astype(np.float64), out[:2, ::2], np.empty((2, 41, 1), np.float32), out[::2], frozen):
        with pytest.raises(SpecError, match="expected contiguous writable float32"):
            engine.step([1, 2], out=bad)


def test_nothing_to_do(zoo):
    engine = zoo("opt-post-gelu").engine()
    assert engine.step([]).shape == (0, 41)
    assert engine.num_streams == 1
    engine.reset()


def test_reset(zoo):
    engine = zoo("llama-grouped-tied").engine()
    engine.reset()  # no streams yet
    first = engine.step([1, 2])
    engine.step([3, 4])
    engine.reset(1)
    again = engine.step([3, 2])
    assert np.array_equal(again[1], first[1])
    assert not np.array_equal(again[0], first[0])
    engine.reset()
    assert np.array_equal(engine.step([1, 2]), first)
    engine.open_streams(2)  # replaces them
    assert np.array_equal(engine.step([1, 2]), first)
    for bad in (-1, 2, 2**64, 2**64 + 1):
        with pytest.raises(SpecError, match=f"no stream {bad}; there are 2"):
            engine.reset(bad)


def test_refused_steps_change_nothing(zoo):
    packed = zoo("opt-pre-relu-untied")
    engine, other = packed.engine(), packed.engine()
    engine.open_streams(3)
    other.open_streams(3)
    for tokens, streams, kind, message in (
        ([1, 41], [0, 1], DataError, "outside the vocabulary.*ids from 1 to 41, vocabulary of 41"),
        ([-1, 1], [0, 1], DataError, "outside the vocabulary"),
        ([1, 2**62], [0, 1], DataError, "outside the vocabulary"),
        ([1, 1], [0, 0], SpecError, "expected 2 different ones from 0 to 2"),
        ([1, 1], [0, 3], SpecError, "different ones"),
        ([1, 1], [-1, 0], SpecError, "different ones"),
        ([1, 1], [0], SpecError, "different ones"),
        ([1, 1, 1, 1], None, SpecError, "different ones"),
        (np.zeros((2, 2), np.int64), None, DataError, r"tokens have shape \(2, 2\)"),
        ([1.5, 2.0], [0, 1], DataError, "tokens are float64; expected whole numbers"),
        ([1, 2], [0.0, 1.0], DataError, "streams are float64"),
        (["a"], [0], DataError, "expected whole numbers"),
        ([True, False], [0, 1], DataError, "expected whole numbers"),
        ([2**64, 1], [0, 1], DataError, "expected whole numbers"),
    ):
        with pytest.raises(kind, match=message):
            engine.step(tokens, streams)
    assert np.array_equal(engine.step([1, 2, 3]), other.step([1, 2, 3]))


def test_full_streams(zoo):
    engine = zoo("llama-grouped-tied").engine()
    engine.open_streams(2)
    for _ in range(engine.context):
        engine.step([1], [1])
    with pytest.raises(DataError, match=f"longer than the model's context of {engine.context} positions"):
        engine.step([1, 1])
    expected = engine.step([1], [0])
    engine.reset(1)
    assert np.array_equal(engine.step([1], [1]), expected)  # the refused call had read nothing


def test_impossible_numbers_of_streams(zoo):
    engine = zoo("opt-post-gelu").engine()
    for bad in (0, -1, 2**20 + 1, 2**64 + 1):
        with pytest.raises(SpecError, match="expected 1 to 1048576"):
            engine.open_streams(bad)
    engine.step([1])
    assert engine.num_streams == 1


def test_the_c_functions_check_streams_themselves(zoo):
    """Without Python's checks before them: repeated and missing streams, too many tokens, missing pointers, freed nothing."""
    engine = zoo("opt-post-gelu").engine()
    engine.open_streams(3)
    library, state = cpu.library(), engine._state
    out = np.full((3, 41), 7, np.float32)

    def step(streams, tokens, number=None, result=out):
        streams, tokens = np.array(streams, dtype=np.int64), np.array(tokens, dtype=np.int64)
        number = len(streams) if number is None else number
        return library.mb_step(state, streams.ctypes.data, tokens.ctypes.data, number, result.ctypes.data)

    for streams in ([0, 0], [0, 1, 0], [3], [-1], [2**40]):
        assert step(streams, [1] * len(streams)) == 1
    assert step([0], [1], 4) == step([0], [1], -1) == 1
    assert step([0, 1], [1, 41]) == step([0, 1], [-1, 0]) == 4
    assert library.mb_step(state, None, None, 1, None) == library.mb_step(None, None, None, 1, None) == 8
    assert library.mb_step(state, None, None, 0, None) == 0
    assert (out == 7).all()
    assert [library.mb_state_length(state, s) for s in (0, 1, 2, 3, -1, 2**40)] == [0, 0, 0, -1, -1, -1]
    assert step([2, 0], [1, 2]) == 0
    assert step([0, 2], [1, 2]) == 0  # a refused call before left no mark
    assert [library.mb_state_length(state, s) for s in (0, 1, 2)] == [2, 0, 2]
    assert library.mb_state_reset(state, 3) == library.mb_state_reset(state, -2) == 1
    assert library.mb_state_reset(None, 0) == 8
    assert library.mb_state_length(None, 0) == -1
    library.mb_state_free(None)
