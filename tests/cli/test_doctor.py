"""``mixbits doctor`` tells what is there, also when the compiled kernels are not."""

import json
import os
import subprocess
import sys

from mixbits.cli.main import main
from mixbits.kernels import cpu


def test_facts_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kernels"].startswith("missing") or (facts["instruction_set"], facts["usable"]) == (
        cpu.isa(),
        cpu.isas(),
    )
    assert facts["training_precision"] in ("float32", "bfloat16")


def test_table_names_the_instruction_set(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "training precision" in shown
    assert not cpu.is_available() or cpu.isa() in shown


def run(**environment):
    command = [sys.executable, "-m", "mixbits.cli", "doctor", "--json"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_missing_library_is_told(tmp_path):
    done = run(MIXBITS_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 0
    assert json.loads(done.stdout)["kernels"].startswith("missing, PyTorch is used, slower")


def test_an_instruction_set_that_is_not_there_is_one_clear_error():
    done = run(MIXBITS_ISA="sse9")
    if cpu.is_available():
        assert done.returncode == 2
        assert "MIXBITS_ISA is 'sse9'" in done.stderr
        assert "Traceback" not in done.stderr
