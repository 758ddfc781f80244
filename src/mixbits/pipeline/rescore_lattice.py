"""Rescore lattices with a language model directory: files in, files out, one utterance in memory at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixbits.asr.atomic import atomic_binary_file
from mixbits.asr.formats.jsonl import write_nbest
from mixbits.asr.formats.kaldi_lattice import WordSymbols, read_word_symbols
from mixbits.asr.formats.lattice_files import LatticeFiles, find_lattices, read_lattices, write_like
from mixbits.asr.kenlm_model import load_ngram
from mixbits.asr.lattice import Lattice, PathWeights
from mixbits.asr.lattice_rescore import Certificate, LatticeSettings, RescoredLattice, rescore_lattice
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.ngram import NgramModel
from mixbits.errors import DataError, SpecError
from mixbits.pipeline.lm_scores import Runtime, SpeechModel, check_vocabulary, encode_texts, unknown_words

_ENOUGH_WORDS = 200
"""Distinct words after which a vocabulary that does not fit is an error at once."""


@dataclass(frozen=True)
class LatticeOptions:
    """What the user may set; None leaves a scale to the file's header, else 1, 1, 0. See :class:`mixbits.asr.lattice_rescore.LatticeSettings`."""

    acoustic_scale: float | None = None
    lm_scale: float | None = None
    word_insertion_penalty: float | None = None
    interpolate: float = 1.0
    old_lm_scale: float | None = None
    old_lm: Path | None = None
    merge_order: int = 4
    beam: float = 10.0
    max_paths: int = 500
    max_arcs: int = 50_000
    num_hypotheses: int = 10
    max_tokens: int = 4096
    lower_case: bool = False
    drop_dead_ends: bool = False
    runtime: Runtime = "auto"
    words: Path | None = None

    def settings(self, lattice: Lattice | None, old_lm: NgramModel | None = None) -> LatticeSettings:
        """Settings for a lattice, scales of its header included; ``old_lm`` as it was read. Raises SpecError or DataError: numbers that make no sense."""
        own = (None if lattice is None else lattice.weights) or PathWeights()
        given = {name: getattr(self, name) for name in ("acoustic_scale", "lm_scale", "word_insertion_penalty")}
        weights = replace(own, **{name: v for name, v in given.items() if v is not None})
        return LatticeSettings(
            weights=weights,
            interpolate=self.interpolate,
            old_lm_scale=self.old_lm_scale,
            old_lm=old_lm,
            merge_order=self.merge_order,
            beam=self.beam,
            max_paths=self.max_paths,
            max_arcs=self.max_arcs,
            num_checked=self.num_hypotheses,
            max_tokens=self.max_tokens,
        )


@dataclass
class LatticeReport:
    """What was done: a certificate an utterance, totals, notes."""

    utterances: list[dict[str, Any]] = field(default_factory=list)
    certificates: list[Certificate] = field(default_factory=list)
    num_words: int = 0
    seconds: float = 0.0
    model_hash: str | None = None
    runtime: str = "pytorch"
    notes: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, Any]:
        """Sums and worst cases over all utterances; gaps in nats."""
        found = self.certificates
        gaps = np.abs([gap for one in found for gap in one.gaps])
        arcs = sum(one.num_arcs for one in found)
        return {
            "utterances": len(found),
            "exact_utterances": sum(one.is_exact for one in found),
            "settled_utterances": sum(one.is_settled for one in found),
            "arcs": arcs,
            "arcs_touched": sum(one.arcs_touched for one in found),
            "share_touched": sum(one.arcs_touched for one in found) / arcs if arcs else 1.0,
            "new_arcs": sum(one.new_arcs for one in found),
            "model_positions": sum(one.num_nodes for one in found),
            "checked_hypotheses": len(gaps),
            "best_max_gap_nats": max(abs(one.gaps[0]) for one in found),
            "max_gap_nats": float(gaps.max()),
            "mean_gap_nats": float(gaps.mean()),
            "best_changed_by_exact_scores": sum(one.best_changed for one in found),
            "seconds": self.seconds,
        }


def rescore_lattices(
    source: str | Path,
    model: str | Path | tuple[Any, Any],
    output: str | Path | None,
    *,
    options: LatticeOptions,
    best_path: Path | None = None,
    nbest: Path | None = None,
    advance: Callable[[str], None] | None = None,
) -> LatticeReport:
    """Rescore the lattices at ``source`` (file or folder) and write them to ``output`` in the same format.

    Args:
        best_path: write the best hypotheses here, ``words (utterance)`` a line (trn). nbest: write the best hypotheses as JSONL.
        advance: called with each utterance's id when it is done.

    Raises:
        SpecError, DataError, FormatError: settings, files, a model whose vocabulary does not fit. Nothing is written then.
    """
    if output is None and best_path is None and nbest is None:
        raise SpecError("nothing to write: give an output for lattices, best paths or n-best lists")
    files = find_lattices(source)
    symbols = None if options.words is None else read_word_symbols(options.words)
    old_lm = None if options.old_lm is None else load_ngram(options.old_lm)
    options.settings(None, old_lm)  # bad settings are found before the model is loaded
    worker = _Worker(SpeechModel(model), options, old_lm, advance)
    started = time.perf_counter()
    with ExitStack() as stack:
        trn = None if best_path is None else stack.enter_context(atomic_binary_file(best_path))
        worker.trn = trn
        _run(files, output, worker, symbols, options)
        if nbest is not None:
            write_nbest(nbest, worker.lists)
    report = worker.report
    report.seconds = time.perf_counter() - started
    report.model_hash = worker.model_hash
    if files.format == "kaldi" and options.acoustic_scale is None and options.lm_scale is None:
        report.notes.append(
            "Kaldi's acoustic costs are unscaled: give --acoustic-scale, mostly 0.05 to 0.1 (1 was used)."
        )
    return report


def _run(
    files: LatticeFiles,
    output: str | Path | None,
    worker: _Worker,
    symbols: WordSymbols | None,
    options: LatticeOptions,
) -> None:
    dead_ends: Any = "drop" if options.drop_dead_ends else "error"
    if output is not None:
        check = worker.check_all_words
        write_like(files, output, worker.rescore, symbols=symbols, dead_ends=dead_ends, check=check)
        return
    for _, lattice, _ in read_lattices(files, symbols=symbols, dead_ends=dead_ends):
        worker.rescore(lattice)
    worker.check_all_words()


class _Worker:
    """Rescores one lattice after another and keeps what the report needs."""

    def __init__(
        self,
        speech: SpeechModel,
        options: LatticeOptions,
        old_lm: NgramModel | None,
        advance: Callable[[str], None] | None,
    ) -> None:
        self.options = options
        self.model_hash = speech.model_hash
        self._old_lm = old_lm
        self.report = LatticeReport()
        self.lists: list[NBest] = []
        self.trn: Any = None
        self._advance = advance
        self._tokenizer = speech.tokenizer
        runtime = speech.runtime(options.runtime, "trie")
        self.report.runtime = runtime
        self._score_forest = speech.score_forest(runtime)
        self._words: set[str] = set()
        self._seen: set[str] = set()
        self._is_checked = False

    def rescore(self, lattice: Lattice) -> Lattice:
        """The lattice with new scores; best path, list and certificate are kept. Raises DataError: an id that was there before."""
        if lattice.utterance in self._seen:
            raise DataError(f"utterance {lattice.utterance[:80]!r} is in two files; utterance ids must be unique")
        self._seen.add(lattice.utterance)
        self._words.update(
            label for label, is_word in zip(lattice.labels, lattice.label_is_word, strict=True) if is_word
        )
        if not self._is_checked and len(self._words) >= _ENOUGH_WORDS:
            self.check_all_words()
            self._is_checked = True
        settings = self.options.settings(lattice, self._old_lm)
        done = rescore_lattice(lattice, encode=self._encode, score_forest=self._score_forest, settings=settings)
        self._keep(lattice.utterance, done)
        if self._advance is not None:
            self._advance(lattice.utterance)
        return done.lattice

    def check_all_words(self) -> None:
        """Raise DataError if most distinct words of the lattices so far are unknown to the model."""
        texts = [self._cased(word) for word in sorted(self._words)]
        unknown = unknown_words(self._tokenizer, texts)
        check_vocabulary(self._tokenizer, texts, unknown, lower_case=self.options.lower_case)

    def _keep(self, utterance: str, done: RescoredLattice) -> None:
        best, certificate = done.best, done.certificate
        self.report.certificates.append(certificate)
        self.report.num_words += len(best.path.words)
        self.report.utterances.append(
            {
                "utterance": utterance,
                "text": best.path.text,
                "total_score": best.exact_total_score,
                **{name: getattr(certificate, name) for name in Certificate.__dataclass_fields__ if name != "beam"},
                "gaps": list(certificate.gaps),
                "beam": certificate.beam if math.isfinite(certificate.beam) else None,
            }
        )
        if self.trn is not None:
            self.trn.write(f"{best.path.text} ({utterance})\n".lstrip().encode())
        hypotheses = tuple(
            Hypothesis(
                one.path.text,
                one.path.acoustic_score,
                one.exact_lm_score,
                {"neural_lm_score": one.model_score, "total_score": one.exact_total_score},
            )
            for one in done.hypotheses
        )
        self.lists.append(NBest(utterance, hypotheses))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        cased = [self._cased(text) for text in texts]
        ids = encode_texts(self._tokenizer, cased)
        return [ids[text] for text in cased]

    def _cased(self, text: str) -> str:
        return text.lower() if self.options.lower_case else text
