"""The ``mixbits`` command: finds the subcommand, runs it, and turns mixbits errors into one line and an exit code.

How to add a command
--------------------
1. Write ``mixbits/cli/<name>.py`` with one typed function ``main(...)`` whose parameters are ``typing.Annotated`` types with
   ``typer.Argument`` / ``typer.Option``, and whose docstring is the command's help. Import heavy things (torch,
   transformers, scipy, matplotlib, and mixbits modules that need them) inside the function::

       def main(model: Annotated[Path, typer.Argument(help="Model directory.")], ratio: float = 16.0) -> None:
           '''Compress MODEL to a fraction of its size.'''
           from mixbits.pipeline.compress import compress

2. Add its name and one help line to :data:`COMMANDS` below.
3. Test it through :func:`main`: ``assert main(["<name>", "--ratio", "16"]) == 0``.

Errors: raise :class:`mixbits.errors.MixbitsError`; the user sees ``mixbits: error: …`` on stderr and exit code 2, no
traceback (``MIXBITS_DEBUG=1`` shows it). A system error on a file is shown the same way. Ctrl-C exits with 130, quietly.

Why this way: the list of commands is a plain table, and a command's module is imported only when that command runs, so
``mixbits --help`` stays fast. Only typer's public interface is used. Limit: options before the command's name are those
of ``mixbits`` itself (``--help``, ``--version``).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from mixbits import __version__
from mixbits.errors import MixbitsError

COMMANDS: dict[str, str] = {
    "train": "Train a language model from scratch on plain text.",
    "evaluate": "Perplexity of a model, alone or against a reference model.",
    "measure": "Measure how sensitive each unit is to quantization.",
    "search": "Learn bits per unit by training all candidates at once.",
    "allocate": "Choose bits per unit under an exact byte budget.",
    "quantize": "Train a model quantized, with given bits per unit.",
    "compress": "Measure, allocate, quantize, pack: a small model comes out.",
    "inspect": "Show the tensors, bits and bytes of a packed model.",
    "verify": "Check every file of a packed model, checksums included.",
    "archive": "Compress a packed model's files without loss, for keeping.",
    "unarchive": "Unpack an archived model to the very same files.",
    "convert": "Convert n-best lists from one format to another.",
    "lint": "Look for what is wrong in n-best lists.",
    "ngram": "Estimate an n-gram model (ARPA file) from plain text.",
    "rescore": "Rescore n-best lists; word error rates and significance.",
    "rescore-lattice": "Rescore lattices (Kaldi, HTK SLF), the error certified.",
    "compare": "Compare outputs: errors, tests, examples, one page.",
    "certify": "Is a packed model lossless? A verdict with its evidence.",
    "report": "Show result files as a table and as one HTML page.",
    "doctor": "Show what this machine and installation offer.",
    "experiment": "Run a recipe: full, uniform and learned systems compared.",
}
_SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False}


def load_command(name: str) -> Callable[..., Any]:
    """The function behind a command, from ``mixbits.cli.<name>``. Raises MixbitsError if it is not installed."""
    module_name = f"mixbits.cli.{name.replace('-', '_')}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == module_name:
            raise MixbitsError(f"command {name!r} is not part of this version of mixbits ({__version__})") from None
        raise MixbitsError(
            f"command {name!r} needs the Python package {error.name!r}, which is not installed; "
            f"install it, e.g. with: pip install {error.name}"
        ) from None
    function: Callable[..., Any] = module.main
    return function


def command_app(name: str) -> typer.Typer:
    """A typer app holding just the command ``name``."""
    app = typer.Typer(**_SETTINGS)
    app.command(name)(load_command(name))
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mixbits {__version__}")
        raise typer.Exit()


def root_app() -> typer.Typer:
    """The app behind ``mixbits --help``: every command with its help line, nothing imported."""
    app = typer.Typer(no_args_is_help=True, **_SETTINGS)

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        """Learn how many bits each layer of a language model needs, train it so, pack it, rescore speech with it."""

    def placeholder() -> None:
        raise MixbitsError("options of mixbits itself cannot stand before a command; try: mixbits --help")

    for name, text in COMMANDS.items():
        app.command(name, help=text)(placeholder)
    return app


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        where = error.filename2 if error.filename2 is not None else error.filename
        text = f"{os.fsdecode(where)}: {error.strerror}; check the path, its permissions and the space on the disk"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mixbits`` with these arguments (default: the process's own). Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in COMMANDS:
            name = arguments.pop(0)
            app, program = command_app(name), f"mixbits {name}"
        else:
            app, program = root_app(), "mixbits"
        typer.main.get_command(app)(args=arguments, prog_name=program)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except (MixbitsError, OSError) as error:
        is_system_error = isinstance(error, OSError) and error.errno is not None
        if os.environ.get("MIXBITS_DEBUG") or not (isinstance(error, MixbitsError) or is_system_error):
            raise
        print(f"mixbits: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0
