"""The asr package stays pure: importing all of it brings in no model library."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys, mixbits.asr
names = [m.name for m in pkgutil.walk_packages(mixbits.asr.__path__, "mixbits.asr.")]
for name in names:
    importlib.import_module(name)
assert "mixbits.asr.rescore" in names and "mixbits.asr.formats.jsonl" in names, names
heavy = {"torch", "transformers", "matplotlib", "rich"} & set(sys.modules)
assert not heavy, heavy
siblings = [m for m in sys.modules if m.startswith(("mixbits.lm", "mixbits.quant", "mixbits.packing"))]
assert not siblings, siblings
"""


def test_no_heavy_imports() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
