"""Products of the CPU library against NumPy, to the bit where that is promised; every instruction set; threads."""

import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

from mixbits.kernels import cpu, ops

WIDTHS = ("1", "1.58", "2", "3", "3-half-step", "4", "4-half-step", "8")
SHARED = ("row", "tensor", "g2", "g7", "g32", "g100", "g128", "g1000", "row-s8", "g7-s8", "g32-s8")
SHAPES = ((1, 1), (1, 7), (5, 1), (3, 257), (64, 32), (65, 33), (67, 131), (130, 100))
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 97)
# |error| of a float32 product over sum |w x|: a sum of at most 257 products, each rounded once, then scaled and biased
FLOAT_TOLERANCE = 257 * 2.0**-24


def log_tolerance(logits):
    """Nats: logits and their log-partition rounded to float32, exponentials and sums to about 1e-6."""
    return 2.0**-22 * np.abs(logits).max() + 2e-6


HAS_COMPILER = shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++"))
needs_library = pytest.mark.skipif(not cpu.is_available(), reason="no compiled library (no C++ compiler here)")


def activations(m, cols, seed=0):
    """Rows of very different sizes, among them zeros, subnormal and huge numbers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, cols)).astype(np.float32)
    for row, size in ((1, 1e-3), (2, 0.0), (5, 1e-41), (6, 1e-28), (8, 1e30), (9, 1e4)):
        x[row : row + 1] *= np.float32(size)
    return x


def linear(matrix, x, bias=None, mode="int8"):
    """The C function itself, with canaries on both sides of the result."""
    y = np.full(len(x) * matrix.rows + 32, 7.25, dtype=np.float32)
    inner = y[16 : len(y) - 16]
    x = np.ascontiguousarray(x)
    error = cpu.library().mb_linear(
        matrix.struct, cpu.activation_number(mode), x.ctypes.data, len(x), None if bias is None else bias.ctypes.data,
        inner.ctypes.data,
    )  # fmt: skip
    assert error == 0
    assert (y[:16] == 7.25).all()
    assert (y[-16:] == 7.25).all()
    return inner.reshape(len(x), matrix.rows).copy()


def same_bits(a, b):
    a, b = np.asarray(a, dtype=np.float32), np.asarray(b, dtype=np.float32)
    return a.shape == b.shape and bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def test_the_library_is_there_when_it_can_be_built():
    assert cpu.is_available() or not HAS_COMPILER, cpu.why_unavailable()


@needs_library
def test_instruction_sets_of_this_processor():
    """So that no test below is silently one of the scalar code only."""
    found = cpu.isas()
    assert found[-1] == "scalar"
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("no /proc/cpuinfo: the processor's flags are unknown")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith(("flags", "Features"))).split())
    wanted = {
        "avx512-vnni": {"avx512_vnni", "avx512bw", "avx512dq", "avx512vl"},
        "avx-vnni": {"avx_vnni"},
        "avx2": {"avx2"},
        "neon-dot": {"asimddp"},
    }
    machine = {"avx512-vnni": "x86_64", "avx-vnni": "x86_64", "avx2": "x86_64", "neon-dot": "aarch64"}
    expected = [name for name, need in wanted.items() if need <= flags and machine[name] == platform.machine()]
    assert found == [*expected, "scalar"]
    cpu.set_isa(None)  # the best one agrees with the scalar code
    assert cpu.isa() == found[0]


@needs_library
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("width", WIDTHS)
def test_products(twin, width, shared):
    bias_rng = np.random.default_rng(3)
    for number, (rows, cols) in enumerate(SHAPES):
        t = twin(f"{width}-{shared}", rows, cols, seed=number)
        x = activations(max(ROWS), cols, seed=number)
        bias = bias_rng.standard_normal(rows).astype(np.float32) if number % 2 else None
        expected = t.int8_product(x, bias)
        outcome = {}
        for isa in cpu.isas():
            cpu.set_isa(isa)
            for m in ROWS if number > 4 else (0, 1, 5, 25):
                y = linear(t.matrix, x[:m], bias)
                assert same_bits(y, expected[:m]), (isa, rows, cols, m)
            outcome[isa] = linear(t.matrix, x, bias, "float32")
            for m in (0, 1, 3, 25):
                assert same_bits(linear(t.matrix, x[:m], bias, "float32"), outcome[isa][:m]), (isa, rows, cols, m)
            assert same_bits(outcome[isa], outcome[cpu.isas()[0]])
        with np.errstate(over="ignore"):
            exact = x.astype(np.float64) @ t.exact.T + (0 if bias is None else bias)
            size = np.abs(x).astype(np.float64) @ np.abs(t.exact).T + (0 if bias is None else np.abs(bias))
        tiny = 1e-37  # products below float32's normal numbers
        assert (np.abs(outcome["scalar"] - exact) <= FLOAT_TOLERANCE * size + tiny).all()


@needs_library
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_16_bits_are_multiplied_in_float32(twin, rows, cols):
    t = twin("16", rows, cols)
    x = activations(97, cols)
    expected = None
    for isa in cpu.isas():
        cpu.set_isa(isa)
        for m in ROWS:
            y = linear(t.matrix, x[:m])
            assert same_bits(y, linear(t.matrix, x[:m], mode="float32"))
            if m == max(ROWS):
                expected = y if expected is None else expected
                assert same_bits(y, expected)
    size = np.abs(x).astype(np.float64) @ np.abs(t.exact).T
    assert (np.abs(expected - x.astype(np.float64) @ t.exact.T) <= FLOAT_TOLERANCE * size + 1e-37).all()


@needs_library
def test_random_shapes_and_specs(twin):
    rng = np.random.default_rng(11)
    for trial in range(150):
        width = rng.choice(WIDTHS)
        shared = rng.choice(["row", "tensor", f"g{rng.integers(2, 200)}", f"g{rng.integers(2, 40)}-s8"])
        rows, cols, m = int(rng.integers(1, 150)), int(rng.integers(1, 400)), int(rng.integers(1, 40))
        t = twin(f"{width}-{shared}", rows, cols, seed=trial)
        x = rng.standard_normal((m, cols)).astype(np.float32)
        cpu.set_isa(cpu.isas()[trial % len(cpu.isas())])
        cpu.set_num_threads(1 + trial % 3)
        assert same_bits(linear(t.matrix, x), t.int8_product(x)), (width, shared, rows, cols, m, cpu.isa())


@needs_library
@pytest.mark.parametrize("width", ["1", "2", "3", "4-half-step", "8"])
def test_the_widest_rows_do_not_overflow(twin, width):
    """Every code and every activation as large as can be: sums of 65,536 products, several rows at once and one."""
    cols = 65536
    t = twin(width, 2, cols)
    low, high = np.full(cols, -1.0, np.float32), np.full(cols, 1.0, np.float32)
    x = np.stack([low, high, np.where(t.whole[0] > 0, 1, -1).astype(np.float32), np.where(t.whole[1] > 0, -1, 1)])
    x = x.astype(np.float32)
    for isa in cpu.isas():
        cpu.set_isa(isa)
        expected = t.int8_product(x)
        assert same_bits(linear(t.matrix, x), expected), isa
        assert all(same_bits(linear(t.matrix, x[i : i + 1]), expected[i : i + 1]) for i in range(len(x))), isa
    extreme = twin(width, 2, cols)
    extreme.matrix.packed[:] = 255 if width != "8" else 1  # all codes at the top (8 bits: at the bottom)
    answers = []
    for isa in cpu.isas():
        cpu.set_isa(isa)
        answers.append(linear(extreme.matrix, x))
        answers.append(np.concatenate([linear(extreme.matrix, x[i : i + 1]) for i in range(len(x))]))
    layout = extreme.matrix.layout
    value = layout.mul * (2**layout.bits - 1) - layout.off if width != "8" else -127
    exact = np.float64(value) * cols * extreme.scale[:, 0]
    assert np.allclose(answers[0][:2], np.outer([-1, 1], exact), rtol=1e-6)
    assert all(same_bits(a, answers[0]) for a in answers)


@needs_library
@pytest.mark.parametrize("spec", ["1", "1.58-g32", "2", "3-g100", "4-half-step", "8-g7", "16"])
def test_threads_do_not_change_a_bit(twin, spec):
    results = []
    for threads in (1, 2, 3, 5):
        cpu.set_num_threads(threads)
        assert cpu.num_threads() == threads
        t = twin(spec, 1301, 131)  # repacked with these threads, too
        x = activations(150, 131)
        ids = np.arange(1301)
        rows = np.empty((1301, 131), np.float32)
        cpu.library().mb_embedding(t.matrix.struct, ids.ctypes.data, len(ids), rows.ctypes.data)
        logs = log_softmax_at(
            t.matrix, x[:7], np.array([0, 1, 1, 3, 3, 4, 4, 6]), np.array([5, 0, 1300, 64, 1023, 1024])
        )
        products = [linear(t.matrix, x[:m], mode=mode) for m in (1, 7, 150) for mode in ("int8", "float32")]
        results.append([t.matrix.packed.numpy(), t.matrix.scales.numpy(), rows, *logs, *products])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert mine.tobytes() == theirs.tobytes()


@needs_library
@pytest.mark.parametrize("spec", [f"{w}-{s}" for w in WIDTHS for s in ("row", "tensor", "g7-s8", "g32")] + ["16"])
def test_embedding_is_exact(twin, spec):
    for rows, cols in SHAPES:
        t = twin(spec, rows, cols)
        ids = np.random.default_rng(0).integers(0, rows, 37)
        for isa in cpu.isas():
            cpu.set_isa(isa)
            y = np.full((37, cols), 9, np.float32)
            assert cpu.library().mb_embedding(t.matrix.struct, ids.ctypes.data, 37, y.ctypes.data) == 0
            assert same_bits(y, t.rounded[ids])


def log_softmax_at(matrix, x, offsets, targets, bias=None, mode="int8"):
    out, partition = np.full(len(targets) + 2, 7, np.float32), np.full(len(x) + 2, 7, np.float32)
    offsets, targets, x = (np.ascontiguousarray(a) for a in (offsets.astype(np.int64), targets.astype(np.int64), x))
    error = cpu.library().mb_log_softmax_at(
        matrix.struct, cpu.activation_number(mode), x.ctypes.data, len(x), None if bias is None else bias.ctypes.data,
        offsets.ctypes.data, targets.ctypes.data, out.ctypes.data, partition.ctypes.data,
    )  # fmt: skip
    assert error == 0
    assert (out[-2:] == 7).all()
    assert (partition[-2:] == 7).all()
    return out[:-2], partition[:-2]


@needs_library
@pytest.mark.parametrize("mode", ["int8", "float32"])
@pytest.mark.parametrize(("spec", "rows", "cols"), [("2", 1, 5), ("1.58-g32", 63, 48), ("4", 1030, 33), ("8-g7", 2500, 20), ("16", 1100, 17)])  # fmt: skip
def test_log_softmax_at(twin, spec, rows, cols, mode):
    rng = np.random.default_rng(5)
    t = twin(spec, rows, cols)
    m = 53
    x = (rng.standard_normal((m, cols)) * 0.3).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    counts = rng.integers(0, 5, m)
    counts[[0, 30]] = 0
    targets = np.concatenate([np.sort(rng.integers(0, rows, c)) for c in counts])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    for has_bias in (False, True):
        given = bias if has_bias else None
        if mode == "int8" and spec != "16":
            logits = t.int8_product(x, given).astype(np.float64)
        else:
            logits = x.astype(np.float64) @ t.exact.T + (bias if has_bias else 0)
        partition = np.logaddexp.reduce(logits, axis=1)
        expected = logits[np.repeat(np.arange(m), counts), targets] - np.repeat(partition, counts)
        answers = []
        for isa in cpu.isas():
            cpu.set_isa(isa)
            out, log_partition = log_softmax_at(t.matrix, x, offsets, targets, given, mode)
            assert np.abs(out - expected).max() < log_tolerance(logits)
            assert np.abs(log_partition - partition).max() < log_tolerance(logits)
            answers.append(np.concatenate([out, log_partition]))
        assert all(same_bits(a, answers[0]) for a in answers)


@needs_library
def test_log_softmax_of_extreme_logits(twin):
    """Differences of thousands of nats; and one row alone keeps its numbers whatever stands beside it."""
    t = twin("8", 300, 16)
    x = np.concatenate([np.zeros((1, 16)), np.random.default_rng(0).standard_normal((4, 16)) * 1e3]).astype(np.float32)
    offsets, targets = np.arange(0, 11, 2), np.array([0, 299] * 5)
    out, partition = log_softmax_at(t.matrix, x, offsets, targets)
    logits = t.int8_product(x).astype(np.float64)
    expected = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    assert np.allclose(out, expected[:, [0, 299]].ravel(), rtol=0, atol=log_tolerance(logits))
    assert partition[0] == pytest.approx(np.log(300), abs=1e-6)


@needs_library
@pytest.mark.parametrize("mode", ["int8", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", ["1", "2-g7", "3", "4", "8", "16"])
def test_bad_activations_spoil_their_own_row_only(twin, spec, bad, mode):
    t = twin(spec, 70, 29)
    clean = activations(13, 29)
    x = clean.copy()
    spoilt = [0, 4, 12]
    x[spoilt, [0, 28, 7]] = bad
    others = [i for i in range(13) if i not in spoilt]
    offsets = np.arange(14)
    targets = np.arange(13) * 5
    for isa in cpu.isas():
        cpu.set_isa(isa)
        y, expected = linear(t.matrix, x, mode=mode), linear(t.matrix, clean, mode=mode)
        assert same_bits(y[others], expected[others])
        is_int8 = mode == "int8" and spec != "16"
        assert np.isnan(y[spoilt]).all() if is_int8 or np.isnan(bad) else not np.isfinite(y[spoilt]).any(), isa
        finite = np.isfinite(expected).all(1)
        log, partition = log_softmax_at(t.matrix, x, offsets, targets, mode=mode)
        assert np.isnan(log[spoilt]).all()
        assert np.isnan(partition[spoilt]).all()
        kept = [i for i in others if finite[i]]
        assert np.isfinite(log[kept]).all()


@needs_library
def test_overflowing_results_are_infinite_or_nan(twin):
    """No trap and no nonsense when a result does not fit float32."""
    t = twin("8", 5, 300)
    x = np.full((2, 300), 3e38, np.float32) * np.sign(t.whole[:2]).astype(np.float32)
    for mode in ("int8", "float32"):
        y = linear(t.matrix, x, mode=mode)
        assert not np.isfinite(np.diag(y[:, :2])).any()
    assert np.isnan(ops.log_softmax_at(*_torch(x, t.matrix))[1]).all()


def _torch(x, matrix):
    import torch

    return torch.from_numpy(x), matrix, torch.zeros(len(x) + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
