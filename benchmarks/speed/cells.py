"""The table: one ratio a cell, its spread, its target, and the reason of each null."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from speed.models import SIZES
from speed.systems import LENGTH, SEQUENCES
from speed.timing import Seconds, best_of, spread, times_faster

TARGETS: dict[str, dict[str, float]] = {
    "decode_2bit_vs_torch_fp32": {"at_least": 60},
    "decode_2bit_vs_llama_cpp_best": {"at_least": 4.5},
    "score_vs_torch_fp32": {"at_least": 3.8},
    "score_vs_torch_bf16": {"at_least": 2},
    "score_vs_dynamic_int8": {"at_least": 1.2},
    "score_3_4bit_vs_torch_fp32": {"at_least": 3},
    "gemv_dram_share_of_bandwidth": {"at_least": 0.9, "stretch": 0.95},
    "gemv_avx2_vs_vnni": {"at_least": 0.55},
    "dropin_score_vs_torch_fp32": {"at_least": 2.5},
    "peak_memory_vs_torch_fp32": {"at_most": 0.25},
    "ppl_change_int8_activations_percent": {"at_most": 0.1, "stretch": 0},
    "decode_2bit_share_of_vnni_bound": {"stretch": 0.6},
    "score_share_of_vnni_bound": {"stretch": 0.75},
}
PEERS = {
    "torch_fp32": "torch-fp32",
    "torch_bf16": "torch-bf16",
    "torch_compile": "torch-compile",
    "dynamic_int8": "dynamic-int8",
}
FAST_BITS, SLOW_BITS = ("1", "1.58", "2", "8"), ("3", "4")


def cpu_flags() -> set[str]:
    """Flags of the first processor, where Linux says them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def has_bfloat16() -> bool | None:
    """Whether the processor multiplies bfloat16 itself; None where that is not known. Without, PyTorch's bfloat16 is very slow."""
    flags = cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16"}) if flags else None


class Table:
    """Collects cells."""

    def __init__(self) -> None:
        self.ratios: dict[str, float | None] = {}
        self.spread: dict[str, dict[str, float]] = {}
        self.missing: dict[str, str] = {}

    def put(self, name: str, value: dict[str, float] | float | str) -> None:
        """A spread, whose median counts; a number; or the reason why there is none."""
        if isinstance(value, str):
            self.ratios[name], self.missing[name] = None, value
        elif isinstance(value, dict):
            self.ratios[name], self.spread[name] = value["median"], value
        else:
            self.ratios[name] = value

    def least(self, name: str, values: list[dict[str, float] | str]) -> None:
        """The cell is the least of several, all of which have to be there."""
        reasons = [value for value in values if isinstance(value, str)]
        found = [value for value in values if isinstance(value, dict)]
        self.put(name, reasons[0] if reasons else min(found, key=lambda value: value["median"]))


def _against(seconds: Seconds, ours: str, theirs: str, skip: list[str]) -> dict[str, float] | str:
    if theirs in seconds:
        return times_faster(seconds, ours, theirs)
    return "left out by --skip" if theirs in skip else "not part of this case"


def _llama(case: dict[str, Any], what: str, asked: str | None) -> dict[str, float] | str:
    """Engine against the fastest quantized type of llama.cpp, Llama models."""
    if not asked:
        return "no interpreter with llama-cpp-python was given (--llama-python)"
    peer = case["llama"].get("llama.cpp", {})
    names = [f"llama.cpp-{kind}" for kind in peer.get("bytes", {}) if kind != "F32"]
    if not names:
        return peer.get("missing", "llama.cpp quantized no file")
    seconds = case["llama"][what]
    best = best_of(seconds, names)
    return times_faster(seconds, "engine-2", best)


def speed_cells(case: dict[str, Any], options: argparse.Namespace, table: Table) -> None:
    """Decoding and scoring of one case."""
    opt, skip = case["opt"], options.skip
    for peer, name in PEERS.items():
        if name == "torch-compile" and name not in opt["score"] and name not in skip:
            continue
        for bits in (*FAST_BITS, *SLOW_BITS):
            if f"engine-{bits}" in opt["decode"]:
                key = bits.replace(".", "_")
                table.put(f"decode_{key}bit_vs_{peer}", _against(opt["decode"], f"engine-{bits}", name, skip))
                table.put(f"score_{key}bit_vs_{peer}", _against(opt["score"], f"engine-{bits}", name, skip))
        table.put(f"dropin_score_vs_{peer}", _against(opt["score"], "drop-in-2", name, skip))
    table.put("decode_2bit_vs_llama_cpp_best", _llama(case, "decode", options.llama_python))
    table.put("score_2bit_vs_llama_cpp_best", _llama(case, "score", options.llama_python))
    for what in ("decode", "score"):
        table.put(f"{what}_llama_2bit_vs_torch_fp32", times_faster(case["llama"][what], "engine-2", "torch-fp32"))


def _product_cells(found: dict[str, Any], case: dict[str, Any], main: str, table: Table) -> None:
    kernels, few = found["kernels"], ("1", "2", "3", "4")
    dram = kernels["dram"]["bits"]
    for bits in few:
        table.put(f"gemv_{bits}bit_dram_share_of_bandwidth", dram[bits]["share_of_bandwidth"])
    table.put("gemv_dram_share_of_bandwidth", min(dram[bits]["share_of_bandwidth"] for bits in few))
    vnni = kernels["avx2_against_vnni"]
    table.put("gemv_avx2_vs_vnni", vnni) if isinstance(vnni, str) else table.least(
        "gemv_avx2_vs_vnni", [vnni["bits"][b] for b in few]
    )
    gops = kernels["rates"]["gops"]["512 rows"]
    table.put("torch_fp32_matmul_vs_numpy", gops["torch-fp32"] / gops["numpy-fp32"])
    size, peak = SIZES[main], max(kernels["rates"]["int8_peak_gops"].values())
    weights = size.layers * (4 * size.width**2 + 2 * size.width * size.feed_forward) + size.vocabulary * size.width
    bound = peak * 1e9 / (2 * weights)  # tokens a second, all products at the int8 peak
    for name, seconds, tokens in (
        ("decode_2bit", case["opt"]["decode"]["engine-2"], 1),
        ("score", case["opt"]["score"]["engine-2"], SEQUENCES * LENGTH),
    ):
        share = spread([tokens / s / bound for s in seconds if s is not None])
        table.put(f"{name}_share_of_int8_peak", share)
        table.put(
            f"{name}_share_of_vnni_bound",
            share if "vnni" in case["isa"] else f"the kernels run on {case['isa']}, not VNNI",
        )


def tokens_per_second(case: dict[str, Any]) -> dict[str, Any]:
    """Rates of every system, for reading; ratios are taken within rounds instead."""
    found: dict[str, Any] = {}
    for family in ("opt", "llama"):
        for what, tokens in (("decode", 1), ("score", SEQUENCES * LENGTH)):
            rates = {n: [tokens / s for s in values if s is not None] for n, values in case[family][what].items()}
            found[f"{family} {what}"] = {name: spread(values) for name, values in rates.items() if values}
    return found


def table(found: dict[str, Any], main: str, options: argparse.Namespace) -> dict[str, Any]:
    """ratios, spread, targets, missing; the further cases; rates."""
    case, cells = found["cases"][main], Table()
    speed_cells(case, options, cells)
    bits_of = {"score_vs": FAST_BITS, "score_3_4bit_vs": SLOW_BITS}
    for prefix, bits in bits_of.items():
        for peer, name in PEERS.items():
            cells.least(
                f"{prefix}_{peer}", [_against(case["opt"]["score"], f"engine-{b}", name, options.skip) for b in bits]
            )
    _product_cells(found, case, options.main, cells)
    memory, perplexity = found["memory"], found["perplexity"]
    cells.put(
        "peak_memory_vs_torch_fp32",
        memory if isinstance(memory, str) else memory["engine"]["scoring"] / memory["torch-fp32"]["scoring"],
    )
    cells.put(
        "ppl_change_int8_activations_percent",
        perplexity if isinstance(perplexity, str) else abs(perplexity["change_percent"]),
    )
    growth = {}
    for name, other in found["cases"].items():
        if name != main:
            more = Table()
            speed_cells(other, options, more)
            growth[name] = {"ratios": more.ratios, "spread": more.spread, "missing": more.missing}
    order = [*(key for key in TARGETS), *(key for key in sorted(cells.ratios) if key not in TARGETS)]
    return {
        "ratios": {key: cells.ratios[key] for key in order},
        "targets": TARGETS,
        "missing": cells.missing,
        "spread": cells.spread,
        "other_sizes_and_threads": growth,
        "tokens_per_second": {name: tokens_per_second(one) for name, one in found["cases"].items()},
        "best_llama_cpp": {
            name: {w: best_of(one["llama"][w], [n for n in one["llama"][w] if n.startswith("llama.cpp-") and not n.endswith("F32")])
                   for w in ("decode", "score")}
            for name, one in found["cases"].items() if one["llama"].get("llama.cpp", {}).get("bytes")
        },
    }  # fmt: skip
