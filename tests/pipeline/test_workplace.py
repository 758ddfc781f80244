"""Work folders: one process at a time, whatever becomes of it; removed when there is nothing to come back to."""

import contextlib
import errno
import shutil
import signal
import subprocess
import sys

import pytest

import mixbits
from mixbits.cli.search import main as search
from mixbits.errors import DataError
from mixbits.lm.presets import ModelSize
from mixbits.lm.train_settings import TrainSettings
from mixbits.pipeline import workplace as module
from mixbits.pipeline.experiment import run_experiment
from mixbits.pipeline.quantize import quantize_model
from mixbits.pipeline.settings import ExperimentSettings, QuantizeSettings, Vocabulary
from mixbits.pipeline.train import train_from_text
from mixbits.pipeline.workplace import locked, work_folder, workplace

HOLDER = """
import sys
from pathlib import Path
from mixbits.pipeline.workplace import locked
with locked(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(module.fcntl is None, reason="this platform has no fcntl")
def test_another_process_is_refused_until_the_first_one_is_gone(tmp_path):
    folder = tmp_path / "deep" / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "ready\n"
        for _ in range(2):
            with pytest.raises(DataError, match=f"{folder}: another process is working in this folder; wait"):
                locked(folder).__enter__()
        with locked(tmp_path / "other"):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        with locked(folder):
            pass
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(module.fcntl is None, reason="this platform has no fcntl")
def test_a_folder_that_its_last_process_removed_is_not_taken(tmp_path, monkeypatch):
    flock = module.fcntl.flock

    def too_late(handle, how):
        shutil.rmtree(tmp_path / "run")
        flock(handle, how)

    monkeypatch.setattr(module.fcntl, "flock", too_late)
    with pytest.raises(DataError, match="another process"):
        locked(tmp_path / "run").__enter__()


def test_where_nothing_can_be_locked_nothing_is(tmp_path, monkeypatch):
    if module.fcntl is not None:

        def unsupported(handle, how):
            raise OSError(errno.ENOTSUP, "not supported")

        with monkeypatch.context() as patch:
            patch.setattr(module.fcntl, "flock", unsupported)
            with locked(tmp_path / "run"), locked(tmp_path / "run"):
                pass
    monkeypatch.setattr(module, "fcntl", None)
    with locked(tmp_path / "run"), locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("left", ["checkpoint-3", "codes.pt", "log.txt", None])
@pytest.mark.parametrize("others", [True, False])
def test_what_is_left_of_a_command(tmp_path, left, others):
    """Done: nothing. Failed: only what can be gone on from. What lies there of other settings stays."""
    output, key = tmp_path / "out", "0123456789abcdef-and-more"
    work = work_folder(output)
    if others:
        (work / "other").mkdir(parents=True)
    with contextlib.suppress(KeyboardInterrupt), workplace(output, key) as place:
        if left is not None:
            (place / "codes" / left).mkdir(parents=True)
        raise KeyboardInterrupt
    assert place == work / "0123456789abcdef"
    assert place.exists() == (left in ("checkpoint-3", "codes.pt"))
    assert work.exists() == (others or place.exists())
    with workplace(output, key) as place:
        place.mkdir(exist_ok=True)
    assert not place.exists()
    assert work.exists() == others


@pytest.mark.skipif(module.fcntl is None, reason="this platform has no fcntl")
@pytest.mark.parametrize("command", ["experiment", "train", "compress", "quantize", "search"])
def test_every_command_that_trains_locks_its_folder(command, trained, texts, tmp_path):
    """A second holder in this process is refused as one in another process is."""
    train, valid, output = texts / "train.txt", texts / "valid.txt", tmp_path / "out"
    files = {"train": str(train), "valid": str(valid), "test": str(texts / "test.txt")}
    size = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=32, num_heads=2, context=16)
    quick = TrainSettings(epochs=0.1, context=16, precision="float32")
    recipe = {"title": "t", "text": files, "model": size.model_dump(), "full": quick, "quantize": {"train": quick}}
    calls = {
        "experiment": lambda: run_experiment(
            ExperimentSettings.model_validate(recipe | {"rows": []}), output, show_progress=False
        ),
        "train": lambda: train_from_text(
            train, output, size=size, settings=quick, vocabulary=Vocabulary(), valid=valid, show_progress=False
        ),
        "compress": lambda: mixbits.compress(
            trained, text=train, valid=valid, output=output, max_bytes=4600, train=False, show_progress=False
        ),
        "quantize": lambda: quantize_model(
            trained, output, settings=QuantizeSettings(), spec="8", text=train, valid=valid, show_progress=False
        ),
        "search": lambda: search(trained, text=train, valid=valid, output=output, max_bytes=4600),
    }
    folder = output if command == "experiment" else work_folder(output)
    with locked(folder), pytest.raises(DataError, match=f"{folder}: another process is working in this folder"):
        calls[command]()
    assert list(folder.iterdir()) == []
    assert command == "experiment" or not output.exists()
