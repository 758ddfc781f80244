"""`python -m demo.prepare -o runs/demo`: make the demo's text and speech lists, once.

Writes train.txt, valid.txt, test.txt (one sentence a line), speech/dev.jsonl and speech/test.jsonl (n-best lists),
speech/first_pass.arpa and .dict (the recognizer's trigram), and manifest.json: per stage a fingerprint of
everything it depends on (settings, seed, Python and package versions, the demo's own source, the stage before),
and counts and SHA-256 of its files. A stage whose fingerprint and files still match is skipped. Files are written
under a temporary name and the manifest last, so an interrupted run leaves nothing that looks complete.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from demo.documents import documents
from demo.recognition import NBEST_LM_SCALE, build_first_pass, read_dictionary
from demo.speech import nbest_lines, speak_and_recognize, utterances
from demo.text import documentation_sentences, split_sentences
from mixbits.errors import DataError, MixbitsError

FORMAT_VERSION = 1
SOURCES = ("arpa", "documents", "recognition", "speech", "synthesis", "text")
"""Modules of this package whose source decides the data; a change in one makes the data anew."""
PACKAGES = ("pocketsphinx", "espeakng-loader", "numpy", "scipy")


@dataclass(frozen=True)
class Settings:
    """How much to make. The numbers of spoken sentences are upper limits; the text gives about 1,000."""

    num_dev: int = 250
    num_test: int = 450
    seed: int = 0
    max_documents: int | None = None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise DataError(f"the demo needs the package {package}; run: pip install 'mixbits[demo]'") from error
    return found


def _fingerprint(*parts: Any) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    digest.update(json.dumps([FORMAT_VERSION, *parts], sort_keys=True).encode())
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _describe(root: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    described = {}
    for name in names:
        content = (root / name).read_bytes()
        described[name] = {"sha256": hashlib.sha256(content).hexdigest(), "num_lines": content.count(b"\n")}
        if name.endswith(".txt"):
            described[name]["num_words"] = len(content.split())
    return described


def _is_complete(root: Path, stage: dict[str, Any] | None, fingerprint: str) -> bool:
    if not stage or stage.get("fingerprint") != fingerprint:
        return False
    files = stage.get("files", {})
    return all((root / name).is_file() for name in files) and files == _describe(root, list(files))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("format_version") == FORMAT_VERSION else {}


def _make_text(root: Path, settings: Settings) -> list[str]:
    dictionary = read_dictionary()
    found = islice(documents(), settings.max_documents)
    num_speech = settings.num_dev + settings.num_test
    split = split_sentences(
        documentation_sentences(found), frozenset(dictionary), num_speech=num_speech, seed=settings.seed
    )
    if len(split.speech) < 2 or not split.train or not split.valid or not split.test:
        raise DataError(
            f"Python's documentation gave too little text: {len(split.train)} training sentences, {len(split.speech)} to speak"
        )
    num_dev = max(1, len(split.speech) * settings.num_dev // num_speech)
    parts = {
        "train.txt": split.train,
        "valid.txt": split.valid,
        "test.txt": split.test,
        "speech/dev.txt": split.speech[:num_dev],
        "speech/test.txt": split.speech[num_dev:],
    }
    for name, sentences in parts.items():
        _write(root / name, "".join(f"{sentence}\n" for sentence in sentences))
    return list(parts)


def _make_speech(root: Path, settings: Settings, *, num_processes: int) -> list[str]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    lines = {
        name: (root / name).read_text(encoding="utf-8").splitlines()
        for name in ("train.txt", "speech/dev.txt", "speech/test.txt")
    }
    dev = utterances("dev", lines["speech/dev.txt"])
    test = utterances("test", lines["speech/test.txt"])
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("trigram", total=len(dev) + len(test))
        first_pass = build_first_pass(lines["train.txt"], read_dictionary(), root / "speech")
        results = speak_and_recognize(
            dev + test,
            first_pass,
            seed=settings.seed,
            num_processes=num_processes,
            progress=lambda stage, done: bar.update(task, description=stage, completed=done),
        )
    _write(root / "speech/dev.jsonl", nbest_lines(dev, results[: len(dev)]))
    _write(root / "speech/test.jsonl", nbest_lines(test, results[len(dev) :]))
    return [f"speech/{name}" for name in ("dev.jsonl", "test.jsonl", "first_pass.arpa", "first_pass.dict")]


def prepare(root: Path, settings: Settings | None = None, *, num_processes: int | None = None) -> dict[str, Any]:
    """Make what is missing under `root` and return the manifest (also in `root/manifest.json`).

    Raises DataError when a package of the `demo` extra is missing, with the command that installs it.
    """
    settings = settings or Settings()
    if settings.num_dev < 1 or settings.num_test < 1:
        raise DataError(f"num_dev and num_test must be at least 1, got {settings.num_dev} and {settings.num_test}")
    if num_processes is None:
        num_processes = min(
            8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
    versions = _versions()
    (root / "speech").mkdir(parents=True, exist_ok=True)
    manifest_path = root / "manifest.json"
    stages: dict[str, Any] = _read_manifest(manifest_path).get("stages", {})
    previous = ""
    for name, make in (
        ("text", lambda: _make_text(root, settings)),
        ("speech", lambda: _make_speech(root, settings, num_processes=num_processes)),
    ):
        fingerprint = _fingerprint(name, asdict(settings), versions, previous)
        if not _is_complete(root, stages.get(name), fingerprint):
            started = time.perf_counter()
            files = _describe(root, make())
            stages[name] = {
                "fingerprint": fingerprint,
                "seconds": round(time.perf_counter() - started, 1),
                "files": files,
            }
            if name == "text":
                stages.pop("speech", None)
            document = {
                "format_version": FORMAT_VERSION,
                "settings": asdict(settings),
                "versions": versions,
                "first_pass_scales": {"acoustic_scale": 1.0, "lm_scale": NBEST_LM_SCALE},
                "complete": name == "speech",
                "stages": stages,
            }
            _write(manifest_path, json.dumps(document, indent=2) + "\n")
        previous = json.dumps(stages[name]["files"], sort_keys=True)
    return _read_manifest(manifest_path)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code (2 with one line on stderr for what the user can fix)."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.prepare", description="Make the demo's text and n-best lists."
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--num-dev", type=int, default=Settings.num_dev, help="spoken sentences to tune on")
    parser.add_argument("--num-test", type=int, default=Settings.num_test, help="spoken sentences to report on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=None, help="recognizers in parallel (default: all processors)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        settings = Settings(options.num_dev, options.num_test, options.seed)
        manifest = prepare(options.output, settings, num_processes=options.processes)
    except (MixbitsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for stage in manifest["stages"].values():
        for name, entry in stage["files"].items():
            print(f"{options.output / name}: {entry['num_lines']:,} lines")
    print(f"demo data ready in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
