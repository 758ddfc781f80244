"""A certificate for a packed model: is it as good as the full-precision one, on these texts and lists, or can they not tell?

Perplexity of both on the same tokens in the same windows; where n-best lists are given, both rescore them, each with weights of its
own, tuned on the dev list. The rules for the verdict are in :mod:`mixbits.pipeline.verdicts` and
:mod:`mixbits.pipeline.evidence`; here the figures are made, and what
was compared is written down: hashes of models, texts and lists, settings, seed.

The same inputs and seed give the same certificate, bit for bit, on the same machine: ``compared_sha256`` is its hash, over all but
``made_with`` (versions and paths). Limit: log-probabilities can differ in the last bits between machines and numbers of threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mixbits.asr.analysis import count_changes
from mixbits.asr.bootstrap import bootstrap_blocks
from mixbits.asr.formats.nbestfile import NBestFile
from mixbits.asr.formats.registry import read_any
from mixbits.asr.nbest import one_best_texts, reference_texts
from mixbits.asr.rescore import apply_weights
from mixbits.asr.weights import Weights, check_no_overlap
from mixbits.asr.wer import count_errors, sum_errors
from mixbits.errors import DataError, SpecError
from mixbits.jsonfile import plain
from mixbits.lm.corpus import TokenStream, encode_file
from mixbits.lm.perplexity import default_context, paired_difference, perplexity
from mixbits.pipeline.certified_models import model_facts
from mixbits.pipeline.checks import check_full_precision, check_text
from mixbits.pipeline.evaluate import load_scorer
from mixbits.pipeline.evidence import DEFAULT_MARGIN_NATS, NUM_DRAWS, list_evidence, perplexity_evidence, relative
from mixbits.pipeline.lm_scores import SpeechModel, unknown_share
from mixbits.pipeline.rescore import ScoreSettings, tune_system, weight_values
from mixbits.pipeline.speech_rows import FIRST_PASS, FIRST_PASS_TUNED, error_counts, list_facts
from mixbits.pipeline.verdicts import RULE, Evidence, Judgement, Verdict, check_alpha, judge, worst
from mixbits.runs import hash_file, hash_text, versions

FORMAT, FORMAT_VERSION = "mixbits-certificate", 1
FULL, PACKED = "full", "packed"
PERPLEXITY = "perplexity"
FEW = 50


def certify(
    full: str | Path,
    packed: str | Path,
    *,
    text: str | Path,
    dev: str | Path | None = None,
    lists: Sequence[str | Path] = (),
    margin_nats: float = DEFAULT_MARGIN_NATS,
    alpha: float = 0.05,
    context: int | None = None,
    stride: int | None = None,
    settings: ScoreSettings | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two model directories; plain data for a JSON file, see ``docs/certificate.md``.

    Args:
        packed: a packed model; a full-precision one is compared all the same, with ``packed: false`` and a warning.
        text: test text, one sentence a line. dev, lists: n-best lists with references; weights are tuned on ``dev`` for each system apart.
        margin_nats: largest perplexity increase that counts as none, in nats per token. alpha: level of every test and bound.
        context, stride: windows of the perplexity; the shorter context of the two models by default.

    Raises:
        DataError: a missing or broken input, ``full`` is quantized, other vocabularies or tokens, a list that shares utterances with ``dev`` or is
        given twice. FormatError: files that cannot be read. SpecError: lists without dev or the other way round; alpha, margin or windows
        that make no sense.
    """
    check_alpha(alpha)
    settings = settings or ScoreSettings(runtime="pytorch")
    perplexity_evidence(
        0.0, 0.0, 2, margin_nats=margin_nats, alpha=alpha
    )  # a margin that makes no sense is refused before the work
    dev_file, files = _read_lists(dev, lists)
    warnings: list[str] = []
    figures, stream, models = _perplexities(Path(full), Path(packed), text, context, stride, warnings)
    evidence = {PERPLEXITY: perplexity_evidence(*figures.pop("paired"), margin_nats=margin_nats, alpha=alpha)}
    parts = {PERPLEXITY: figures}
    rescored, weights = ({}, {}) if dev_file is None else _rescore(full, packed, dev_file, files, settings, seed)
    for name, outputs in rescored.items():
        evidence[_list_key(name)] = _list_evidence(files[name], outputs, alpha, seed)
        parts[_list_key(name)] = _list_part(files[name], outputs) | {
            "unknown_share": _unknown_share(full, files[name], settings)
        }
    judged = judge(evidence, alpha=alpha)
    parts = {key: _judged(part, evidence[key], judged[key]) for key, part in parts.items()}
    warnings += _few_warnings(parts)
    compared = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **_verdict(judged, alpha),
        "models": models,
        PERPLEXITY: parts[PERPLEXITY],
        "lists": {name: parts[_list_key(name)] for name in files},
        "warnings": warnings,
        "rule": RULE,
        "inputs": {
            "text_sha256": hash_file(text),
            "text_lines_sha256": stream.sha256,
            "dev_sha256": None if dev_file is None else dev_file.data_hash,
            "lists_sha256": {name: file.data_hash for name, file in files.items()},
        },
        "weights": weights,
        "settings": {
            "alpha": alpha,
            "margin_nats": margin_nats,
            "margin_ppl": relative(margin_nats),
            "lower_case": settings.lower_case,
            "max_tokens": settings.max_tokens,
            "scoring": settings.scoring,
            "runtime": settings.runtime,
            "bootstrap_draws": NUM_DRAWS,
        },
        "seed": seed,
    }
    compared = plain(compared)
    paths = {FULL: full, PACKED: packed, "text": text, "dev": dev, "lists": list(lists)}
    return compared | {
        "compared_sha256": compared_hash(compared),
        "made_with": plain({"versions": versions(), "paths": paths}),
    }


def compared_hash(certificate: Mapping[str, Any]) -> str:
    """sha256 over everything in a certificate but ``made_with`` and the hash itself."""
    part = {key: value for key, value in certificate.items() if key not in ("made_with", "compared_sha256")}
    return hash_text(json.dumps(part, sort_keys=True, ensure_ascii=False))


def _read_lists(dev: str | Path | None, lists: Sequence[str | Path]) -> tuple[NBestFile | None, dict[str, NBestFile]]:
    """Lists by file name (with a number where two share one), read and checked before anything is scored."""
    if (dev is None) != (not lists):
        given, missing = ("test lists", "a dev list") if dev is None else ("a dev list", "test lists")
        raise SpecError(
            f"got {given} without {missing}; give both: weights are tuned on dev, word errors counted on test lists"
        )
    if dev is None:
        return None, {}
    dev_file = read_any(dev)
    reference_texts(dev_file)
    tuned_on = Weights(dev_utterances=tuple(entry.utterance for entry in dev_file))
    files: dict[str, NBestFile] = {}
    for path in lists:
        file = read_any(path)
        reference_texts(file)
        check_no_overlap(tuned_on, file)
        if any(file.data_hash == other.data_hash for other in files.values()):
            raise DataError(f"{path}: is the same list as one given before; give each test list once")
        same = sum(Path(other.path).name == Path(path).name for other in files.values())
        files[Path(path).name + (f" ({same + 1})" if same else "")] = file
    return dev_file, files


def _perplexities(
    full: Path, packed: Path, text: str | Path, context: int | None, stride: int | None, warnings: list[str]
) -> tuple[dict[str, Any], TokenStream, dict[str, Any]]:
    """Figures of both models on one text (``paired``: difference, its standard error, number of sentences), tokens, model facts."""
    models, streams = {}, {}
    for name, path in ((FULL, full), (PACKED, packed)):
        models[name], tokenizer = load_scorer(path)
        if name == FULL:
            check_full_precision(models[FULL], full)
            vocabulary = tokenizer.get_vocab()
        elif tokenizer.get_vocab() != vocabulary:
            raise DataError(
                f"{full} and {packed} have different vocabularies; a certificate needs the same tokens for both"
            )
        streams[name] = encode_file(tokenizer, text)
    stream = streams[FULL]
    if not np.array_equal(stream.ids, streams[PACKED].ids):
        raise DataError(
            f"{full} and {packed} split {text} into different tokens, though their vocabularies are the same; use one tokenizer"
        )
    check_text(stream, 1, text)
    facts = model_facts(full, packed, models[FULL], stream.sha256, warnings)
    if context is None:
        context = min(default_context(model) for model in models.values())
    results = {name: perplexity(model, stream, context=context, stride=stride) for name, model in models.items()}
    delta, stderr = paired_difference(results[PACKED], results[FULL], stream)
    shared = ("num_tokens", "num_words", "num_unknown", "context", "stride")
    figures = {name: result.to_json() for name, result in results.items()}
    return (
        {key: figures[FULL][key] for key in shared}
        | {name: {key: found[key] for key in ("ppl", "ppl_stderr", "word_ppl", "nats", "nats_stderr")} for name, found in figures.items()}
        | {"paired": (delta, stderr, int(stream.sentence[-1]) + 1)},
        stream,
        facts,
    )  # fmt: skip


def _rescore(
    full: str | Path,
    packed: str | Path,
    dev: NBestFile,
    files: Mapping[str, NBestFile],
    settings: ScoreSettings,
    seed: int,
) -> tuple[dict[str, dict[str, list[str]]], dict[str, dict[str, float]]]:
    """(list → system → one-best texts, system → weights): every system tuned on dev apart, one model in memory at a time."""
    outputs = {name: {FIRST_PASS: one_best_texts(file)} for name, file in files.items()}
    weights = {}
    for system, path in ((FIRST_PASS_TUNED, None), (FULL, full), (PACKED, packed)):
        model = None if path is None else SpeechModel(path)
        found = tune_system(model, dev, settings=settings, seed=seed)
        weights[system] = weight_values(found)
        for name, file in files.items():
            lm = None if model is None else settings.score(model, file)
            outputs[name][system] = apply_weights(file, lm, found).one_best
    return outputs, weights


def _list_evidence(file: NBestFile, outputs: Mapping[str, Sequence[str]], alpha: float, seed: int) -> Evidence:
    return list_evidence(
        reference_texts(file),
        first_pass=outputs[FIRST_PASS],
        first_pass_tuned=outputs[FIRST_PASS_TUNED],
        full=outputs[FULL],
        packed=outputs[PACKED],
        blocks=bootstrap_blocks(file),
        alpha=alpha,
        seed=seed,
    )


def _list_part(file: NBestFile, outputs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Word errors of every system, what the list is, and what packed changed."""
    references = reference_texts(file)
    systems = {}
    for name, texts in outputs.items():
        errors = sum_errors(references, texts)
        systems[name] = {"wer": errors.wer, **error_counts(errors)}
    return {
        **list_facts(file),
        "systems": systems,
        "changed": changed_one_bests(references, outputs[FULL], outputs[PACKED]),
    }


def changed_one_bests(references: Sequence[str], full: Sequence[str], packed: Sequence[str]) -> dict[str, int]:
    """How many one-bests differ in words: ``changed`` = ``better`` + ``worse`` + ``same_errors`` of packed against full."""
    errors = [[count_errors(r, t).num_errors for r, t in zip(references, x, strict=True)] for x in (full, packed)]
    return asdict(count_changes(full, packed, *errors))


def _list_key(name: str) -> str:
    return f"list {name}"


def _unknown_share(full: str | Path, file: NBestFile, settings: ScoreSettings) -> float:
    return unknown_share(SpeechModel(full).tokenizer, reference_texts(file), lower_case=settings.lower_case)


def _judged(part: Mapping[str, Any], evidence: Evidence, judgement: Judgement) -> dict[str, Any]:
    facts = {"verdict": judgement.verdict, "reason": judgement.reason, **part, **evidence.figures}
    return facts | {"p_worse": evidence.p_worse, "p_worse_holm": judgement.p_holm}


def _verdict(judged: Mapping[str, Judgement], alpha: float) -> dict[str, Any]:
    """The overall verdict, one sentence of it, and the reasons of every part."""
    verdict: Verdict = worst([judgement.verdict for judgement in judged.values()])
    sentence = {
        "lossless": f"Lossless at alpha = {alpha:g}: not worse than full precision on anything tested, and that is proved within the margins.",
        "unresolved": f"Unresolved at alpha = {alpha:g}: these data neither show a loss nor prove that there is none.",
        "lossy": f"Lossy at alpha = {alpha:g}: significantly worse than full precision.",
    }[verdict]
    reasons = [f"{name}: {j.verdict}. {j.reason}." for name, j in judged.items()]
    return {"verdict": verdict, "sentence": sentence, "reasons": reasons}


def _few_warnings(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where normal approximations stand on little."""
    found = []
    for name, part in parts.items():
        what, key = ("sentences", "num_sentences") if name == PERPLEXITY else ("MAPSSWE segments", "mapsswe_segments")
        if part[key] < FEW:
            found.append(f"{name}: only {part[key]} {what}; below {FEW} tests and bounds are rough")
    return found
