"""Damaged lattice files, hundreds of thousands: each is read without complaint or refused with FormatError.

A case damages the bytes of one small lattice file (made here; with MIXBITS_DATA also the smallest real ones) and reads them with the
reader of its format. Nothing else may come of it: no other exception, no allocation beyond a limit on the address space, no case that takes
seconds. What is read without complaint must be sound: its best path has a finite score.

    python benchmarks/fuzz_lattices.py [--cases 100000] [--seed 0] [--only 1234 --reader kaldi-binary-compact]

``--cases`` is for each binary reader; text readers get half. Writes results/fuzz_lattices.json. A case is made from the seed, the reader and
its number alone; ``--only`` repeats one and shows its traceback.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mixbits.asr.formats.bytesource import ByteSource
from mixbits.asr.formats.kaldi_lattice import KaldiKind, read_kaldi_lattices, read_kaldi_stream, write_kaldi_lattices
from mixbits.asr.formats.slf import read_slf_stream
from mixbits.asr.formats.slf_write import slf_lines
from mixbits.asr.lattice import Lattice, PathWeights, TransitionIds, make_lattice
from mixbits.asr.lattice_paths import best_path
from mixbits.errors import FormatError
from mixbits.runs import versions, write_json

ROOT = Path(__file__).resolve().parent.parent
MEMORY_BYTES = 256 << 20
CASE_SECONDS = 5.0
MAX_BASE_BYTES = 6000
READERS = ("kaldi-binary-compact", "kaldi-binary-plain", "kaldi-text", "slf")
ODD_INTEGERS = (0, 1, -1, 2, 7, 255, 1 << 15, 1 << 20, 1 << 22, (1 << 31) - 1, -(1 << 31))
ODD_REALS = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 3e38, 1e-40)
TEXT_BITS = (
    *(
        b"\t",
        b" ",
        b"\n",
        b"\r\n",
        b"\n\n",
        b",",
        b"_",
        b"-1",
        b"0",
        b"99999999999",
        b"1e400",
        b"nan",
        b"Infinity",
        b"<eps>",
        b"!NULL",
    ),
    *(
        b"J=",
        b"I=",
        b"S=",
        b"E=",
        b"L=9",
        b"N=0",
        b"W=",
        b'"',
        b"'",
        b"\\",
        b"\\303",
        b"base=0",
        b"start=1",
        b"end=0",
        b"#",
        b"=",
        b"\xff",
    ),
)


def toy(name: str, ids: bool, plain: bool = False) -> Lattice:
    """Six states, parallel arcs, an arc without a word, two finals."""
    counts = np.array([1, 0, 1, 1, 1, 0, 1, 0, 0] if plain else [2, 0, 3, 1, 1, 0, 2, 1, 0])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return make_lattice(
        utterance=name, src=[0, 0, 1, 2, 3, 3, 1], dst=[1, 2, 3, 3, 4, 5, 5], word=[1, 2, 0, 3, 4, 1, 5], labels=["", "1", "5", "77", "300", "9999"],
        lm_score=[-1.25, -2.5, 0, -0.5, -3, -1, -2], acoustic_score=[-10.5, -9, -2, -1, -0.25, -7, 3], num_states=6, start=0, finals=[4, 5],
        final_lm_score=[-0.5, 0], final_acoustic_score=[0, -1.5], state_times=np.array([0, 0.1, 0.2, 0.5, 0.75, 1.0]),
        other={"p": np.linspace(0.1, 0.7, 7)}, weights=PathWeights(1, 12, -0.5),
        transition_ids=TransitionIds(offsets, np.arange(1, offsets[-1] + 1, dtype=np.int32)) if ids else None,
    )  # fmt: skip


def bases() -> dict[str, list[bytes]]:
    """Undamaged files by reader."""
    found: dict[str, list[bytes]] = {reader: [] for reader in READERS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"

        def written(lattices: list[Lattice], kind: KaldiKind) -> bytes:
            write_kaldi_lattices(path, lattices, kind=kind)
            return path.read_bytes()

        for ids in (True, False):
            for precision in ("float32", "float64"):
                compact = [toy("utt-1", ids), toy("utt-2", ids)]
                plain = [toy("utt-1", ids, plain=True)]
                found["kaldi-binary-compact"].append(written(compact, KaldiKind(True, True, precision)))
                found["kaldi-binary-plain"].append(written(plain, KaldiKind(False, True, precision)))
            found["kaldi-text"] += [written(compact, KaldiKind(True, False)), written(plain, KaldiKind(False, False))]
    found["slf"] = [b"".join(slf_lines(toy("utt-1", False)))]
    nodes = b'VERSION=1.0\nbase=10\nlmscale=2 wdpenalty=-1\nN=4 L=4\nI=0 t=0 W=!NULL\nI=1 t=.5 W=\'em v=2\nI=2 W="a b" v=1\nI=3 W=!NULL\n'
    found["slf"].append(
        nodes + b"J=0 S=0 E=1 a=-1 l=-2\nJ=1 S=0 E=2 a=-2 l=-1 i=-1,-2\nJ=2 S=1 E=3 a=0\nJ=3 S=2 E=3 n=-1\n"
    )
    if "MIXBITS_DATA" in os.environ:
        add_real(found, Path(os.environ["MIXBITS_DATA"]) / "lattices")
    return found


def add_real(found: dict[str, list[bytes]], folder: Path) -> None:
    """The smallest lattices of the real data, so far as they are small."""
    from mixbits.asr.formats.kaldi_binary import binary_lattice
    from mixbits.asr.formats.slf import read_slf

    for archive in sorted(folder.glob("kaldi_weather/*/lat.*.gz"))[:8]:
        for lattice in read_kaldi_lattices(archive):
            data = b"".join(binary_lattice(lattice, KaldiKind(), None))
            if len(data) <= MAX_BASE_BYTES:
                found["kaldi-binary-compact"].append(data)
    for path in (folder / "toy").glob("*.lat"):
        found["kaldi-text"].append(path.read_bytes())
    for path in [*(folder / "toy").glob("*.slf"), *(folder / "ami_en2001a_mit" / "htk_slf").glob("*ES2011a*.lat.gz")]:
        found["slf"].append(path.read_bytes() if path.suffix == ".slf" else b"".join(slf_lines(read_slf(path))))


def flip_bits(data: bytearray, rng: random.Random) -> None:
    """One to three bits anywhere."""
    for _ in range(rng.randint(1, 3)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def edit_bytes(data: bytearray, rng: random.Random) -> None:
    """Bytes replaced, removed, inserted, repeated."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            some = rng.randbytes(rng.randint(1, 8))
            data[at : at + len(some)] = some
        elif kind == 1:
            del data[at : at + rng.choice((1, 2, 4, 20, 100))]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            data[at:at] = data[at : at + rng.choice((1, 4, 20, 100))]


def cut_or_extend(data: bytearray, rng: random.Random) -> None:
    """The end is missing, or something follows it."""
    if rng.random() < 0.7:
        del data[rng.randrange(len(data) + 1) :]
    else:
        data += rng.choice((b"\0", bytes(data), bytes(data[:50]), rng.randbytes(rng.randint(1, 50)), b" " * 64))


def odd_numbers(data: bytearray, rng: random.Random) -> None:
    """Integers, lengths, counts and costs replaced by absurd ones, mostly where such numbers stand."""
    for _ in range(rng.randint(1, 2)):
        kind = rng.randrange(4)
        some = (
            struct.pack("<i", rng.choice(ODD_INTEGERS)) if kind == 0
            else struct.pack("<q", rng.choice((*ODD_INTEGERS, 1 << 40, 1 << 62, -(1 << 63)))) if kind == 1
            else struct.pack("<f", rng.choice(ODD_REALS)) if kind == 2
            else struct.pack("<d", rng.choice(ODD_REALS))
        )  # fmt: skip
        start = data.find(b"\xd6\xfd\xb2\x7e")
        aligned = start + rng.randrange(max(1, (len(data) - start) // 2)) * 2
        at = aligned if rng.random() < 0.7 else rng.randrange(len(data) + 1)
        data[at : at + len(some)] = some


def odd_text(data: bytearray, rng: random.Random) -> None:
    """A field of a line replaced, doubled or removed; lines moved."""
    lines = bytes(data).split(b"\n")
    for _ in range(rng.randint(1, 2)):
        row = rng.randrange(len(lines))
        fields = lines[row].split() or [b""]
        kind, place = rng.randrange(5), rng.randrange(len(fields))
        if kind == 0:
            fields[place] = rng.choice(TEXT_BITS)
        elif kind == 1:
            fields[place] += rng.choice(TEXT_BITS)
        elif kind == 2:
            fields.insert(place, rng.choice(TEXT_BITS))
        elif kind == 3:
            del fields[place]
        else:
            lines.insert(rng.randrange(len(lines)), lines[row])
            continue
        lines[row] = b" ".join(fields)
    data[:] = b"\n".join(lines)


Damage = Callable[[bytearray, random.Random], None]
BINARY_DAMAGE: list[Damage] = [flip_bits, edit_bytes, cut_or_extend, odd_numbers, odd_numbers]
TEXT_DAMAGE: list[Damage] = [flip_bits, edit_bytes, cut_or_extend, odd_text, odd_text, odd_text]


def make_case(files: list[bytes], reader: str, seed: int, number: int) -> tuple[str, bytes]:
    """(name of the damage, damaged bytes)."""
    rng = random.Random(f"{seed}-{reader}-{number}")
    damage = rng.choice(BINARY_DAMAGE if reader.startswith("kaldi-binary") else TEXT_DAMAGE)
    data = bytearray(rng.choice(files))
    damage(data, rng)
    return damage.__name__, bytes(data)


def read(reader: str, data: bytes, drop: bool) -> str:
    """``read`` or ``FormatError``; anything else is raised."""
    source = ByteSource(io.BytesIO(data), "case")
    dead_ends: Any = "drop" if drop else "error"
    try:
        if reader == "slf":
            lattices = [read_slf_stream(source, dead_ends=dead_ends)]
        else:
            lattices = [lattice for lattice, _ in read_kaldi_stream(source, dead_ends=dead_ends)]
    except FormatError as error:
        if len(str(error)) > 600 or not str(error).startswith("case"):
            raise AssertionError(f"an error without a place or without an end: {str(error)[:700]}") from error
        return "FormatError"
    if not all(math.isfinite(best_path(lattice).total_score) for lattice in lattices):
        raise AssertionError("a best path without a finite score")
    return "read"


def limit_memory() -> None:
    """Bound the address space to what is used now and :data:`MEMORY_BYTES`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz(reader: str, files: list[bytes], cases: range, seed: int) -> dict[str, Any]:
    """Counts of outcomes, and what should not have happened."""
    outcomes: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    begin, slowest = time.process_time(), 0.0
    for number in cases:
        damage, data = make_case(files, reader, seed, number)
        started = time.process_time()
        try:
            found = read(reader, data, drop=number % 2 == 1)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found = f"other: {type(error).__name__}"
            if len(failures) < 20:
                failures.append(
                    {"reader": reader, "case": number, "damage": damage, "traceback": traceback.format_exc()[-2000:]}
                )
        took = time.process_time() - started
        slowest = max(slowest, took)
        if took > CASE_SECONDS:
            failures.append({"reader": reader, "case": number, "damage": damage, "seconds": took})
        outcomes.setdefault(damage, Counter())[found] += 1
    total: Counter[str] = sum(outcomes.values(), Counter())
    return {
        "cases": len(cases), "files": len(files), "outcomes": total, "outcomes_by_damage": outcomes, "failures": failures,
        "slowest_case_cpu_seconds": slowest, "cpu_seconds": time.process_time() - begin,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS)
    parser.add_argument("--only", type=int, help="repeat one case of --reader")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "fuzz_lattices.json")
    arguments = parser.parse_args()
    files = bases()
    for reader in READERS:
        for data in files[reader]:
            if read(reader, data, drop=False) != "read":
                raise SystemExit(f"{reader}: an undamaged file is refused")
    limit_memory()
    if arguments.only is not None:
        print(
            json.dumps(
                fuzz(
                    arguments.reader, files[arguments.reader], range(arguments.only, arguments.only + 1), arguments.seed
                ),
                indent=1,
            )
        )
        return 0
    record: dict[str, Any] = {"title": "Damaged lattice files", "seed": arguments.seed, "readers": {}}
    record |= {"address_space_growth_limit_bytes": MEMORY_BYTES, "versions": versions()}
    num_failures = 0
    for reader in READERS:
        count = arguments.cases if reader.startswith("kaldi-binary") else arguments.cases // 2
        found = fuzz(reader, files[reader], range(count), arguments.seed)
        record["readers"][reader] = found
        num_failures += len(found["failures"])
        write_json(arguments.output, record)
        print(
            f"{reader}: {count:,} cases, {dict(found['outcomes'])}, {len(found['failures'])} failures, {found['cpu_seconds']:.0f} s",
            flush=True,
        )
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
