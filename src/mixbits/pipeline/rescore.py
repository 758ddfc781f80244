"""Rescore n-best lists with language models and compare the outputs.

Every weight is tuned on the dev list, for each system apart; a test list that shares utterances with dev is refused. Two
systems are always there beside the models:

* ``first-pass``: the file's own order, whatever the recognizer ranked by;
* ``first-pass-tuned``: acoustic score, first-pass LM score (where there is one) and word insertion penalty, tuned like the rest
  but without a neural LM. Part of any gain over ``first-pass`` comes from tuning alone; this one shows how much.

:func:`rescore_systems` is for experiments (many systems, all with references); :func:`rescore_list` for one list of a user,
with weights from dev lists, a file or by hand, with or without references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mixbits.asr.formats.nbestfile import NBestFile
from mixbits.asr.formats.registry import ReadOptions, read_any
from mixbits.asr.nbest import NBest, one_best_texts, reference_texts
from mixbits.asr.ngram import NgramModel
from mixbits.asr.rescore import DEFAULT_MAX_TOKENS, LmFeatures, apply_weights
from mixbits.asr.weights import SCALES, Weights, check_no_overlap
from mixbits.errors import DataError, SpecError
from mixbits.pipeline.cross_validation import cross_validate
from mixbits.pipeline.lm_scores import Runtime, Scoring, SpeechModel, unknown_share
from mixbits.pipeline.scoring import NgramMode, ScoreSettings, merging_error, ngram_alone, tune_ngram, tune_system
from mixbits.pipeline.speech_rows import (
    FIRST_PASS,
    FIRST_PASS_TUNED,
    NO_LOSS_RULE,
    beats_first_pass,
    compare,
    gain_over_tuning,
    list_facts,
)
from mixbits.summary import WITH_NGRAM

__all__ = ["RescoredList", "ScoreSettings", "rescore_list", "rescore_systems", "tune_system"]

MODEL, REFERENCE = "model", "reference"
NGRAM = "ngram"
"""The n-gram model alone."""
_Score = Callable[[NBestFile], tuple[Sequence[NBest], LmFeatures | None]]
_UNKNOWN = {
    "penalty": "the probability of <unk>",
    "shared": "an equal share of the probability of <unk>",
    "spelling": "the probability of <unk> times that of its spelling",
}


def unknown_note(settings: ScoreSettings) -> str:
    """What an unknown word counts, in one sentence."""
    return (
        f"A word outside the language model's vocabulary gets {_UNKNOWN[settings.unknown_policy]}; "
        "a penalty added per such word is tuned on dev."
    )


def rescore_systems(
    systems: Mapping[str, str | Path],
    dev: str | Path,
    tests: Mapping[str, str | Path],
    *,
    reference_system: str = "full",
    lower_case: bool = False,
    seed: int = 0,
    show_progress: bool = False,
    first_pass_tuned: bool = True,
    allow_overlap: bool = False,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    scoring: Scoring = "trie",
    cache: str | Path | None = None,
    interpolate: Literal["tuned", "equal"] = "tuned",
    max_hypotheses: int | None = None,
    runtime: Runtime = "auto",
    ngram: NgramModel | None = None,
    ngram_mode: NgramMode = "interpolate",
    ngram_weight: float = 0.5,
) -> dict[str, Any]:
    """Tune every system on ``dev``, apply it to every test list, compare with ``reference_system``.

    With ``ngram`` there are the systems ``ngram`` (it alone) and, for each model, ``NAME+ngram``; these are compared with the reference system's.

    Args:
        systems: name → model directory. tests: name → list; the one named ``test``, else the first, is the headline.
        interpolate: see :class:`ScoreSettings`. max_hypotheses: only that many from the top of every list are looked at.
        cache: folder of kept LM scores, so that a second run needs no model.
        runtime, ngram_mode, ngram_weight: as in :class:`ScoreSettings`.

    Returns plain data for a summary: ``reference_system``, ``rows`` (name → entry on the headline list, see :func:`mixbits.pipeline.speech_rows.compare`),
    ``tests`` (list → name → entry), ``lists``, ``weights``, ``dev_wer``, ``gain_significant`` (headline list: ``reference_system``
    beats the file's order and the tuned first pass), ``no_loss_rule``, ``headline``, ``notes``.

    Raises:
        SpecError: the reference system is missing, or a name is taken. DataError, FormatError: lists or models.
    """
    _check_names(systems, tests, reference_system)
    plain = ScoreSettings(lower_case, max_tokens, scoring, cache, show_progress, interpolate, runtime)
    ways = {"": plain}
    if ngram is not None:
        ways[WITH_NGRAM] = replace(plain, ngram=ngram, ngram_mode=ngram_mode, ngram_weight=ngram_weight)
    dev_file = _cut(read_any(dev), max_hypotheses)
    files = {name: _cut(read_any(path), max_hypotheses) for name, path in tests.items()}
    reference_texts(dev_file)
    for file in files.values():
        reference_texts(file)
        _refuse_overlap(dev_file, file, allow_overlap=allow_overlap)
    weights: dict[str, Weights] = {}
    outputs: dict[str, dict[str, list[str]]] = {name: {FIRST_PASS: one_best_texts(f)} for name, f in files.items()}

    def use(system: str, tuned: Weights, score: _Score) -> None:
        weights[system] = tuned
        for name, file in files.items():
            outputs[name][system] = apply_weights(*score(file), tuned, allow_overlap=allow_overlap).one_best

    if first_pass_tuned:
        use(FIRST_PASS_TUNED, tune_system(None, dev_file, settings=plain, seed=seed), lambda file: (file, None))
    if ngram is not None:
        tuned = tune_ngram(ngram, dev_file, lower_case=lower_case, seed=seed)
        use(NGRAM, tuned, lambda file: (file, ngram_alone(ngram, file, lower_case=lower_case)))
    unknown: dict[str, float] = {}
    for system, directory in systems.items():
        model = SpeechModel(directory)  # one model in memory at a time
        for suffix, way in ways.items():
            tuned = tune_system(model, dev_file, settings=way, seed=seed)
            use(system + suffix, tuned, partial(way.apart, model, weights=tuned))
        if system == reference_system:
            for name, file in {"dev": dev_file, **files}.items():
                unknown[name] = unknown_share(model.tokenizer, reference_texts(file), lower_case=lower_case)
    entries = {name: _entries(file, outputs[name], reference_system, seed=seed) for name, file in files.items()}
    headline = "test" if "test" in files else next(iter(files))
    texts, file = outputs[headline], files[headline]
    facts = {
        name: list_facts(entry) | {"unknown_share": unknown[name], "data_hash": entry.data_hash}
        for name, entry in {"dev": dev_file, **files}.items()
    }
    notes = [
        f"{FIRST_PASS} is the order of the hypotheses in the file. Weights are tuned on dev only.",
        unknown_note(plain),
    ]
    if first_pass_tuned:
        notes.append(f"List {headline!r}: {gain_over_tuning(file, texts, reference_system)}")
    if ngram is not None:
        mode = (
            f"word by word, its share {ngram_weight:g}" if ngram_mode == "interpolate" else "with a weight of its own"
        )
        notes.append(
            f"{NGRAM} is a {ngram.order}-gram model of the training text; NAME{WITH_NGRAM}: mixed {mode}, compared with {reference_system}{WITH_NGRAM}."
        )
    return {
        "headline": headline,
        "reference_system": reference_system,
        "rows": entries[headline],
        "tests": entries,
        "lists": facts,
        "weights": {name: weight_values(found) for name, found in weights.items()},
        "dev_wer": {name: _dev_wer(found) for name, found in weights.items()},
        "gain_significant": beats_first_pass(reference_texts(file), texts, reference_system),
        "no_loss_rule": NO_LOSS_RULE,
        "ngram": None if ngram is None else {"order": ngram.order, "mode": ngram_mode, "weight": ngram_weight},
        "lower_case": lower_case,
        "notes": notes,
    }


def _entries(
    file: NBestFile, outputs: Mapping[str, Sequence[str]], reference_system: str, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Systems without an n-gram model of ours against the reference system, those with one against the reference system with it."""
    mixed = [name for name in outputs if name == NGRAM or name.endswith(WITH_NGRAM)]
    found = compare(file, {n: t for n, t in outputs.items() if n not in mixed}, reference_system, seed=seed)
    if mixed:
        chosen = {n: t for n, t in outputs.items() if n in (FIRST_PASS, FIRST_PASS_TUNED, *mixed)}
        found |= {
            name: entry
            for name, entry in compare(file, chosen, reference_system + WITH_NGRAM, seed=seed).items()
            if name in mixed
        }
    return found


def _cut(file: NBestFile, number: int | None) -> NBestFile:
    """The file with at most ``number`` hypotheses an utterance."""
    if number is None:
        return file
    return replace(file, lists=tuple(replace(e, hypotheses=e.hypotheses[:number]) for e in file.lists))


@dataclass(frozen=True)
class RescoredList:
    """One list rescored by ``model``, and by ``reference`` where there is a reference model.

    ``lists``: sorted by the model's total score. ``weights``: by system. ``entries`` and ``facts``: word errors
    (:mod:`mixbits.pipeline.speech_rows`), None where no utterance has a reference. ``lm``: the model's scores. ``merging``: what merged
    histories changed (:func:`mixbits.pipeline.scoring.merging_error`), None without them. ``rankings``: the lists as each system sorts
    them, the first pass included, where they were to be kept.
    """

    lists: tuple[NBest, ...]
    weights: Mapping[str, Weights]
    entries: Mapping[str, Mapping[str, Any]] | None
    facts: Mapping[str, Any] | None
    lm: LmFeatures
    data_hash: str
    notes: tuple[str, ...]
    merging: Mapping[str, float] | None = None
    rankings: Mapping[str, tuple[NBest, ...]] = field(default_factory=dict)


def rescore_list(
    path: str | Path,
    model: str | Path,
    *,
    weights: Weights | None = None,
    dev: str | Path | None = None,
    num_folds: int | None = None,
    reference_model: str | Path | None = None,
    references: str | Path | None = None,
    dev_references: str | Path | None = None,
    settings: ScoreSettings | None = None,
    allow_overlap: bool = False,
    keep_rankings: bool = False,
    seed: int = 0,
) -> RescoredList:
    """Rescore one list, with given ``weights`` (the same for both models), or weights tuned on ``dev`` for each model, or with
    ``num_folds`` parts of the list itself, each with weights tuned on the others (:mod:`mixbits.pipeline.cross_validation`).

    ``references`` and ``dev_references``: files of references for lists that hold none (:mod:`mixbits.asr.formats.references`).
    Utterances without a reference are rescored and left out of the word errors; their number is noted. ``keep_rankings`` is for a
    comparison (:mod:`mixbits.pipeline.rescore_report`), which needs references.

    Raises:
        SpecError: not exactly one of ``weights``, ``dev`` and ``num_folds``. DataError, FormatError: lists, models, overlap with dev,
            no reference at all where rankings are kept.
    """
    if [weights, dev, num_folds].count(None) != 2:
        raise SpecError(
            "give either weights, or a dev list to tune them on, or a number of parts to cross-validate over"
        )
    if dev_references is not None and dev is None:
        raise SpecError("references for a dev list are given, but no dev list; give both or neither")
    settings = settings or ScoreSettings()
    notes = [unknown_note(settings)]
    file = read_any(path, options=ReadOptions(references))
    if keep_rankings and all(entry.reference is None for entry in file):
        raise DataError(
            f"{path}: no utterance has a reference, so there is nothing to report on; rescore without a report"
        )
    dev_file = None if dev is None else read_any(dev, options=ReadOptions(dev_references))
    source = dev_file if dev_file is not None else weights
    shared = 0 if source is None else _refuse_overlap(source, file, allow_overlap=allow_overlap)
    if shared:
        notes.append(f"{shared} utterances of this list were tuned on: its word error rates are too good.")
    sources = {} if reference_model is None else {REFERENCE: reference_model}
    systems: dict[str, SpeechModel | None] = {} if weights is not None else {FIRST_PASS_TUNED: None}
    systems |= {name: SpeechModel(directory) for name, directory in {**sources, MODEL: model}.items()}
    found: dict[str, Weights] = {}
    outputs = {FIRST_PASS: one_best_texts(file)}
    rankings = {FIRST_PASS: file.lists} if keep_rankings else {}
    for system, scorer in systems.items():
        if num_folds is not None:
            parts = cross_validate(scorer, file, settings=settings, num_folds=num_folds, seed=seed)
            done, lm, found[system] = parts.rescored, parts.lm, parts.weights
            outputs[system] = done.one_best
            if keep_rankings:
                rankings[system] = done.lists
            if system == MODEL:
                notes.append(
                    f"Cross-validated over {num_folds} parts of whole {parts.unit}: each was rescored with weights tuned on the "
                    "others. The weights shown (and saved) were tuned on all."
                )
            continue
        if dev_file is not None:
            found[system] = tune_system(scorer, dev_file, settings=settings, seed=seed)
        else:
            assert weights is not None
            found[system] = weights
            if system == MODEL and scorer is not None and weights.model_hash not in (None, scorer.model_hash):
                notes.append("The weights were tuned for another model; tune them for this one on a dev list.")
        lm = None if scorer is None else settings.score(scorer, file, weights=found[system])
        done = apply_weights(file, lm, found[system], allow_overlap=allow_overlap)
        outputs[system] = done.one_best
        if keep_rankings:
            rankings[system] = done.lists
    assert lm is not None  # MODEL comes last
    entries = facts = None
    spoken = [number for number, entry in enumerate(file) if entry.reference is not None]
    if len(spoken) < len(file):
        rest = "no word error rates" if not spoken else f"word error rates are over the other {len(spoken)}"
        notes.append(f"{len(file) - len(spoken)} of {len(file)} utterances have no reference: {rest}.")
    if spoken:
        part = [file[number] for number in spoken]
        texts = {name: [output[number] for number in spoken] for name, output in outputs.items()}
        entries = compare(part, texts, None if reference_model is None else REFERENCE, seed=seed)
        facts = list_facts(part)
        if FIRST_PASS_TUNED in texts:
            notes.append(gain_over_tuning(part, texts, MODEL))
    merging = None
    if settings.merge_order is not None:
        assert scorer is not None
        merging = merging_error(scorer, file.lists, lm, found[MODEL], settings)
    return RescoredList(done.lists, found, entries, facts, lm, file.data_hash, tuple(notes), merging, rankings)


def weight_values(weights: Weights) -> dict[str, float]:
    """The multipliers by name."""
    return {name: float(getattr(weights, name)) for name in SCALES}


def _refuse_overlap(dev: NBestFile | Weights, lists: NBestFile, *, allow_overlap: bool) -> int:
    """Number of utterances in both; DataError if there are any, unless they are allowed."""
    weights = dev if isinstance(dev, Weights) else Weights(dev_utterances=tuple(entry.utterance for entry in dev))
    check_no_overlap(weights, lists, allow_overlap=allow_overlap)
    return len({entry.utterance for entry in lists} & set(weights.dev_utterances))


def _dev_wer(weights: Weights) -> float | None:
    if weights.dev_errors is None or not weights.dev_words:
        return None
    return 100.0 * weights.dev_errors / weights.dev_words


def _check_names(systems: Mapping[str, Any], tests: Mapping[str, Any], reference_system: str) -> None:
    if reference_system not in systems:
        raise SpecError(f"no system is named {reference_system!r} to compare with; got {', '.join(systems) or 'none'}")
    taken = [name for name in systems if name in (FIRST_PASS, FIRST_PASS_TUNED, NGRAM) or name.endswith(WITH_NGRAM)]
    if taken:
        raise SpecError(f"system name {taken[0]!r} is taken by the first pass or an n-gram model; choose another")
    if not tests or "dev" in tests:
        raise SpecError("give at least one test list, and name none of them 'dev'")
