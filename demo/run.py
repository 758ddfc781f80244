"""``make demo``: the whole line on data made on the spot, in 10 to 25 minutes on two cores.

Text: Python's own documentation. Speech: held-out sentences spoken by espeak-ng and recognized by pocketsphinx with a
trigram of the training sentences. Then the recipe ``recipes/demo.yaml``: full precision, trained on, uniform bits and learned
bits; bytes, perplexity, word error rate and significance of each. Writes ``summary.json`` and ``report.html``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from mixbits import report
from mixbits.errors import MixbitsError

_RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"


def run(folder: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Prepare the data in ``folder``, run the recipe there, print the table, and return the report's path."""
    from demo.prepare import prepare
    from mixbits.pipeline.experiment import run_experiment
    from mixbits.pipeline.settings import load_experiment
    from mixbits.summary import read_summary

    console = Console(highlight=False, markup=False)
    start = time.monotonic()
    console.print("1/3  text and speech: Python's documentation, spoken and recognized")
    prepare(folder)
    os.environ["MIXBITS_DEMO"] = str(folder)
    console.print("2/3  language models: full precision, uniform bits, learned bits")
    summary = run_experiment(load_experiment(_RECIPE, overrides), folder, command="make demo")
    console.print("3/3  report\n")
    found = read_summary(summary)
    console.print(report.terminal_table(found))
    page = report.render([summary], folder / "report.html")
    console.print(f"\nwrote {summary} and {page} ({(time.monotonic() - start) / 60:.1f} minutes)", soft_wrap=True)
    return page


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description="The main job on data made on the spot.")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/demo"), help="run folder (default runs/demo)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of recipes/demo.yaml to change")
    arguments = parser.parse_args()
    try:
        run(arguments.output, tuple(arguments.overrides))
    except MixbitsError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
