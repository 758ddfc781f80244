"""Which kernel, with which tiles: from measurements kept in a file, or from published figures until there are any.

Three kernels compute a linear layer: ``gemv`` (weights unpacked in registers, float32 arithmetic, up to 16 rows of x), ``dot`` (tiles
dequantized for tensor cores) and ``dense`` (the whole matrix dequantized, then the vendor's product; a workspace of one layer).

Defaults, for 16-bit activations: ``gemv`` up to :data:`GEMV_ROWS` rows and ``dense`` above :data:`DOT_ROWS`. Weight-only kernels at 4 bits
beat fp16 up to M = 16 (Marlin 1.6-2.6 times, tinygemm 2.3 times) and lose from M = 64-256 on (0.35-0.9 times) on A100 and H100, where
dequantizing first and cuBLAS is the advice; 128 is between. These are other people's kernels: :func:`tune` replaces them by
measurement on the device at hand, per shape, bits, groups, dtype and power of two of M, and keeps the winner in a JSON file.

Why a file: measuring takes seconds a shape, and a choice that changed between runs would change the last bits of results. Limits: the
defaults are not measured here; a winner is the median of one run.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from mixbits.errors import FormatError, SpecError
from mixbits.jsonfile import read_json, write_json

Kernel = Literal["gemv", "dot", "dense"]
KERNELS: tuple[Kernel, ...] = ("gemv", "dot", "dense")
GEMV_ROWS, DOT_ROWS = 16, 128
_DEFAULT_PROCESSORS = 132  # of an H100, where no device says otherwise
_FORMAT = 1


@dataclass(frozen=True)
class Launch:
    """A kernel and its tiles: ``block_n`` rows of W (a multiple of 16), ``block_m`` rows of x, splits of K, warps, pipeline stages.

    ``measured``: whether it won a measurement on this device, or is a default.
    """

    kernel: Kernel
    block_m: int = 16
    block_n: int = 64
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 2
    measured: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise SpecError(f"unknown kernel {self.kernel!r}; expected one of {', '.join(KERNELS)}")
        least = 16 if self.kernel == "dot" else 1
        for name, value, low in (("block_m", self.block_m, least), ("block_n", self.block_n, 16)):
            if value < low or value & (value - 1):
                raise SpecError(f"{name} is {value}; kernel {self.kernel!r} needs a power of two of at least {low}")
        if min(self.splits, self.num_warps, self.num_stages) < 1:
            raise SpecError(
                f"splits, num_warps and num_stages are {self.splits}, {self.num_warps}, {self.num_stages}; expected 1 or more"
            )


def default_cache() -> Path:
    """Where measurements are kept: ``$MIXBITS_GPU_CACHE``, or ``mixbits/gpu.json`` in the user's cache folder."""
    if path := os.environ.get("MIXBITS_GPU_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixbits" / "gpu.json"


def bucket(m: int) -> int:
    """The power of two at or above ``m``: choices are per bucket."""
    return 1 << max(m - 1, 0).bit_length()


def choose_kernel(
    m: int,
    n: int,
    k: int,
    bits: int,
    *,
    group_size: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    cache: str | Path | None = None,
) -> Launch:
    """The kernel for ``m`` rows of x times an (n, k) weight of ``bits`` bits: the measured winner if there is one, else a default.

    ``device``: whose measurements and size count (none on a CPU); ``cache``: the file of measurements (default :func:`default_cache`; "": none).
    Raises FormatError when that file is damaged.
    """
    device = torch.device(device) if device is not None else torch.device("cpu")
    if device.type == "cuda":
        known = _measurements(Path(default_cache() if cache is None else cache)) if cache != "" else {}
        if found := known.get(_key(m, n, k, bits, group_size, dtype, device)):
            return found
    return _default(m, n, k, dtype, _processors(device))


def _default(m: int, n: int, k: int, dtype: torch.dtype, processors: int) -> Launch:
    if m <= GEMV_ROWS:
        launch = Launch("gemv", block_m=bucket(m), block_n=64 if m <= 8 else 32, num_warps=2)
    elif m <= DOT_ROWS:
        launch = Launch("dot", block_m=dot_rows(m, dtype), block_n=64)
    else:
        return Launch("dense")
    return replace(launch, splits=_enough_splits(launch, m, n, k, processors))


def dot_rows(m: int, dtype: torch.dtype) -> int:
    """Rows of x in a default tile of 'dot': with 64 rows of W and two stages at most 80 KB of shared memory, at any bits."""
    return min(max(bucket(m), 16), 32 if dtype == torch.float32 else 64)


def _enough_splits(launch: Launch, m: int, n: int, k: int, processors: int) -> int:
    """Splits of K so that about two tiles fall to each processor; never more than blocks."""
    tiles = -(-n // launch.block_n) * (-(-m // launch.block_m))
    return max(1, min(2 * processors // max(tiles, 1), -(-k // 256)))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _DEFAULT_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def candidates(m: int, n: int, k: int, *, processors: int = _DEFAULT_PROCESSORS) -> Iterator[Launch]:
    """What :func:`tune` measures for one shape: at most 19 launches (each compiles once a width and dtype)."""
    launches = []
    if m <= GEMV_ROWS:
        for block_n, num_warps in ((32, 1), (32, 2), (64, 2), (64, 4), (128, 4)):
            launches.append(Launch("gemv", block_m=bucket(m), block_n=block_n, num_warps=num_warps))
    for block_n in (64, 128):
        for block_m in sorted({min(max(bucket(m), 16), size) for size in (64, 128)}):
            large = block_m * block_n > 1 << 12
            shape = (block_m, block_n)
            launches.append(Launch("dot", *shape, num_warps=8 if large else 4, num_stages=2 if large else 3))
    for launch in launches:
        for splits in sorted({1, _enough_splits(launch, m, n, k, processors)}):
            yield replace(launch, splits=splits)
    yield Launch("dense")


def tune(
    weight: Any,
    m: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache: str | Path | None = None,
    measure: Callable[[functools.partial[Any]], float] | None = None,
) -> Launch:
    """Measure all :func:`candidates` for ``m`` rows times ``weight`` (a GpuWeight on a GPU), keep the fastest in the cache file, return it.

    ``measure``: the call, a partial of ``linear`` with its Launch as ``kernel``, -> time (default: median milliseconds of ``triton.testing.do_bench``). A candidate that does not fit
    the device is passed over. Raises SpecError off a GPU unless ``measure`` is given.
    """
    from mixbits.kernels.triton.run import linear

    if weight.device.type != "cuda" and measure is None:
        raise SpecError(f"the weight is on {weight.device}; measuring needs a GPU")
    generator = torch.Generator(device=weight.device).manual_seed(0)
    x = torch.randn(m, weight.cols, generator=generator, device=weight.device, dtype=torch.float32).to(dtype)
    best, shortest, refused = None, float("inf"), None
    for launch in candidates(m, weight.rows, weight.cols, processors=_processors(weight.device)):
        try:
            taken = (measure or _median_ms)(functools.partial(linear, x, weight, kernel=launch))
        except Exception as error:  # out of shared memory or registers: Triton's errors have no common class
            refused = error
            continue
        if taken < shortest:
            best, shortest = replace(launch, measured=True), taken
    if best is None:
        raise SpecError(f"no kernel runs for {m} rows of ({weight.rows}, {weight.cols}): {refused}") from refused
    key = _key(m, weight.rows, weight.cols, weight.bits, weight.group_size, dtype, weight.device)
    path = Path(default_cache() if cache is None else cache)
    known = {**_measurements(path), key: best}
    entries = {name: {k: v for k, v in asdict(entry).items() if k != "measured"} for name, entry in known.items()}
    write_json(path, {"format_version": _FORMAT, "launches": entries})
    _measurements.cache_clear()
    return best


def _median_ms(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def _key(m: int, n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{name}, triton {triton.__version__}, {str(dtype).removeprefix('torch.')}, {bits} bits, group {group_size}, {n}x{k}, m {bucket(m)}"


@functools.cache
def _measurements(path: Path) -> dict[str, Launch]:
    """The file's launches, read once; none without a file."""
    if not path.exists():
        return {}
    data = read_json(path)
    try:
        if data["format_version"] != _FORMAT:
            raise ValueError(f"format_version is {data['format_version']!r}, expected {_FORMAT}")
        return {name: cast(Launch, Launch(**entry, measured=True)) for name, entry in data["launches"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: not a file of kernel measurements ({error}); delete it to measure again") from None
