"""Time of one linear layer on a GPU from packed weights, against bf16 cuBLAS, torch.compile, and gemlite and torchao where they import.

For every shape, number of rows M and width: our kernels (the fastest of mixbits.kernels.triton.dispatch.candidates, measured here, and the
default choice beside it; int8 activations too), the bf16 product of torch (cuBLAS), the same under torch.compile
(max-autotune-no-cudagraphs), gemlite's and torchao's weight-only layers at the widths they have. Correctness first: relative error against the
float64 product of the dequantized matrix (of the original one for peers that quantize it themselves); a system that fails or is off is
listed with its error and gets no time. Times are of CUDA graph replays (launches dominate small layers otherwise), medians with the 20th and
80th percentile of ten. The calls in a graph take turns over up to 16 copies of the weight, 128 MiB in all where they reach that, so that
large layers come from memory as in a model larger than the L2 cache; small ones stay in L2 (``working_set_bytes`` says which);
eager times of ours and of cuBLAS beside them. Ratios are to bf16 cuBLAS in the same
run; ``bandwidth_share`` is packed bytes over time over the bandwidth of a 1 GiB copy measured first, and may pass 1 from L2. The crossover is the smallest M from
which cuBLAS is faster than our weight-only kernels.

The head: log-sum-exp with targets against bf16 logits + torch.logsumexp + gather, at V = 10,048 and 50,257.

Usage: python benchmarks/bench_gpu.py [--quick] [--output results/bench_gpu.json]
Limits: one GPU, clocks not fixed. Not run yet: no GPU was at hand when it was written; the peers' calls follow their documentation.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixbits.quantspec import QuantSpec
from mixbits.runs import versions, write_json

SHAPES = ((512, 512), (2048, 512), (512, 2048), (10_048, 512), (4096, 4096), (11_008, 4096))
VOCABULARIES = (10_048, 50_257)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048)
SPECS = ("1", "1.58", "2", "3", "4", "8", "2-g128", "4-g128")
QUICK: dict[str, Any] = {"shapes": ((512, 512), (4096, 4096)), "rows": (1, 16, 256), "specs": ("2", "4-g128", "8")}
DEVICE, PEERS = "cuda", "dense and peers"
COLD_BYTES, MAX_COPIES = 128 << 20, 16
TOLERANCE, INT8_TOLERANCE = (
    0.01,
    0.03,
)  # relative, of bf16 products; int8 activations add about 0.7 % per layer on random inputs


def median(calls: Sequence[Callable[[], Any]], *, graph: bool = True) -> dict[str, float]:
    """Microseconds a call, the calls taking turns: median, 20th and 80th percentile."""
    from triton.testing import do_bench, do_bench_cudagraph

    for call in calls:
        call()
    turn = itertools.cycle(calls)
    bench = do_bench_cudagraph if graph else do_bench
    mid, low, high = bench(lambda: next(turn)(), quantiles=[0.5, 0.2, 0.8])
    return {"median_us": mid * 1e3, "p20_us": low * 1e3, "p80_us": high * 1e3}


def num_copies(num_bytes: int) -> int:
    """Copies of a weight that make COLD_BYTES, at most MAX_COPIES."""
    return max(1, min(MAX_COPIES, -(-COLD_BYTES // num_bytes)))


def read_bandwidth() -> float:
    """Bytes per second of reading, from a copy of 1 GiB (read and written bytes count)."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (median([lambda: target.copy_(source)], graph=False)["median_us"] * 1e-6)


def packed_weight(text: str, n: int, k: int) -> Any:
    """Random codes of the spec, repacked on the GPU; scales near 1 / sqrt(K)."""
    from mixbits.kernels.triton.layout import repack
    from mixbits.packing.bitpack import pack_codes

    spec, g = QuantSpec.parse(text), torch.Generator().manual_seed(0)
    codes = torch.randint(0, spec.num_levels, (n, k), generator=g, dtype=torch.uint8)
    scales = (torch.rand(spec.num_float_scales(n, k), generator=g) + 0.5) / (k**0.5 * spec.levels[-1])
    return repack(pack_codes(codes, spec.code_bits), spec, n, k, scales=scales.to(torch.float16), device=DEVICE)


def checked(
    calls: Sequence[Callable[[], Any]], wanted: torch.Tensor, tolerance: float, **timing: Any
) -> dict[str, Any]:
    """Error first, then time; what fails is said, not timed."""
    try:
        error = float((calls[0]().double() - wanted).norm() / wanted.norm())
        if not error <= tolerance:
            return {"relative_error": error, "failed": f"relative error {error:.3g} is above {tolerance}"}
        return {"relative_error": error, **median(calls, **timing)}
    except Exception as error:  # a peer may fail in any way
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}


def gemlite_layer(bits: int, dense: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """gemlite's fp16 weight-only layer in groups of 128, with random codes, and its matrix; gemlite.helper.A16Wn."""
    from gemlite.helper import A16Wn  # type: ignore[import-not-found]

    n, k = dense.shape
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=DEVICE)
    scales = torch.full((n * k // 128, 1), 1 / 64, dtype=torch.float16, device=DEVICE)
    zero = 2.0 ** (bits - 1)
    layer = A16Wn(device=DEVICE).from_weights(codes, scales, torch.full_like(scales, zero), bits, 128)
    return layer, (codes.double() - zero) / 64


def torchao_layer(bits: int, dense: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """torchao's weight-only layer of ``dense``, 4 bits in groups of 128 or 8 bits per row."""
    from torchao.quantization import (  # type: ignore[import-not-found]
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    linear = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, dtype=dense.dtype, device=DEVICE)
    linear.weight.data.copy_(dense)
    layer = torch.nn.Sequential(linear)
    quantize_(layer, Int4WeightOnlyConfig(group_size=128) if bits == 4 else Int8WeightOnlyConfig())
    return layer, dense.double()


def peers(x: torch.Tensor, dense: torch.Tensor) -> dict[str, Any]:
    """gemlite and torchao at the widths they have; 'not installed' where they do not import."""
    found: dict[str, Any] = {}
    builders: list[tuple[str, Any, int, torch.Tensor, float]] = []
    builders += [(f"gemlite {bits} bit g128", gemlite_layer, bits, x.half(), TOLERANCE) for bits in (1, 2, 4, 8)]
    builders += [(f"torchao {bits} bit", torchao_layer, bits, x, 0.3 if bits == 4 else 0.03) for bits in (4, 8)]
    for name, build, bits, given, tolerance in builders:
        try:
            layer, matrix = build(bits, dense)
            copies = [layer] + [copy.deepcopy(layer) for _ in range(num_copies(dense.numel() * bits // 8) - 1)]
        except ImportError:
            found[name] = {"failed": "not installed"}
            continue
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        with torch.inference_mode():
            calls = [functools.partial(each, given) for each in copies]
            found[name] = checked(calls, given.double() @ matrix.T, tolerance)
    return found


def dense_systems(x: torch.Tensor, dense: torch.Tensor) -> dict[str, Any]:
    """cuBLAS in bf16, replayed and eager, and torch.compile's product."""
    wanted, product = x.double() @ dense.double().T, torch.nn.functional.linear
    compiled = torch.compile(product, mode="max-autotune-no-cudagraphs", fullgraph=True)
    copies = [dense] + [dense.clone() for _ in range(num_copies(dense.numel() * 2) - 1)]
    calls = [functools.partial(product, x, each) for each in copies]
    return {
        "bf16 cublas": checked(calls, wanted, TOLERANCE),
        "bf16 cublas, eager": checked(calls, wanted, TOLERANCE, graph=False),
        "bf16 torch.compile": checked([functools.partial(compiled, x, each) for each in copies], wanted, TOLERANCE),
    }


def our_systems(x: torch.Tensor, weight: Any, cache: Path) -> dict[str, Any]:
    """The default choice, the measured one (kept in ``cache``), tensor cores and dequantize-first by default tiles, int8 activations."""
    from mixbits.kernels.triton import dispatch
    from mixbits.kernels.triton.run import dequantize, linear

    wanted = x.double() @ dequantize(weight).double().T
    copies = [weight] + [replace(weight, words=weight.words.clone()) for _ in range(num_copies(weight.num_bytes) - 1)]

    def calls(**options: Any) -> list[Callable[[], Any]]:
        return [functools.partial(linear, x, each, **options) for each in copies]

    default = dispatch.choose_kernel(
        len(x), weight.rows, weight.cols, weight.bits, dtype=x.dtype, device=x.device, cache=""
    )
    best = dispatch.tune(
        weight,
        len(x),
        dtype=x.dtype,
        cache=cache,
        measure=lambda call: median(calls(kernel=call.keywords["kernel"]))["median_us"],
    )
    return {
        f"ours default ({default.kernel})": checked(calls(kernel=default), wanted, TOLERANCE),
        f"ours measured ({best.kernel})": checked(calls(kernel=best), wanted, TOLERANCE),
        "ours measured, eager": checked(calls(kernel=best), wanted, TOLERANCE, graph=False),
        "ours tensor cores (dot)": checked(calls(kernel="dot"), wanted, TOLERANCE),
        "ours dequantize first (dense)": checked(calls(kernel="dense"), wanted, TOLERANCE),
        "ours int8 activations (dot)": checked(calls(activations="int8"), wanted, INT8_TOLERANCE),
        "launch": {field: getattr(best, field) for field in best.__dataclass_fields__},
    }


def with_ratios(systems: dict[str, Any], baseline: float | None, num_bytes: int, bandwidth: float) -> dict[str, Any]:
    """Add 'times faster than bf16 cuBLAS', and for ours the share of the measured bandwidth."""
    for name, row in systems.items():
        if "median_us" in row:
            row["speedup_vs_bf16_cublas"] = baseline / row["median_us"] if baseline else None
            if name.startswith("ours"):
                row["bandwidth_share"] = num_bytes / (row["median_us"] * 1e-6) / bandwidth
    return systems


def bench_shape(n: int, k: int, m: int, specs: Any, cache: Path, bandwidth: float) -> list[dict[str, Any]]:
    """The dense baselines and peers of one shape and M, then one entry a spec."""
    g = torch.Generator(device=DEVICE).manual_seed(0)
    x = torch.randn(m, k, generator=g, device=DEVICE).to(torch.bfloat16)
    dense = (torch.randn(n, k, generator=g, device=DEVICE) / k**0.5).to(torch.bfloat16)
    shape: dict[str, Any] = {"n": n, "k": k, "m": m}
    common = dense_systems(x, dense) | peers(x, dense)
    baseline = common["bf16 cublas"].get("median_us")
    entries = [{**shape, "spec": PEERS, "systems": with_ratios(common, baseline, 0, bandwidth)}]
    for spec in specs:
        weight = packed_weight(spec, n, k)
        size = weight.num_bytes
        systems = with_ratios(our_systems(x, weight, cache), baseline, size, bandwidth)
        sizes = {"packed_bytes": size, "working_set_bytes": size * num_copies(size)}
        entries.append({**shape, "spec": spec, **sizes, "systems": systems})
        best = min((row["median_us"] for row in systems.values() if "median_us" in row), default=float("nan"))
        print(f"{n:6d} x {k:5d}  M {m:5d}  {spec:8s} ours {best:8.1f} us, cuBLAS {baseline or 0:8.1f} us", flush=True)
    return entries


def crossovers(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per shape and spec: the smallest measured M from which weight-only kernels (not 'dense') lose to bf16 cuBLAS; None: never."""
    found = []
    ours = [entry for entry in entries if entry["spec"] != PEERS]
    for n, k, spec in dict.fromkeys((entry["n"], entry["k"], entry["spec"]) for entry in ours):
        lost_from = None
        for entry in ours:
            if (entry["n"], entry["k"], entry["spec"]) == (n, k, spec):
                ratios = [
                    r.get("speedup_vs_bf16_cublas") or 0
                    for s, r in entry["systems"].items()
                    if s.startswith("ours") and "dense" not in s and "int8" not in s
                ]
                lost_from = None if max(ratios, default=0) >= 1 else (lost_from or entry["m"])
        found.append({"n": n, "k": k, "spec": spec, "cublas_faster_from_m": lost_from})
    return found


def bench_head(quick: bool) -> list[dict[str, Any]]:
    """Log-sum-exp and targets, fused and not."""
    from mixbits.kernels.triton.run import dequantize, log_sum_exp

    entries = []
    for vocabulary, m in itertools.product(VOCABULARIES[:1] if quick else VOCABULARIES, (1, 64, 2048)):
        weight = packed_weight("2", vocabulary, 512)
        g = torch.Generator(device=DEVICE).manual_seed(0)
        x = torch.randn(m, 512, generator=g, device=DEVICE).to(torch.bfloat16)
        targets = torch.randint(0, vocabulary, (m,), generator=g, device=DEVICE)
        dense = dequantize(weight, dtype=torch.bfloat16)

        def materialized(
            x: torch.Tensor = x, dense: torch.Tensor = dense, targets: torch.Tensor = targets
        ) -> torch.Tensor:
            logits = torch.nn.functional.linear(x, dense).float()
            return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

        def fused(
            x: torch.Tensor = x, weight: Any = weight, targets: torch.Tensor = targets, **kind: Any
        ) -> torch.Tensor:
            lse, logits = log_sum_exp(x, weight, targets, **kind)
            return logits - lse

        wanted = x.double() @ dequantize(weight).double().T
        wanted = wanted.gather(1, targets[:, None])[:, 0] - wanted.logsumexp(1)
        systems = {
            "bf16 logits in memory": checked([materialized], wanted, TOLERANCE),
            "ours fused": checked([fused], wanted, TOLERANCE),
            "ours fused, int8 activations": checked(
                [functools.partial(fused, activations="int8")], wanted, INT8_TOLERANCE
            ),
        }
        baseline = systems["bf16 logits in memory"].get("median_us")
        for row in systems.values():
            if baseline and "median_us" in row:
                row["speedup_vs_logits_in_memory"] = baseline / row["median_us"]
        entries.append({"vocabulary": vocabulary, "k": 512, "m": m, "spec": "2", "systems": systems})
    return entries


def main() -> int:
    """Run the benchmark and write its JSON; exit code 2 without a GPU or Triton."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two shapes, three M, three specs: a few minutes")
    parser.add_argument("--output", type=Path, default=Path("results/bench_gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "bench_gpu needs a CUDA GPU and a CUDA build of torch; none is here: nothing was measured", file=sys.stderr
        )
        return 2
    try:
        import triton
    except ImportError:
        print("bench_gpu needs Triton: pip install 'mixbits[gpu]'; nothing was measured", file=sys.stderr)
        return 2
    job: dict[str, Any] = QUICK if options.quick else {"shapes": SHAPES, "rows": ROWS, "specs": SPECS}
    properties, bandwidth = torch.cuda.get_device_properties(0), read_bandwidth()
    result: dict[str, Any] = {
        "format_version": 1, "benchmark": "bench_gpu", "quick": options.quick, "versions": {**versions(), "triton": triton.__version__},
        "device": properties.name, "processors": properties.multi_processor_count, "copy_bandwidth_bytes_per_second": bandwidth,
        "finished": False, "head": bench_head(options.quick), "layers": [],
    }  # fmt: skip
    cache = options.output.with_name(options.output.stem + "_launches.json")
    for (n, k), m in itertools.product(job["shapes"], job["rows"]):
        result["layers"] += bench_shape(n, k, m, job["specs"], cache, bandwidth)
        result["crossovers"] = crossovers(result["layers"])
        write_json(options.output, result)  # what is measured stays, should the time run out
    write_json(options.output, result | {"finished": True})
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
