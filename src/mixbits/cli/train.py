"""``mixbits train``: a language model from scratch on plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="Training text, one sentence a line (.gz and .xz too).")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Model directory to write.")],
    valid: Annotated[Path | None, typer.Option(help="Validation text; without it some sentences are held out.")] = None,
    preset: Annotated[str, typer.Option(help="paper (post-LayerNorm OPT) or llama.")] = "paper",
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 256,
    feed_forward: Annotated[int, typer.Option(help="Feed-forward size.")] = 1024,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    context: Annotated[int, typer.Option(help="Tokens of context.")] = 128,
    dropout: Annotated[float | None, typer.Option(help="Dropout (paper preset only).")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer directory; without it a word-level vocabulary is built.")
    ] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Most frequent words to keep.")] = None,
    min_count: Annotated[int, typer.Option(help="Drop words rarer than this.")] = 1,
    epochs: Annotated[float, typer.Option(help="Passes over the text.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Blocks of CONTEXT tokens a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    patience: Annotated[int | None, typer.Option(help="Stop after this many evaluations without gain.")] = None,
    precision: Annotated[str, typer.Option(help="auto (bfloat16 where it is fast), bfloat16 or float32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order and dropout.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
) -> None:
    """Train a language model from scratch on plain text, one sentence a line."""
    from mixbits.lm.presets import ModelSize
    from mixbits.lm.train_settings import TrainSettings
    from mixbits.pipeline.settings import Vocabulary, validate
    from mixbits.pipeline.train import train_from_text
    from mixbits.pipeline.workplace import work_folder

    size = {
        "preset": preset, "num_layers": layers, "hidden_size": hidden, "feed_forward_size": feed_forward,
        "num_heads": heads, "context": context, "dropout": dropout,
    }  # fmt: skip
    settings = {
        "epochs": epochs, "batch_size": batch_size, "context": context, "learning_rate": learning_rate,
        "patience": patience, "precision": precision, "seed": seed,
    }  # fmt: skip
    words = {"max_words": vocabulary, "min_count": min_count, "path": None if tokenizer is None else str(tokenizer)}
    try:
        record = train_from_text(
            text, output, valid=valid, resume=resume,
            size=validate(ModelSize, size, where="mixbits train"),
            settings=validate(TrainSettings, settings, where="mixbits train"),
            vocabulary=validate(Vocabulary, words, where="mixbits train"),
        )  # fmt: skip
    except KeyboardInterrupt:
        if work_folder(output).exists():
            typer.echo(
                f"interrupted; checkpoints are in {work_folder(output)}: run the same command with --resume to go on",
                err=True,
            )
        else:
            typer.echo("interrupted before the first checkpoint; nothing to resume from", err=True)
        raise
    typer.echo(
        f"wrote {output}: {record['num_parameters']:,} parameters, validation perplexity {record['valid_ppl']:.2f}"
    )
