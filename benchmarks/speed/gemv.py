"""Single products against the machine: share of the read bandwidth, AVX2 against VNNI, arithmetic rates.

Read bandwidth: the fastest of several plain reductions (numpy's maximum and or over int64 in one thread a core, torch's maximum and
sum) over 512 MiB, in pages of 4 KiB and, where the system grants them, 2 MiB, best of several; whatever a reader can get counts,
so that a share is never flattered by a slow reader. From DRAM: as many copies of the matrix as make 512 MiB (or 8 times the last cache, if that is
more) are multiplied in turn. A share is bytes of codes and scales over time and bandwidth, medians of interleaved rounds.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixbits.kernels import cpu
from mixbits.packing.bitpack import pack_codes
from mixbits.spec import QuantSpec
from speed.timing import spread

SIDE = 4096
BYTES = 512 << 20
_SLOW_SECONDS = 2.0
SPECS = {"1": QuantSpec(1), "2": QuantSpec(2), "3": QuantSpec(3), "4": QuantSpec(4), "8": QuantSpec(8)}


def last_cache_bytes() -> int | None:
    """Size of the largest cache, where Linux says it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=None)


def _readers(threads: int, pool: ThreadPoolExecutor, num_bytes: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    for pages in ("4 KiB pages", "2 MiB pages"):
        memory = mmap.mmap(-1, num_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE if pages[0] == "2" else mmap.MADV_NOHUGEPAGE)
        words = np.frombuffer(memory, dtype=np.int64)
        words[:] = 1
        parts = np.array_split(words, threads)
        whole = torch.from_numpy(words)
        yield f"numpy maximum, {pages}", lambda parts=parts: list(pool.map(np.max, parts))  # type: ignore[misc]
        yield f"numpy or, {pages}", lambda parts=parts: list(pool.map(np.bitwise_or.reduce, parts))  # type: ignore[misc]
        yield f"torch maximum, {pages}", whole.max
        yield f"torch sum, {pages}", whole.sum


def read_bandwidth(threads: int, *, repeats: int, num_bytes: int = BYTES) -> dict[str, Any]:
    """Bytes a second by each reader, best of ``repeats`` turns; the best of them is what counts."""
    found: dict[str, float] = {}
    with ThreadPoolExecutor(threads) as pool:
        readers = list(_readers(threads, pool, num_bytes))
        for _ in range(repeats):
            for name, read in readers:
                started = time.perf_counter()
                read()
                found[name] = max(found.get(name, 0.0), num_bytes / (time.perf_counter() - started))
    best = max(found, key=lambda name: found[name])
    return {"bytes_per_second": found[best], "by": best, "megabytes_read": num_bytes >> 20, "all": found}


class Product:
    """``copies`` of one random packed matrix (side, side) and a call that multiplies rows of activations with one of them."""

    def __init__(self, name: str, *, copies: int = 1, rows: int = 1, side: int = SIDE) -> None:
        spec, generator = SPECS[name], torch.Generator().manual_seed(0)
        layout = cpu.Layout.of(spec)
        codes = torch.randint(0, spec.num_levels, (side * side,), dtype=torch.uint8, generator=generator)
        stream = pack_codes(codes.view(side, side), spec.code_bits)
        scale = torch.rand(side, 1, generator=generator) + 0.5
        first = cpu.repack(stream, scale, spec, side, side)
        self.matrices = [first] + [
            cpu.PackedMatrix(first.packed.clone(), first.scales.clone(), side, side, layout) for _ in range(copies - 1)
        ]
        self.kept = [matrix.struct for matrix in self.matrices]
        self.structs = [ctypes.byref(one) for one in self.kept]
        self.x = torch.randn(rows, side, generator=generator)
        self.y = torch.empty(rows, side)
        self.rows, self.num_bytes, self.operations = rows, first.num_bytes, 2 * rows * side * side
        self.dense = (codes.view(side, side).float() * (spec.levels[1] - spec.levels[0]) + spec.levels[0]) * scale
        self._multiply = cpu.library().mb_linear

    def call(self, which: int = 0) -> None:
        """One product with the matrix of that number."""
        self._multiply(self.structs[which], 0, self.x.data_ptr(), self.rows, None, self.y.data_ptr())

    def check(self) -> float:
        """Relative error against float64; raises SystemExit beyond 2 %."""
        self.call(len(self.structs) - 1)
        wanted = self.x.double() @ self.dense.double().T
        error = float((self.y - wanted).norm() / wanted.norm())
        if not error < 0.02:
            raise SystemExit(f"a product has a relative error of {error:.3g}; allowed is 0.02. No result is written")
        self.dense = torch.empty(0)
        return error

    def seconds(self, calls: int) -> float:
        """Of one call, copies in turn; a few calls before are not counted."""
        for i in range(3):
            self.call(i % len(self.structs))
        started = time.perf_counter()
        for i in range(calls):
            self.call(i % len(self.structs))
        return (time.perf_counter() - started) / calls


def dram(threads: int, *, rounds: int, num_bytes: int = BYTES, side: int = SIDE) -> dict[str, Any]:
    """GEMV at 1-4 bits (and 8) from memory: share of the read bandwidth, which is measured before, between and after."""
    num_bytes = max(num_bytes, 8 * (last_cache_bytes() or 0)) if num_bytes == BYTES else num_bytes
    bandwidth = read_bandwidth(threads, repeats=max(3, rounds), num_bytes=num_bytes)
    found: dict[str, Any] = {}
    for name in SPECS:
        copies = -(-num_bytes // Product(name, side=side).num_bytes)
        product = Product(name, copies=copies, side=side)
        error = product.check()
        times = [product.seconds(copies) for _ in range(rounds)]
        again = read_bandwidth(threads, repeats=2, num_bytes=num_bytes)
        if again["bytes_per_second"] > bandwidth["bytes_per_second"]:
            bandwidth = again
        found[name] = {"microseconds": {k: v * 1e6 if k != "rounds" else v for k, v in spread(times).items()},
                       "bytes": product.num_bytes, "copies": copies, "relative_error": error}  # fmt: skip
    for entry in found.values():
        entry["share_of_bandwidth"] = (
            entry["bytes"] / (entry["microseconds"]["median"] * 1e-6) / bandwidth["bytes_per_second"]
        )
    return {"read_bandwidth": bandwidth, "bits": found, "side": side}


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    before = cpu.isa()
    cpu.set_isa(name)
    try:
        yield
    finally:
        cpu.set_isa(before)


def avx2_against_vnni(*, rounds: int, side: int = SIDE) -> dict[str, Any] | str:
    """GEMV in cache: speed of AVX2 over that of the best VNNI kernel, by bits; a reason in words where there is no VNNI."""
    vnni = [name for name in cpu.isas() if "vnni" in name]
    if not vnni or "avx2" not in cpu.isas():
        return f"this processor and build have {', '.join(cpu.isas())}: no VNNI to compare with"
    found = {}
    for bits in ("1", "2", "3", "4"):
        product, ratios = Product(bits, side=side), []
        for _ in range(rounds):
            seconds = []
            for name in (vnni[0], "avx2"):
                with _instruction_set(name):
                    seconds.append(product.seconds(50))
            ratios.append(seconds[0] / seconds[1])
        found[bits] = spread(ratios)
    return {"vnni": vnni[0], "bits": found}


def rates(*, rounds: int, side: int = SIDE) -> dict[str, Any]:
    """Arithmetic rates in GOP/s (2 operations a weight and row) at 1 and 512 rows, ours, PyTorch's and NumPy's, in turn; and the int8 peak.

    NumPy's shows how good PyTorch's own is on this processor: its MKL takes slower code on some.

    ``int8_peak``: the greatest rate seen of torch._int_mm or our 8-bit and 2-bit products at 2048 rows: what the bounds are taken from.
    """
    found: dict[str, dict[str, float]] = {}
    for rows in (1, 512):
        x, w = torch.randn(rows, side), torch.randn(side, side)
        dense: dict[str, Callable[[], Any]] = {
            "torch-fp32": partial(torch.nn.functional.linear, x, w),
            "numpy-fp32": partial(np.matmul, x.numpy(), w.numpy().T),
        }
        products = {f"{name}-bit": Product(name, rows=rows, side=side) for name in SPECS}
        times: dict[str, list[float]] = {name: [] for name in (*dense, *products)}
        calls = 20 if rows == 1 else 1
        for _ in range(rounds):
            for name, multiply in dense.items():
                multiply()
                started = time.perf_counter()
                for _ in range(calls):
                    multiply()
                times[name].append((time.perf_counter() - started) / calls)
            for name, product in products.items():
                times[name].append(product.seconds(calls))
        operations = 2 * rows * side * side
        found[f"{rows} rows"] = {name: operations / statistics.median(t) / 1e9 for name, t in times.items()}
    return {"gops": found, "int8_peak_gops": _int8_peak(rounds, side), "side": side}


def _int8_peak(rounds: int, side: int) -> dict[str, float]:
    rows = side // 2
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((rows, side), (side, side)))
    ours = {f"{name}-bit": Product(name, rows=rows, side=side) for name in ("2", "8")}
    best: dict[str, float] = {}
    for _ in range(min(rounds, 5)):
        if best.get("torch._int_mm", 0.0) < _SLOW_SECONDS:  # without VNNI it takes a minute, once is enough
            started = time.perf_counter()
            torch._int_mm(a, b)
            best["torch._int_mm"] = min(best.get("torch._int_mm", 1e9), time.perf_counter() - started)
        for name, product in ours.items():
            best[name] = min(best.get(name, 1e9), product.seconds(1))
    operations = 2 * rows * side * side
    return {name: operations / seconds / 1e9 for name, seconds in best.items()}
