"""The command line's promises: fast help, one line per error, exit codes, and real option parsing for lazy commands."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import pytest
import typer

import mixbits
from mixbits.cli import main as cli
from mixbits.errors import DataError, FormatError, SpecError

HELP_SECONDS = 0.5
"""Promised in the README; measured as the best of several runs, since other work may share the machine."""


@pytest.fixture
def command(monkeypatch):
    """Put a function behind the command ``train``."""

    def install(function):
        monkeypatch.setattr(cli, "load_command", lambda name: function)

    return install


def test_help_is_fast_and_names_every_command_on_one_line():
    best, output = float("inf"), ""
    for _ in range(5):
        start = time.perf_counter()
        output = subprocess.run(
            [sys.executable, "-m", "mixbits.cli", "--help"], capture_output=True, text=True, check=True
        ).stdout
        best = min(best, time.perf_counter() - start)
        if best < HELP_SECONDS:
            break
    for name, text in cli.COMMANDS.items():
        assert any(name in line and text in line for line in output.splitlines()), name
    assert best < HELP_SECONDS


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mixbits.cli.main import main; assert main(['--help']) == 0;"
        "print('heavy:', sorted({'torch', 'transformers', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "heavy: []" in output


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mixbits {mixbits.__version__}\n"


def test_unknown_command_and_no_command(capsys):
    assert cli.main(["tran"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_a_command_gets_full_option_parsing_and_help(command, capsys):
    seen = {}

    def main(model: Path, ratio: Annotated[float, typer.Option(help="Times smaller.")] = 16.0) -> None:
        """Compress MODEL."""
        seen.update(model=model, ratio=ratio)

    command(main)
    assert cli.main(["train", "some/model", "--ratio", "8"]) == 0
    assert seen == {"model": Path("some/model"), "ratio": 8.0}
    assert cli.main(["train", "--help"]) == 0
    output = capsys.readouterr().out
    assert "mixbits train" in output
    assert "Compress MODEL." in output
    assert "--ratio" in output
    assert "Times smaller." in output
    assert cli.main(["train", "some/model", "--ratio", "many"]) == 2
    assert "ratio" in capsys.readouterr().err
    assert cli.main(["train"]) == 2
    assert cli.main(["train", "some/model", "--no-such-option"]) == 2


@pytest.mark.parametrize("error", [SpecError, FormatError, DataError])
def test_a_mixbits_error_is_one_line_and_exit_code_2(command, capsys, error):
    def main() -> None:
        raise error("train.txt: empty;\nexpected \x1b[31mone sentence a line")

    command(main)
    assert cli.main(["train"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "mixbits: error: train.txt: empty; expected \ufffd[31mone sentence a line\n"


def test_a_system_error_on_a_file_is_one_line(command, capsys, tmp_path):
    def main() -> None:
        (tmp_path / "gone").read_bytes()

    command(main)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.startswith(f"mixbits: error: {tmp_path / 'gone'}: No such file")


def test_a_system_error_names_the_target_not_the_temporary_file(command, capsys, tmp_path):
    def main() -> None:
        (tmp_path / "target").mkdir()
        (tmp_path / ".target.tmp").touch()
        (tmp_path / ".target.tmp").replace(tmp_path / "target")

    command(main)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.startswith(f"mixbits: error: {tmp_path / 'target'}: Is a directory; check")


def test_debug_shows_the_traceback(command, monkeypatch):
    def main() -> None:
        raise DataError("x")

    command(main)
    monkeypatch.setenv("MIXBITS_DEBUG", "1")
    with pytest.raises(DataError):
        cli.main(["train"])


def test_a_bug_of_ours_is_not_dressed_up_as_a_user_error(command):
    def main() -> None:
        raise ZeroDivisionError

    command(main)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_ctrl_c_exits_with_130_quietly(command, capsys):
    def main() -> None:
        raise KeyboardInterrupt

    command(main)
    assert cli.main(["train"]) == 130
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_missing_command_module_or_package_fails_only_when_invoked(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "nosuch", "Nothing.")
    assert cli.main(["--help"]) == 0
    assert cli.main(["nosuch"]) == 2
    assert "'nosuch' is not part of this version" in capsys.readouterr().err

    def broken(name):
        raise ModuleNotFoundError("No module named 'rare_package'", name="rare_package")

    monkeypatch.setattr(cli.importlib, "import_module", broken)
    assert cli.main(["train"]) == 2
    assert "needs the Python package 'rare_package'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in cli.COMMANDS if (Path(cli.__file__).parent / f"{n}.py").exists()])
def test_every_command_that_exists_has_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"mixbits {name}" in capsys.readouterr().out
