"""Rescoring n-best lists: hypotheses and tokens a second with shared prefixes against what others do, and what merged histories change.

Systems, all with the same weights (random ones; speed does not depend on them), in float32 unless said otherwise:

* ``per-list`` (a): one padded batch a list, full log-softmax in plain transformers, as other rescorers do;
* ``sorted`` (b): hypotheses of all lists sorted by length, batches of at most ``--max-tokens`` padded positions, full log-softmax;
* ``trie``: mixbits in PyTorch, every distinct prefix once;
* ``engine``: mixbits' native engine, 2-bit weights, 8-bit activations, every distinct prefix once;
* ``engine-apart``: the same engine without sharing, to see what is left to gain from sharing;
* ``trie-merged``, ``engine-merged``: histories equal in their last ``--merge-order`` tokens share a state (not exact).

Limits: of ``trie`` over (a), the padded positions of (a) over the distinct prefixes (sharing and padding alone, at equal cost a position); of ``engine``, the time
of ``engine-apart`` times the share of tokens that are distinct prefixes. ``share_of_limit`` is measured over limit. Systems take turns; ratios are medians of
ratios within a round. Before anything is timed all scores are compared with (a)'s. Peak memory: each system in a process of its own, above what it held
before the model was loaded.

With ``--model DIRECTORY`` (a trained model) merged histories are measured as well: score error and word error rate of LibriSpeech dev-clean, weights tuned with
exact scores on its first half, both reported on the second.

    python benchmarks/bench_rescore.py [--model DIRECTORY] [--output results/rescore.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mixbits.hf
from mixbits.asr.features import feature_table
from mixbits.asr.formats.jsonl import read_nbest
from mixbits.asr.nbest import NBest
from mixbits.asr.rescore import LmFeatures, apply_weights, lm_features
from mixbits.asr.trie import plan_forests
from mixbits.asr.tune import tune_on_lists
from mixbits.asr.wer import sum_errors
from mixbits.engine import Engine
from mixbits.kernels import cpu
from mixbits.lm.forest import ForestScorer, score_sequences
from mixbits.pipeline.lm_scores import SpeechModel
from mixbits.pipeline.scoring import ScoreSettings
from mixbits.runs import versions, write_json
from speed.memory import _reset_peak as reset_peak
from speed.memory import _status_bytes as status_bytes
from speed.models import SIZES, configuration, dense_twin, write_random_packed
from speed.timing import Quiet, Seconds, interleave, spread, times_faster

LISTS = {
    "librispeech-10best": ("librispeech_10best/dev_clean.jsonl.gz", 120),
    "kaldi-100best": ("lattices/kaldi_weather/mono.100best.jsonl.gz", 16),
    "pocketsphinx-50best": ("lattices/pocketsphinx_slf/nbest50.jsonl.gz", 16),
}
NATS, INT8_NATS_A_TOKEN = 2e-3, 0.15
MEMORY_SYSTEMS = ("per-list", "trie", "engine")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def some_lists(name: str, share: float) -> list[NBest]:
    """Lists spread evenly over a file."""
    path, count = LISTS[name]
    entries = read_nbest(Path(os.environ["MIXBITS_DATA"]) / path).lists
    chosen = np.linspace(0, len(entries) - 1, min(len(entries), max(2, round(count * share)))).astype(int)
    return [entries[number] for number in np.unique(chosen)]


def encoder(lists: Sequence[NBest], vocabulary: int) -> Callable[[str], list[int]]:
    """Words of these lists as ids in order of frequency (those past the vocabulary share its last id), between boundaries."""
    counts = Counter(word for entry in lists for h in entry.hypotheses for word in h.words)
    number = {word: min(3 + rank, vocabulary - 1) for rank, (word, _) in enumerate(counts.most_common())}
    return lambda text: [2, *(number[word] for word in text.split()), 2]


class Case:
    """One set of lists with a packed model and its dense twin; each system is a callable that gives all scores."""

    def __init__(self, name: str, directory: Path, options: argparse.Namespace) -> None:
        self.lists = some_lists(name, options.share)
        self.size, self.max_tokens, self.order = SIZES[options.size], options.max_tokens, options.merge_order
        self.encode = encoder(self.lists, self.size.vocabulary)
        self.ids = [[self.encode(h.text) for h in entry.hypotheses] for entry in self.lists]
        self.flat = [ids for entry in self.ids for ids in entry]
        self.directory = directory
        self._dense: Any = None
        self._engine: Engine | None = None

    @property
    def dense(self) -> Any:
        """The float32 model, made when first needed."""
        if self._dense is None:
            self._dense = dense_twin(mixbits.hf.load(self.directory))
        return self._dense

    @property
    def engine(self) -> Engine:
        """The native engine, loaded when first needed."""
        if self._engine is None:
            self._engine = Engine(self.directory)
        return self._engine

    def counts(self) -> dict[str, float]:
        """Work of the ways of scoring, in positions."""
        tokens = sum(len(ids) - 1 for ids in self.flat)
        padded = sum(len(entry) * (max(map(len, entry)) - 1) for entry in self.ids)
        sorted_padded = sum(len(part) * (max(map(len, part)) - 1) for part in self.batches())
        nodes, merged = (
            sum(
                f.num_nodes - f.num_trees
                for f, _ in plan_forests(self.ids, max_tokens=self.max_tokens, merge_order=order)
            )
            for order in (None, self.order)
        )
        return {
            "lists": len(self.ids), "hypotheses": len(self.flat), "tokens": tokens, "padded_positions": padded,
            "sorted_padded_positions": sorted_padded, "distinct_prefixes": nodes, "merged_positions": merged,
            "share_of_tokens_left": nodes / tokens, "padding_removed": padded / tokens, "limit_vs_per_list": padded / nodes,
        }  # fmt: skip

    def batches(self) -> list[list[list[int]]]:
        """All hypotheses sorted by length, in batches of at most ``max_tokens`` padded positions."""
        parts: list[list[list[int]]] = [[]]
        for ids in sorted(self.flat, key=len):
            if parts[-1] and (len(parts[-1]) + 1) * (len(ids) - 1) > self.max_tokens:
                parts.append([])
            parts[-1].append(ids)
        return parts

    def per_list(self) -> np.ndarray:
        """(a)."""
        return np.concatenate([score_sequences(self.dense, entry) for entry in self.ids])

    def sorted(self) -> np.ndarray:
        """(b), in the lists' order."""
        order = sorted(range(len(self.flat)), key=lambda row: len(self.flat[row]))
        found = np.empty(len(self.flat))
        found[order] = np.concatenate([score_sequences(self.dense, part) for part in self.batches()])
        return found

    def shared(self, scorer: Any, merge_order: int | None = None) -> np.ndarray:
        """Prefix tries."""
        way = {"max_tokens_per_forest": self.max_tokens, "merge_order": merge_order}
        return lm_features(self.lists, encode=self.encode, score_forest=scorer, **way).neural_lm_score

    def engine_apart(self) -> np.ndarray:
        """The engine, each hypothesis by itself."""
        parts = self.batches()
        order = sorted(range(len(self.flat)), key=lambda row: len(self.flat[row]))
        found = np.empty(len(self.flat))
        found[order] = [float(np.sum(scores)) for part in parts for scores in self.engine.score(part)]
        return found

    def systems(self) -> dict[str, Callable[[], np.ndarray]]:
        """By name."""
        scorer = ForestScorer(self.dense)
        return {
            "per-list": self.per_list,
            "sorted": self.sorted,
            "trie": lambda: self.shared(scorer),
            "engine": lambda: self.shared(self.engine),
            "engine-apart": self.engine_apart,
            "trie-merged": lambda: self.shared(scorer, self.order),
            "engine-merged": lambda: self.shared(self.engine, self.order),
        }


def check(case: Case, systems: dict[str, Callable[[], np.ndarray]]) -> dict[str, float]:
    """Largest difference of exact systems to (a); AssertionError beyond the tolerance."""
    right, found = systems["per-list"](), {}
    tokens = np.array([len(ids) - 1 for ids in case.flat])
    for name in ("sorted", "trie", "engine", "engine-apart"):
        error = np.abs(systems[name]() - right)
        allowed = INT8_NATS_A_TOKEN * tokens if name.startswith("engine") else NATS
        assert np.all(error <= allowed), (name, float(error.max()))
        found[name] = float(error.max())
    return found


def timed(work: Callable[[], np.ndarray]) -> Callable[[], float]:
    """Seconds of one run."""

    def run() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def ratios(seconds: Seconds, counts: dict[str, float]) -> dict[str, Any]:
    """Medians of ratios within a round, with limits."""
    limit = counts["limit_vs_per_list"]
    trie = times_faster(seconds, "trie", "per-list")
    engine_limits = [
        a / b * counts["share_of_tokens_left"]
        for a, b in zip(seconds["engine-apart"], seconds["engine"], strict=False)
        if a is not None and b is not None
    ]
    return {
        "trie_vs_per_list": trie, "trie_vs_sorted": times_faster(seconds, "trie", "sorted"),
        "limit_vs_per_list": limit, "trie_share_of_limit": trie["median"] / limit,
        "engine_vs_per_list": times_faster(seconds, "engine", "per-list"),
        "engine_vs_sorted": times_faster(seconds, "engine", "sorted"),
        "engine_share_of_limit": spread(engine_limits),
        "trie_merged_vs_trie": times_faster(seconds, "trie-merged", "trie"),
        "engine_merged_vs_engine": times_faster(seconds, "engine-merged", "engine"),
    }  # fmt: skip


def peak(name: str, system: str, directory: Path, options: argparse.Namespace) -> int:
    """Bytes at the high-water mark above those before the model was there, in a process of its own."""
    job = {"name": name, "system": system, "directory": str(directory)}
    command = [
        sys.executable,
        __file__,
        "--job",
        json.dumps(job),
        "--size",
        options.size,
        "--share",
        str(options.share),
    ]
    command += ["--max-tokens", str(options.max_tokens), "--threads", str(options.threads)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"measuring the memory of {system} failed: {run.stderr[-2000:]}")
    return int(run.stdout.splitlines()[-1])


def peak_here(job: dict[str, str], options: argparse.Namespace) -> int:
    """In the other process: dense weights are made at random, so that no file pages count for or against them."""
    from transformers import AutoModelForCausalLM

    case = Case(job["name"], Path(job["directory"]), options)
    warm = AutoModelForCausalLM.from_config(configuration(SIZES["tiny"], "opt")).eval()
    with torch.inference_mode():
        score_sequences(warm, [[2, 3, 2]])
        before = status_bytes("VmRSS")
        reset_peak()
        if job["system"] == "engine":
            case.shared(case.engine)
        else:
            case._dense = AutoModelForCausalLM.from_config(configuration(case.size, "opt")).eval().requires_grad_(False)
            _ = case.per_list() if job["system"] == "per-list" else case.shared(ForestScorer(case.dense))
    return status_bytes("VmHWM") - before


def merging(model: Path, orders: Sequence[int], share: float, rounds: int) -> dict[str, Any]:
    """Score error, word errors and speed of merged histories with a trained model; exact scores beside them."""
    file = read_nbest(Path(os.environ["MIXBITS_DATA"]) / LISTS["librispeech-10best"][0])
    entries = file.lists[: max(8, round(len(file.lists) * share))]
    half = len(entries) // 2
    speech = SpeechModel(model)
    ways = {"exact": ScoreSettings()} | {f"order-{n}": ScoreSettings(merge_order=n) for n in orders}
    found: dict[str, LmFeatures] = {name: way.score(speech, entries) for name, way in ways.items()}
    dev, test = list(range(half)), list(range(half, len(entries)))
    exact = found["exact"]
    tuned = exact.part(entries, dev)
    weights = tune_on_lists(
        [entries[n] for n in dev], neural_lm_score=tuned.neural_lm_score, num_unknown=tuned.num_unknown
    ).weights
    held_out = [entries[n] for n in test]
    references = [str(entry.reference) for entry in held_out]
    seconds = interleave(
        {name: timed(lambda way=way: way.score(speech, held_out).neural_lm_score) for name, way in ways.items()},  # type: ignore[misc]
        rounds=rounds, budget_seconds=120, say=say,
    )  # fmt: skip
    result: dict[str, Any] = {
        "lists": len(test),
        "first_pass_wer": sum_errors(references, [e.one_best.text for e in held_out]).wer,
    }
    chosen: dict[str, list[str]] = {}
    for name, lm in found.items():
        part = lm.part(entries, test)
        chosen[name] = apply_weights(held_out, part, replace(weights, dev_utterances=())).one_best
        error = np.abs(part.neural_lm_score - exact.part(entries, test).neural_lm_score)
        result[name] = {
            "wer": sum_errors(references, chosen[name]).wer,
            "changed_one_bests": sum(a != b for a, b in zip(chosen["exact"], chosen[name], strict=True)),
            "mean_error_nats": float(error.mean()), "largest_error_nats": float(error.max()),
            "positions_over_exact": lm.num_nodes / exact.num_nodes,
        }  # fmt: skip
        if name != "exact":
            result[name]["times_faster"] = times_faster(seconds, name, "exact")
    assert feature_table(held_out).num_lists == len(test)
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="36.6M")
    parser.add_argument("--share", type=float, default=1.0, help="of the lists that are measured (0.1 to try it out)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=200.0, help="seconds a system may take in all")
    parser.add_argument("--max-tokens", type=int, default=2048, help="model positions at once, of tries and of (b)")
    parser.add_argument("--merge-order", type=int, default=3)
    parser.add_argument(
        "--orders", type=int, nargs="*", default=[1, 2, 3, 4], help="merge orders with the trained model"
    )
    parser.add_argument("--model", type=Path, default=None, help="trained model with LibriSpeech's words in upper case")
    parser.add_argument("--model-share", type=float, default=0.2, help="of dev-clean, for the trained model")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--job", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the JSON."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = _options()
    if "MIXBITS_DATA" not in os.environ:
        raise SystemExit("MIXBITS_DATA is not set; expected the folder with the lists")
    torch.set_num_threads(options.threads)
    cpu.set_num_threads(options.threads)
    if options.job:
        print(peak_here(json.loads(options.job), options))
        return
    quiet = Quiet()
    result: dict[str, Any] = {"benchmark": "rescoring of n-best lists on a CPU", "ratios": {}, "lists": {}}
    with tempfile.TemporaryDirectory(prefix="mixbits-rescore-") as folder, torch.inference_mode():
        directory = Path(folder) / "packed"
        write_random_packed(configuration(SIZES[options.size], "opt"), 2, directory, seed=0)
        for name in LISTS:
            say(name)
            case = Case(name, directory, options)
            counts, systems = case.counts(), case.systems()
            errors = check(case, systems)
            say("  scores agree")
            seconds = interleave(
                {key: timed(work) for key, work in systems.items()},
                rounds=options.rounds, budget_seconds=options.budget, say=say,
            )  # fmt: skip
            times = {key: spread([v for v in values if v is not None])["median"] for key, values in seconds.items()}
            found = ratios(seconds, counts)
            memory = {key: peak(name, key, directory, options) for key in MEMORY_SYSTEMS}
            found |= {f"{key}_memory_vs_per_list": memory[key] / memory["per-list"] for key in MEMORY_SYSTEMS[1:]}
            result["ratios"][name] = found
            result["lists"][name] = {
                "counts": counts, "largest_error_nats": errors, "seconds": seconds, "peak_memory_bytes": memory,
                "hypotheses_per_second": {key: counts["hypotheses"] / value for key, value in times.items()},
                "tokens_per_second": {key: counts["tokens"] / value for key, value in times.items()},
            }  # fmt: skip
            say(
                f"  trie {found['trie_vs_per_list']['median']:.2f} x (a), limit {counts['limit_vs_per_list']:.2f}; "
                f"engine {found['engine_vs_per_list']['median']:.2f} x (a), {found['engine_share_of_limit']['median']:.0%} of its limit; "
                f"merged {found['engine_merged_vs_engine']['median']:.2f} x engine"
            )
    result["merged_histories"] = None
    if options.model is not None:
        say("merged histories with a trained model")
        result["merged_histories"] = merging(options.model, options.orders, options.model_share, options.rounds)
    result |= quiet.result()
    result["setting"] = {
        "size": options.size, "threads": options.threads, "rounds": options.rounds, "max_tokens": options.max_tokens,
        "merge_order": options.merge_order, "instruction_set": cpu.isa(), "share": options.share, "bits": 2,
    }  # fmt: skip
    result["versions"] = versions()
    if options.output:
        write_json(options.output, result)
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
