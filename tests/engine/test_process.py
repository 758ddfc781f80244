"""The engine among threads and processes: the GIL, callers at the same time, fork, memory given back."""

import gc
import multiprocessing
import os
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from mixbits.asr.trie import build_forest
from mixbits.kernels import cpu

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks")


def test_other_python_threads_run_while_it_computes(zoo):
    """The GIL is released: the main thread keeps ticking inside one long call."""
    packed = zoo("llama-wide")
    engine = packed.engine()
    sequences = [[1, *np.random.default_rng(i).integers(0, 1100, 14).tolist()] for i in range(40)]
    start = time.perf_counter()
    engine.score(sequences)
    repeats = max(1, int(0.5 / (time.perf_counter() - start)))
    forest = build_forest([[s] for s in sequences * repeats])
    span: list[float] = []

    def work():
        span.append(time.perf_counter())
        engine.score_forest(forest)
        span.append(time.perf_counter())

    worker = threading.Thread(target=work)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    begin, end = span
    inside = [t for t in ticks if begin + 0.2 * (end - begin) < t < end - 0.2 * (end - begin)]
    assert len(inside) >= 5, (len(inside), end - begin)


def test_callers_at_the_same_time(zoo, forest_of):
    """Two threads score, a third decodes, on one engine and another, while helpers are shared: everybody's own numbers."""
    packed = zoo("llama-grouped-tied")
    cpu.set_num_threads(3)
    engine, second = packed.engine(), zoo("opt-post-gelu").engine(activations="float32")
    forests = [forest_of(packed.vocabulary, seed=s) for s in range(4)]
    expected = [engine.score_forest(f) for f in forests]
    expected_second = [second.score_forest(f) for f in forests]
    tokens = np.random.default_rng(0).integers(0, packed.vocabulary, (engine.context, 4))
    expected_steps = np.stack([engine.step(row) for row in tokens])
    wrong: list[str] = []

    def score(model, answers, name):
        for turn in range(40):
            if not np.array_equal(model.score_forest(forests[turn % 4]), answers[turn % 4]):
                wrong.append(name)

    def decode():
        for _ in range(5):
            engine.reset()
            if not np.array_equal(np.stack([engine.step(row) for row in tokens]), expected_steps):
                wrong.append("step")

    def resize():
        for turn in range(30):
            cpu.set_num_threads(1 + turn % 4)
            time.sleep(0.002)

    threads = [
        threading.Thread(target=score, args=(engine, expected, "first")),
        threading.Thread(target=score, args=(engine, expected, "again")),
        threading.Thread(target=score, args=(second, expected_second, "second")),
        threading.Thread(target=decode),
        threading.Thread(target=resize),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []


@linux
def test_after_fork(zoo, forest_of):
    """The helper threads do not exist in a child: it starts its own, also when forked while another thread computes."""
    packed = zoo("opt-post-relu-wide")
    cpu.set_num_threads(3)
    engine = packed.engine()
    forest = forest_of(packed.vocabulary)
    expected = engine.score_forest(forest)
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [engine.score_forest(forest) for _ in iter(stop.is_set, True)])
    busy.start()
    context = multiprocessing.get_context("fork")
    try:
        for threads in (3, 1, 2):
            ours, theirs = context.Pipe(duplex=False)

            def child(pipe=theirs, threads=threads):
                cpu.set_num_threads(threads)
                first = np.array_equal(engine.score_forest(forest), expected)
                pipe.send((first, cpu.num_threads(), len(os.listdir("/proc/self/task"))))
                pipe.close()
                os._exit(0)

            process = context.Process(target=child)
            process.start()
            assert ours.poll(60), "the child hangs"
            same, count, tasks = ours.recv()
            process.join(30)
            assert (same, count, process.exitcode) == (True, threads, 0)
            assert tasks >= threads
    finally:
        stop.set()
        busy.join(60)
    assert np.array_equal(engine.score_forest(forest), expected)


@linux
def test_memory_is_given_back(zoo):
    """Twenty engines of some 20 MB of caches each, one after the other."""
    packed = zoo("llama-wide")

    def use():
        engine = packed.engine()
        engine.open_streams(500)
        engine.step(np.arange(500) % 1100)
        engine.open_streams(300)
        engine.score([[1, 2, 3]])
        return weakref.ref(engine)

    def resident():
        gc.collect()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(4):
        reference = use()
        assert reference() is None  # no cycle keeps it
    before = resident()
    for _ in range(20):
        use()
    assert resident() - before < 30 << 20


def test_helpers_sleep_when_there_is_nothing_to_do(zoo):
    """Waiting threads spin for microseconds only: an idle process uses no processor."""
    cpu.set_num_threads(4)
    engine = zoo("opt-post-relu-wide").engine()
    engine.score([[1, 2, 3, 4]] * 30)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
