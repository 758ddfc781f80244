"""``mixbits rescore LIST --model DIR``: rescored n-best lists, word error rates, significance.

Where the weights come from: tuned on a dev list (``--dev``), a file of an earlier run (``--weights``), by hand (``--lm-scale``), or,
where there is no dev list, tuned on the other parts of LIST for each part (``--cross-validate``). No utterance is ever rescored with
weights that its own reference chose.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mixbits.cli.convert import OutputName
from mixbits.cli.outputs import check_outputs

if TYPE_CHECKING:
    from mixbits.asr.weights import Weights
    from mixbits.pipeline.rescore import RescoredList, ScoreSettings

_HOW_TO_WEIGH = (
    "how much should the language model count? Weights are tuned on a list with references that is not LIST: give --dev DEV_LIST, "
    "or --weights FILE from an earlier run (--save-weights), or set --lm-scale and --word-insertion-penalty by hand; without any other "
    "list: --cross-validate 5"
)


def main(
    nbest: Annotated[Path, typer.Argument(metavar="LIST", help="n-best lists, in any format that convert reads.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Model directory, full precision or packed.")],
    dev: Annotated[Path | None, typer.Option(help="Tune the weights on these lists (with references).")] = None,
    weights: Annotated[Path | None, typer.Option(help="Use the weights of an earlier run.")] = None,
    cross_validate: Annotated[
        int | None, typer.Option(min=2, help="No dev list: tune each of so many parts of LIST on the others.")
    ] = None,
    lm_scale: Annotated[float | None, typer.Option(help="By hand: weight of the model's log-probability.")] = None,
    first_pass_lm_scale: Annotated[
        float | None, typer.Option(help="By hand: weight of the lists' own lm_score (0 if not given).")
    ] = None,
    word_insertion_penalty: Annotated[
        float | None, typer.Option(help="By hand: added per word; a positive one favours long hypotheses.")
    ] = None,
    ngram_scale: Annotated[
        float | None, typer.Option(help="By hand: weight of --ngram's log-probability (log-linear).")
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="References of LIST: sclite trn, Kaldi text or a NeMo manifest.")
    ] = None,
    dev_references: Annotated[Path | None, typer.Option(help="References of --dev, likewise.")] = None,
    reference_model: Annotated[
        Path | None, typer.Option(help="Compare with this model, e.g. the full-precision one.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the rescored lists here (.gz, .xz).")
    ] = None,
    output_format: Annotated[
        OutputName | None, typer.Option("--output-format", help="Format of --output (default: by .jsonl, .tsv, .trn).")
    ] = None,
    save_weights: Annotated[Path | None, typer.Option(help="Write the weights here.")] = None,
    lower_case: Annotated[bool, typer.Option("--lower-case", help="Give the model the texts in lower case.")] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Model positions at once: less needs less memory.")] = 4096,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Score each hypothesis apart (slower; for models that need it).")
    ] = False,
    runtime: Annotated[
        Literal["auto", "int8", "float32", "pytorch"],
        typer.Option(
            help="auto: packed models that it can run on the native engine with 8-bit activations, others in PyTorch."
        ),
    ] = "auto",
    history: Annotated[
        Literal["none", "first-pass", "rescored", "reference"],
        typer.Option(help="Earlier utterances of the conversation as context; which text they have."),
    ] = "none",
    history_tokens: Annotated[int, typer.Option(min=1, help="At most so many last tokens of them.")] = 64,
    unknown_words: Annotated[
        Literal["penalty", "shared", "spelling"],
        typer.Option(help="Words outside the vocabulary: <unk> as it is, a share of it, or times their spelling."),
    ] = "penalty",
    unknown_types: Annotated[
        int | None, typer.Option(min=1, help="shared: how many distinct words <unk> stands for.")
    ] = None,
    merge_order: Annotated[
        int | None, typer.Option(min=1, help="Faster, not exact: histories equal in so many last tokens share a state.")
    ] = None,
    ngram: Annotated[Path | None, typer.Option(help="An n-gram model beside it, an ARPA file.")] = None,
    ngram_mode: Annotated[
        Literal["interpolate", "log-linear"],
        typer.Option(help="Mix the probabilities word by word, or give the n-gram's score a weight of its own."),
    ] = "interpolate",
    ngram_weight: Annotated[float, typer.Option(min=0, max=1, help="interpolate: the n-gram model's share.")] = 0.5,
    long_hypotheses: Annotated[
        Literal["refuse", "window"],
        typer.Option(help="Hypotheses longer than the model takes: an error that names them, or a sliding window."),
    ] = "refuse",
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Allow utterances that the weights were tuned on.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder to keep the model's scores in.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page: all systems compared, as `mixbits compare` does.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of tuning and bootstrap.")] = 0,
) -> None:
    """Rescore LIST with a language model; word error rates and significance where it has references.

    The rows: first pass (the file's order), first pass tuned (no language model; with --dev), oracle (the best
    hypothesis of each list), the reference model, the model. p: MAPSSWE, two-sided.
    """
    by_hand = (lm_scale, first_pass_lm_scale, word_insertion_penalty, ngram_scale)
    given = _given_weights(weights, dev, cross_validate, *by_hand)
    outputs = {"--output": output, "--save-weights": save_weights, "--json": json, "--report": report}
    check_outputs(outputs, {"LIST": nbest, "--references": references, "--dev-references": dev_references})

    _check_format(nbest, output, output_format)

    from mixbits.asr.formats.registry import write_rescored
    from mixbits.asr.kenlm_model import load_ngram
    from mixbits.pipeline.rescore import MODEL, ScoreSettings, rescore_list
    from mixbits.runs import write_json

    settings = ScoreSettings(
        lower_case=lower_case,
        max_tokens=max_tokens,
        scoring="one-by-one" if one_by_one else "trie",
        cache=cache,
        show_progress=sys.stderr.isatty(),
        runtime=runtime,
        merge_order=merge_order,
        long_hypotheses=long_hypotheses,
        unknown_policy=unknown_words,
        num_unknown_types=unknown_types,
        history=history,
        max_history_tokens=history_tokens,
        ngram=None if ngram is None else load_ngram(ngram),
        ngram_mode=ngram_mode,
        ngram_weight=ngram_weight,
    )
    result = rescore_list(
        nbest, model, weights=given, dev=dev, num_folds=cross_validate, reference_model=reference_model,
        references=references, dev_references=dev_references, settings=settings, allow_overlap=allow_overlap, keep_rankings=report is not None, seed=seed,
    )  # fmt: skip
    written, left_out = [], []
    if output is not None:
        left_out = write_rescored(output, result.lists, format=output_format)
        written.append(output)
    if save_weights is not None:
        result.weights[MODEL].save(save_weights)
        written.append(save_weights)
    if json is not None:
        sources = {"list": nbest, "references": references, "dev": dev, "dev_references": dev_references}
        sources |= {"model": model, "reference": reference_model, "ngram": ngram}
        write_json(json, _record(result, {k: str(v) for k, v in sources.items() if v is not None}, settings, seed))
        written.append(json)
    if report is not None:
        _write_report(
            report, result, nbest, model, reference_model, cross_validated=cross_validate is not None, seed=seed
        )
        written.append(report)
    _print(result, model, reference_model)
    for path in written:
        typer.echo(f"wrote {path}")
    if left_out:
        typer.echo(f"Note: {output} has no place for {', '.join(left_out)}.")


def _write_report(
    path: Path,
    result: RescoredList,
    source: Path,
    model: Path,
    reference_model: Path | None,
    *,
    cross_validated: bool,
    seed: int,
) -> None:
    from mixbits.pipeline.rescore_report import rescoring_comparison
    from mixbits.report.compare_page import render_comparison

    record = rescoring_comparison(result, source, model, reference_model, cross_validated=cross_validated, seed=seed)
    render_comparison(record, path, title=f"{source.name} rescored with {model.name or model.resolve().name}")


def _given_weights(
    path: Path | None,
    dev: Path | None,
    cross_validate: int | None,
    lm_scale: float | None,
    first_pass_lm_scale: float | None,
    word_insertion_penalty: float | None,
    ngram_scale: float | None,
) -> Weights | None:
    """Weights from a file or by hand; None when they are to be tuned. Raises SpecError unless there is exactly one source."""
    from mixbits.asr.weights import Weights, load_weights
    from mixbits.errors import SpecError

    hand = {
        "--lm-scale": lm_scale,
        "--first-pass-lm-scale": first_pass_lm_scale,
        "--word-insertion-penalty": word_insertion_penalty,
        "--ngram-scale": ngram_scale,
    }
    used = [name for name, value in hand.items() if value is not None]
    lists = (("--dev", dev), ("--weights", path), ("--cross-validate", cross_validate))
    sources = [name for name, value in lists if value is not None] + used[:1]
    if not sources:
        raise SpecError(_HOW_TO_WEIGH)
    if len(sources) > 1:
        raise SpecError(f"{' and '.join(sources)} exclude each other: weights come from one place")
    if used and lm_scale is None:
        raise SpecError(f"{used[0]} needs --lm-scale beside it: how much the language model counts")
    if path is not None:
        return load_weights(path)
    if dev is not None or cross_validate is not None:
        return None
    assert lm_scale is not None
    return Weights(
        first_pass_lm_scale=first_pass_lm_scale or 0.0,
        neural_lm_scale=lm_scale,
        word_insertion_penalty=word_insertion_penalty or 0.0,
        ngram_scale=ngram_scale or 0.0,
    )


def _check_format(nbest: Path, output: Path | None, output_format: OutputName | None) -> None:
    """Find out before an hour of scoring that the lists do not fit the format of the result."""
    if output is None:
        return
    from mixbits.asr.formats import registry

    chosen = registry.output_format(output, output_format)
    if chosen != "jsonl":
        lists = registry.read_any(nbest).lists
        registry.check_output(registry.rescored_view(lists, chosen)[0], chosen, path=output)


def _record(result: RescoredList, sources: dict[str, str], settings: ScoreSettings, seed: int) -> dict[str, Any]:
    from mixbits.pipeline.rescore import weight_values
    from mixbits.pipeline.speech_rows import NO_LOSS_RULE
    from mixbits.runs import versions

    lm = result.lm
    return {
        "format": "mixbits-rescoring",
        "format_version": 1,
        **sources,
        "hashes": {"list": result.data_hash, **{k: w.model_hash for k, w in result.weights.items() if w.model_hash}},
        "seed": seed,
        "lower_case": settings.lower_case,
        "rows": result.entries,
        "facts": result.facts,
        "weights": {name: weight_values(weights) for name, weights in result.weights.items()},
        "no_loss_rule": NO_LOSS_RULE,
        "scoring": {
            "hypotheses": len(lm.neural_lm_score),
            "tokens": int(lm.num_tokens.sum()),
            "distinct_prefixes": lm.num_nodes,
            "seconds": lm.seconds,
            "unknown_words": int(lm.num_unknown.sum()),
            "sliding_window": lm.num_windows,
            "runtime": settings.runtime,
            "unknown_policy": settings.unknown_policy,
            "history": settings.history,
            "max_history_tokens": settings.max_history_tokens if settings.history != "none" else None,
            "merge_order": settings.merge_order,
            "ngram_mode": None if settings.ngram is None else settings.ngram_mode,
            "ngram_weight": settings.ngram_weight if settings.ngram and settings.ngram_mode == "interpolate" else None,
        },
        "merging": result.merging,
        "notes": list(result.notes),
        "versions": versions(),
    }


def _print(result: RescoredList, model: Path, reference_model: Path | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(width=140, highlight=False, markup=False)
    labels = {"first-pass": "first pass", "first-pass-tuned": "first pass, tuned"}
    labels |= {"reference": f"{reference_model} (reference)", "model": str(model)}
    if result.entries is not None and result.facts is not None:
        title = f"{result.facts['utterances']:,} utterances, {result.facts['words']:,} words"
        table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        table.add_column("system", overflow="fold", min_width=16)
        for column in ("WER %", "sub", "del", "ins", "p (first pass)", *(["p (reference)"] if reference_model else [])):
            table.add_column(column, justify="right", no_wrap=True)
        rows = dict(result.entries)
        oracle = {"wer": result.facts["oracle_wer"], "errors": result.facts["oracle_errors"]}
        order = ["first-pass", "first-pass-tuned", "oracle", "reference", "model"]
        for name in order:
            entry = oracle if name == "oracle" else rows.get(name)
            if entry is not None:
                p_names = ("p_value_vs_first_pass", *(["p_value_vs_full"] if reference_model else []))
                p_values = [_p_text(entry.get(key)) for key in p_names]
                counts = [f"{entry['errors'][key]:,}" for key in ("sub", "del", "ins")]
                table.add_row(Text(labels.get(name, name)), f"{entry['wer']:.2f}", *counts, *p_values)
        console.print(table)
        console.print(f"Verdict: {result.entries['model']['significance']}", soft_wrap=True)
    for name, weights in result.weights.items():
        ngram = f", n-gram {weights.ngram_scale:.4g}" if weights.ngram_scale else ""
        scales = f"acoustic {weights.acoustic_scale:g}, first-pass LM {weights.first_pass_lm_scale:.4g}, "
        scales += f"language model {weights.neural_lm_scale:.4g}, per word {weights.word_insertion_penalty:+.4g}, "
        console.print(
            f"Weights, {labels[name]}: {scales}per unknown word {weights.unknown_word_penalty:+.4g}{ngram}",
            soft_wrap=True,
        )
    lm = result.lm
    console.print(
        f"Scored {len(lm.neural_lm_score):,} hypotheses, {int(lm.num_tokens.sum()):,} tokens in {lm.num_nodes:,} model positions "
        f"({lm.shared:.0%}), {lm.seconds:.1f} s; {int(lm.num_unknown.sum()):,} unknown words.",
        soft_wrap=True,
    )
    if lm.num_windows:
        console.print(
            f"{lm.num_windows:,} hypotheses were longer than the model takes: sliding window.", soft_wrap=True
        )
    if (merging := result.merging) is not None:
        console.print(
            f"Merged histories, against exact scores of {merging['lists']:,} lists ({merging['hypotheses']:,} hypotheses): "
            f"{merging['share_left']:.0%} of the model positions, scores off by {merging['mean_nats']:.3f} nats on average "
            f"(at most {merging['max_nats']:.2f}), {merging['changed']} one-bests changed.",
            soft_wrap=True,
        )
    for note in result.notes:
        console.print(f"Note: {note}", soft_wrap=True)


def _p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"
