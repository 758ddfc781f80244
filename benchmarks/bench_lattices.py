"""Merged histories on lattices with a trained model: speed, score error and word errors at each merge order, exact scores beside them.

``exact``: no histories are merged (merge order 0), so every path of the beam has its exact score. Where it has to narrow the beam to keep to
``--max-arcs``, every order gets the narrowed one, so that all look at the same paths. Gaps are those of the certificate: LM score in
the new lattice less the exact one, of the ten best hypotheses. Word errors are of the best path, before (``first_pass``) and after. Scales are set by hand, for all alike,
so this is about the difference between orders. Speed: all lattices one after the other, orders take turns, medians of ratios within a round.

    python benchmarks/bench_lattices.py LATTICES --model DIRECTORY --references FILE --acoustic-scale 0.1 [--words words.txt] [--output FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixbits.asr.formats.kaldi_lattice import read_word_symbols
from mixbits.asr.formats.lattice_files import find_lattices, read_lattices
from mixbits.asr.formats.references import read_references
from mixbits.asr.lattice import Lattice
from mixbits.asr.lattice_paths import best_path
from mixbits.asr.lattice_rescore import LatticeSettings, RescoredLattice, rescore_lattice
from mixbits.asr.wer import sum_errors
from mixbits.kernels import cpu
from mixbits.pipeline.lm_scores import SpeechModel, encode_texts
from mixbits.pipeline.rescore_lattice import LatticeOptions
from mixbits.runs import versions, write_json
from speed.timing import Quiet, interleave, spread, times_faster


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Rescorer:
    """A model and what it needs to score one lattice after another."""

    def __init__(self, model: Path) -> None:
        speech = SpeechModel(model)
        self.model_hash, self.tokenizer = speech.model_hash, speech.tokenizer
        self.runtime = speech.runtime("auto", "trie")
        self.score_forest = speech.score_forest(self.runtime)

    def __call__(self, lattice: Lattice, settings: LatticeSettings) -> RescoredLattice:
        return rescore_lattice(lattice, encode=self.encode, score_forest=self.score_forest, settings=settings)

    def encode(self, texts: Any) -> list[list[int]]:
        """Token ids of each text."""
        ids = encode_texts(self.tokenizer, texts)
        return [ids[text] for text in texts]


def summary(found: list[RescoredLattice], references: list[str]) -> dict[str, Any]:
    """Word errors of the best paths, gaps and work."""
    errors = sum_errors(references, [one.best.path.text for one in found])
    gaps = [abs(gap) for one in found for gap in one.certificate.gaps]
    return {
        "wer": errors.wer, "errors": errors.num_errors,
        "mean_gap_nats": sum(gaps) / len(gaps), "largest_gap_nats": max(gaps),
        "largest_gap_of_best_nats": max(abs(one.certificate.gaps[0]) for one in found),
        "model_positions": sum(one.certificate.num_nodes for one in found),
        "new_arcs": sum(one.certificate.new_arcs for one in found),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lattices", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--references", type=Path, required=True, help="trn or Kaldi text")
    parser.add_argument("--words", type=Path, default=None, help="Kaldi's words.txt")
    parser.add_argument("--acoustic-scale", type=float, default=1.0)
    parser.add_argument("--interpolate", type=float, default=1.0)
    parser.add_argument("--beam", type=float, default=4.0)
    parser.add_argument("--max-arcs", type=int, default=50_000)
    parser.add_argument("--orders", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--every", type=int, default=1, help="only every so manieth lattice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu.set_num_threads(options.threads)
    quiet = Quiet()
    given = LatticeOptions(
        acoustic_scale=options.acoustic_scale, interpolate=options.interpolate, beam=options.beam, max_paths=0, max_arcs=options.max_arcs
    )  # fmt: skip
    symbols = None if options.words is None else read_word_symbols(options.words)
    texts, rescore = read_references(options.references).texts, Rescorer(options.model)
    all_lattices = [lattice for _, lattice, _ in read_lattices(find_lattices(options.lattices), symbols=symbols)]
    pairs, exact = [], []
    for lattice in [lattice for lattice in all_lattices if lattice.utterance in texts][:: options.every]:
        settings = given.settings(lattice)
        exact.append(rescore(lattice, replace(settings, merge_order=0)))
        done = exact[-1].certificate
        pairs.append((lattice, replace(settings, beam=min(settings.beam, done.beam))))
        say(f"  {lattice.utterance}: {done.num_paths} paths, beam {done.beam:.2f}")
    references = [texts[lattice.utterance] for lattice, _ in pairs]
    orders = {"exact": 0} | {f"order-{n}": n for n in options.orders}

    def run(order: int) -> list[RescoredLattice]:
        return [rescore(lattice, replace(settings, merge_order=order)) for lattice, settings in pairs]

    def seconds(order: int) -> float:
        started = time.perf_counter()
        run(order)
        return time.perf_counter() - started

    found = {name: summary(run(order) if order else exact, references) for name, order in orders.items()}
    times = interleave(
        {name: lambda order=order: seconds(order) for name, order in orders.items()},  # type: ignore[misc]
        rounds=options.rounds, budget_seconds=150, say=say,
    )  # fmt: skip
    for name in orders:
        found[name]["seconds"] = spread([v for v in times[name] if v is not None])["median"]
        if name != "exact":
            found[name]["times_faster"] = times_faster(times, name, "exact")
    first = [best_path(lattice, settings.weights).text for lattice, settings in pairs]
    result = {
        "benchmark": "merged histories on lattices", "lattices": len(pairs), "beams": spread([settings.beam for _, settings in pairs]),
        "first_pass_wer": sum_errors(references, first).wer, "orders": found, "runtime": rescore.runtime,
        "model_hash": rescore.model_hash, "settings": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        **quiet.result(), "versions": versions(),
    }  # fmt: skip
    for name, row in found.items():
        faster = row.get("times_faster", {"median": 1.0})["median"]
        say(
            f"{name}: {faster:.2f} x, {row['wer']:.2f} % WER, gap {row['mean_gap_nats']:.3f} nats, {row['model_positions']} positions"
        )
    if options.output is not None:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
