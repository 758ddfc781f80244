"""Random packed matrices with their slow twins in NumPy: dense float64 weights, and products in exact integers."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mixbits.kernels import cpu
from mixbits.kernels.cpu import PackedMatrix
from mixbits.packing.bitpack import pack_codes
from mixbits.scales import join_scale, split_scale
from mixbits.spec import QuantSpec


@dataclass
class Twin:
    """A packed matrix; ``whole`` int64 (rows, cols) and ``scale`` float32 (rows, groups): the weight is their product."""

    spec: QuantSpec
    matrix: PackedMatrix
    whole: np.ndarray
    scale: np.ndarray
    starts: list[int]  # of the groups

    @property
    def expanded(self) -> np.ndarray:
        sizes = np.diff([*self.starts, self.whole.shape[1]])
        return np.repeat(self.scale, sizes, axis=1)

    @property
    def exact(self) -> np.ndarray:
        """(rows, cols) float64."""
        return self.whole * self.expanded.astype(np.float64)

    @property
    def rounded(self) -> np.ndarray:
        """(rows, cols) float32, as the packed layers hold it."""
        return self.whole.astype(np.float32) * self.expanded

    def int8_product(self, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """x (m, cols) float32 -> (m, rows) float32: activations to 8 bits, sums in integers, then float32 in the order stated."""
        x = x.astype(np.float32)
        with np.errstate(all="ignore"):
            finite = np.isfinite(x).all(1)
            most = np.abs(np.where(finite[:, None], x, 0)).max(1)
            most = np.maximum(most, np.float32(1e-30))
            q = np.rint(np.where(finite[:, None], x, 0) * (np.float32(127) / most)[:, None]).astype(np.int64)
            total = np.zeros((len(x), len(self.whole)), dtype=np.float32)
            for g, (start, stop) in enumerate(zip(self.starts, [*self.starts[1:], self.whole.shape[1]], strict=True)):
                sums = (q[:, start:stop] @ self.whole[:, start:stop].T).astype(np.float32)
                total = total + sums * self.scale[:, g] if g else sums * self.scale[:, g]
            scale = np.where(finite, most / np.float32(127), np.float32(np.nan))
            y = total * scale[:, None]
            return y if bias is None else y + bias.astype(np.float32)


def make_twin(spec: QuantSpec | str, rows: int, cols: int, seed: int = 0) -> Twin:
    spec = QuantSpec.parse(spec) if isinstance(spec, str) else spec
    rng = np.random.default_rng([seed, rows, cols])
    if not spec.is_quantized:
        halves = rng.standard_normal((rows, cols)).astype(np.float16)
        halves.flat[0] = 6e-8  # the smallest subnormal number
        return FloatTwin(spec, cpu.repack(torch.from_numpy(halves), None, spec, rows, cols), halves, np.ones((rows, 1), np.float32), [0])  # fmt: skip
    codes = rng.integers(0, spec.num_levels, (rows, cols), dtype=np.uint8)
    codes.flat[0], codes.flat[-1] = 0, spec.num_levels - 1
    groups = spec.num_groups(cols)
    shape = (1, 1) if spec.granularity == "tensor" else (rows, groups)
    scale = torch.from_numpy(rng.uniform(0.05, 1.0, shape).astype(np.float16).astype(np.float32))
    if spec.scale_bits == 8:
        scale = join_scale(*split_scale(scale, spec))
    elif shape != (1, 1):
        scale[-1, -1] = 0.0
    packed = pack_codes(torch.from_numpy(codes.reshape(-1)), spec.bit_width)
    matrix = cpu.repack(packed, scale, spec, rows, cols)
    low, step = spec.levels[0], spec.levels[1] - spec.levels[0]
    factor = 2 if low != int(low) else 1  # half-step levels are odd halves
    whole = np.rint(factor * (low + step * codes.astype(np.float64))).astype(np.int64)
    compact = np.broadcast_to(scale.numpy() / np.float32(factor), (rows, groups)).copy()
    starts = list(range(0, cols, spec.group_size or cols))
    return Twin(spec, matrix, whole, compact, starts)


class FloatTwin(Twin):
    """Of 16 bits: always multiplied in float32."""

    @property
    def exact(self) -> np.ndarray:
        return self.whole.astype(np.float64)

    @property
    def rounded(self) -> np.ndarray:
        return self.whole.astype(np.float32)


@pytest.fixture(scope="session")
def twin():
    """``twin(spec, rows, cols, seed=0)``."""
    return make_twin


@pytest.fixture(autouse=True)
def as_before():
    """Instruction set and threads as they were."""
    if not cpu.is_available():
        yield
        return
    isa, threads = cpu.isa(), cpu.num_threads()
    yield
    cpu.set_isa(isa)
    cpu.set_num_threads(threads)
