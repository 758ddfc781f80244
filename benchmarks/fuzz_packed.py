"""Damaged packed models, a million of them: each is read without complaint or refused with FormatError or DataError.

Every case damages one file of a small model (tests/packing/golden: both format versions, split, archived; nine times in ten a part
of it, which is faster) and verifies the model.
Nothing else may come of it: no other exception, no allocation beyond a limit on the address space, no case that takes seconds.
What is read without complaint must be harmless: with checksums the very bytes of the undamaged tensors; without (version 1, or
damage with a checksum made to fit) finite numbers and codes that are levels. Some of those also have to pass or fail clearly when their
names and ties are held against the model itself.

    python benchmarks/fuzz_packed.py [--cases 1000000] [--seed 0] [--jobs 1] [--only 1234]

Writes results/fuzz_packed.json. A case is made from the seed and its number alone; ``--only`` repeats one and shows its traceback.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixbits.errors import DataError, FormatError
from mixbits.packing.archive import archive_packed, unarchive_packed
from mixbits.packing.bitpack import code_histogram
from mixbits.packing.verify import PackedUnits, verify_packed
from mixbits.packing.weightset import WeightSet, read_weights, write_weights
from mixbits.runs import read_json, versions, write_json
from mixbits.spec import MAX_SHARD_BYTES

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "packing" / "golden"
MEMORY_BYTES = 512 << 20
CASE_SECONDS = 10.0
PART_CASES = 10_000
WHOLE_SHARE = 0.1
MODEL_EVERY = 40
"""Whole models read without complaint between two that are also held against the model."""
PART = ("embed_tokens", "v_proj", "q_proj", "fc1.", "k_proj.bias")
JSON_BYTES = b'0123456789[]{},:"-.eE \\'
ODD_VALUES: list[Any] = [
    *(0, -1, 1, 2, 7, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 1 << 64, 10**40, 0.5, 2.0, 1e308, -0.0),
    *(None, True, False, "", "x", "0", "U8", "F16", "F32", "\ud800", "é" * 50, "a" * 5000, [], {}, [[]], {"a": {}}),
    *([0], [1 << 62], [1 << 40, 1 << 40], [-1, 5], [0, 1 << 63], [1] * 9, [0, 0], [True, 1]),
]
ODD_SPECS = [
    *(
        "2-half-step-g0",
        "2-half-step-g1",
        "2-half-step-g65536",
        "2-half-step-g65537-s8",
        "2-half-step-g99999999999",
        "16-s8",
    ),
    *(
        "0.5-product-v0",
        "8-product-v1",
        "0.125-product-v64",
        "1.58-half-step-row",
        "nan",
        "inf",
        "-1",
        "1e400",
        "2-tensor",
        "4",
        "3",
    ),
]


def flip_bits(data: bytearray, rng: random.Random) -> None:
    """One to three bits anywhere."""
    for _ in range(rng.randint(1, 3)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def edit_bytes(data: bytearray, rng: random.Random) -> None:
    """Bytes replaced, removed, inserted, repeated, mostly near the beginning, mostly by what JSON is made of."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 600) + 1)
        some = (
            bytes(rng.choice(JSON_BYTES) for _ in range(rng.randint(1, 4))) if rng.random() < 0.7 else rng.randbytes(3)
        )
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + len(some)] = some
        elif kind == 1:
            del data[at : at + rng.choice((1, 2, 5, 100))]
        elif kind == 2:
            data[at:at] = some
        else:
            data[at:at] = data[at : at + rng.choice((1, 8, 64, 500))]


def cut_or_extend(data: bytearray, rng: random.Random) -> None:
    """The end is missing, or something follows it."""
    if rng.random() < 0.7:
        del data[rng.randrange(len(data) + 1) :]
    else:
        data += rng.choice((b"\0", bytes(data[:100]), rng.randbytes(rng.randint(1, 200)), b" " * 64))


def absurd_length(data: bytearray, rng: random.Random) -> None:
    """The header's length field."""
    (length,) = struct.unpack("<Q", data[:8])
    odd = (
        0,
        1,
        length - 1,
        length + 1,
        length + 64,
        len(data),
        len(data) - 8,
        1 << 32,
        1 << 62,
        1 << 63,
        (1 << 64) - 1,
    )
    data[:8] = struct.pack("<Q", max(0, rng.choice((*odd, rng.getrandbits(64), rng.getrandbits(16)))))


def edit_json(value: Any, rng: random.Random) -> Any:
    """A value somewhere in a JSON tree replaced, removed, renamed, or swapped with another."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            places.append((node, key))
            walk(child)

    walk(value)
    for _ in range(rng.randint(1, 2)):
        node, key = rng.choice(places)
        other, other_key = rng.choice(places)
        try:
            kind = rng.randrange(5)
            if kind == 0:
                node[key] = rng.choice(ODD_VALUES)
            elif kind == 1:
                del node[key]
            elif kind == 2 and isinstance(node, dict):
                node[rng.choice((str(key) + "x", str(other_key), "", "model.decoder.layers.0.fc1.weight"))] = node.pop(
                    key
                )
            elif kind == 3:
                node[key] = json.loads(json.dumps(other[other_key]))
            elif isinstance(node[key], int):
                node[key] += rng.choice((-1, 1, 8, -8, 1 << 20, -(1 << 20)))
        except (KeyError, IndexError):
            continue  # an earlier edit took it away
    return value


def _dump(value: Any, rng: random.Random) -> bytes:
    if rng.random() < 0.01:
        depth = rng.choice((100, 3000, 100_000))
        return b"[" * depth + b"]" * depth
    return json.dumps(value).encode("utf-8", "backslashreplace")


def edit_header(data: bytearray, rng: random.Random) -> None:
    """A field of the header, with its length made to fit."""
    (length,) = struct.unpack("<Q", data[:8])
    text = _dump(edit_json(json.loads(data[8 : 8 + length]), rng), rng)
    data[:] = struct.pack("<Q", len(text)) + text + data[8 + length :]


def edit_config(data: bytearray, rng: random.Random) -> None:
    """A field of ``quantization_config``: anything, or just the ones that matter: spec, shape, tie, version, checksum."""
    config = json.loads(data)
    found = config["quantization_config"]
    units = found["units"]
    name, kind = rng.choice(sorted(units)), rng.randrange(8)
    if kind == 0:
        units[name]["spec"] = rng.choice(ODD_SPECS)
    elif kind == 1:
        units[name]["tied"] = [
            rng.choice(("missing", "", name, "lm_head", "model.decoder.layers.0.fc1", "model.decoder"))
        ]
    elif kind == 2:
        units[name][rng.choice(("rows", "cols"))] = rng.choice(ODD_VALUES)
    elif kind == 3:
        found["format_version"] = rng.choice((0, 1, 2, 3, -1, 1 << 70, "1", None, True, 1.0))
    elif kind == 4:
        units[name + "2"] = units.pop(name)
    else:
        edit_json(found, rng)
    data[:] = _dump(config, rng)


def edit_index(data: bytearray, rng: random.Random) -> None:
    """A field of the index of shards."""
    data[:] = _dump(edit_json(json.loads(data), rng), rng)


def repack(data: bytearray, rng: random.Random) -> None:
    """What an archive holds, damaged and archived again: gzip itself finds nothing wrong."""
    inner = bytearray(zlib.decompress(bytes(data), 31))
    if rng.random() < 0.02:
        inner = bytearray(rng.choice((1 << 17, 1 << 20)))  # far more than an archive may hold
    else:
        rng.choice((flip_bits, edit_bytes, cut_or_extend, absurd_length, edit_header))(inner, rng)
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    data[:] = packer.compress(bytes(inner)) + packer.flush()


Damage = Callable[[bytearray, random.Random], None]
DAMAGE: dict[str, list[Damage]] = {
    "weights": [flip_bits, edit_bytes, cut_or_extend, absurd_length, edit_header, edit_header],
    "archive": [flip_bits, edit_bytes, cut_or_extend, repack, repack],
    "config": [flip_bits, edit_bytes, cut_or_extend, edit_config, edit_config, edit_config],
    "index": [flip_bits, edit_bytes, cut_or_extend, edit_index, edit_index],
}


def _role(name: str) -> str:
    if name == "config.json":
        return "config"
    return "index" if name.endswith(".json") else "archive" if name.endswith(".gz") else "weights"


def spoil_values(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """NaN, infinite, negative or random numbers and codes in one tensor, and a checksum that fits them."""
    weights = rng.choice([name for name in files if _role(name) == "weights"])
    data, config = bytearray(files[weights]), json.loads(files["config.json"])
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensor = rng.choice(sorted(set(header) - {"__metadata__"}))
    begin, end = (8 + length + offset for offset in header[tensor]["data_offsets"])
    values = (
        b"\x00\x7e",
        b"\x00\x7c",
        b"\x00\xfc",
        b"\x00\x80",
        b"\x01\x80",
        b"\xff\xff",
        b"\x00\x00",
        b"\xf3\xf2",
        rng.randbytes(2),
    )
    at = begin + rng.randrange(end - begin) // 2 * 2
    data[at : min(at + 2, end)] = rng.choice(values)[: end - at]
    sums = config["quantization_config"].get("checksums")
    if sums is not None:
        sums[tensor] = f"{zlib.crc32(data[begin:end]):08x}"
    return {weights: bytes(data), "config.json": json.dumps(config).encode()}


@dataclass
class Base:
    """An undamaged model in a folder of its own: its files, and its tensors' bytes."""

    folder: Path
    files: dict[str, bytes]
    is_whole: bool
    tensors: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, golden: Path, folder: Path) -> Base:
        """A copy of ``golden`` in ``folder``; only of some units and tensors if the folder's name ends in 'part'."""
        shutil.copytree(golden, folder)
        is_whole = not folder.name.endswith("part")
        if not is_whole:
            keep_part(folder)
        base = cls(folder, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}, is_whole)
        weights, _ = verify_packed(folder)
        reader = weights.reader()
        base.tensors = {t.name: reader.raw(t).tobytes() for t in weights.tensors}
        return base


def keep_part(folder: Path) -> None:
    """Leave only the units and tensors of :data:`PART`, consistently. The result is no model, but its files are good."""
    config = read_json(folder / "config.json")
    found = config["quantization_config"]
    found["units"] = {n: u for n, u in found["units"].items() if any(part in f"{n}." for part in PART)}
    is_archived, is_split = "archive" in found, (folder / "model.safetensors.index.json").exists()
    if is_archived:
        unarchive_packed(folder)
    weights = read_weights(folder)
    stored = [t for t in weights.tensors if any(part in t.name for part in PART)]
    reader = weights.reader()
    tensors = {t.name: reader.tensor(t) for t in stored}
    written = write_weights(folder, stored, tensors, max_shard_bytes=1000 if is_split else MAX_SHARD_BYTES)
    if "checksums" in found:
        found["checksums"] = written.checksums
    found.pop("archive", None)
    write_json(folder / "config.json", config)
    if is_archived:
        archive_packed(folder)


def make_case(bases: list[Base], seed: int, number: int) -> tuple[Base, str, dict[str, bytes]]:
    """(model, name of the damage, the files that differ) of one case."""
    rng = random.Random(f"{seed}-{number}")
    is_whole = rng.random() < WHOLE_SHARE
    base = rng.choice([base for base in bases if base.is_whole == is_whole])
    if rng.random() < 0.1 and any(_role(name) == "weights" for name in base.files):
        return base, "spoil_values", spoil_values(base.files, rng)
    name = rng.choice(sorted(base.files))
    data, damage = bytearray(base.files[name]), rng.choice(DAMAGE[_role(name)])
    damage(data, rng)
    return base, f"{damage.__name__} in {_role(name)}", {name: bytes(data)}


def check_clean(base: Base, weights: WeightSet, packed: PackedUnits, damage: str) -> None:
    """What was read without complaint is harmless: raises AssertionError."""
    reader = weights.reader()
    if packed.checksums is not None and damage != "spoil_values":
        assert {t.name: reader.raw(t).tobytes() for t in weights.tensors} == base.tensors, "other tensors, unnoticed"
        return
    for tensor in weights.tensors:
        if tensor.dtype == "F16":
            assert bool(np.isfinite(reader.array(tensor)).all()), "numbers that are not finite"
    for unit in packed.units:
        spec = packed.specs[unit.name]
        if spec.is_quantized:
            count = spec.num_codes(unit.rows, unit.cols)
            histogram = code_histogram(reader.raw(weights.by_name[unit.weight]), spec, count)
            assert int(histogram.sum()) == count, "codes that are no level"


def outcome(base: Base, damage: str, *, against_model: bool) -> str:
    """Verify the model as it lies in its folder. Any exception but FormatError and DataError is passed on."""
    try:
        weights, packed = verify_packed(base.folder)
    except (FormatError, DataError) as error:
        if str(base.folder) not in str(error):
            raise AssertionError(f"no file is named: {error}") from None
        return type(error).__name__
    check_clean(base, weights, packed, damage)
    if against_model:
        from mixbits.hf import check_model

        try:
            check_model(base.folder, weights, packed)
        except FormatError:
            return "read, refused by the model"
    return "read"


@contextmanager
def limited_memory(num_bytes: int) -> Any:
    """The address space may grow by so much, no more; nothing where the system has no such limit."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(cases: range, seed: int, folder: Path) -> dict[str, Any]:
    """Run these cases in ``folder`` (an empty one, best in memory). Returns counts and the first failures."""
    import mixbits.hf  # noqa: F401  before memory is limited

    names = [golden.name + kind for golden in sorted(GOLDEN.iterdir()) for kind in ("", "-part")]
    bases = [Base.of(GOLDEN / name.removesuffix("-part"), folder / name) for name in names]
    counts: Counter[str] = Counter()
    by_damage: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    slowest, num_read, begin = 0.0, 0, time.process_time()
    for base in bases:
        outcome(base, "", against_model=base.is_whole)
    with limited_memory(MEMORY_BYTES):
        for number in cases:
            base, damage, changed = make_case(bases, seed, number)
            for name, data in changed.items():
                (base.folder / name).write_bytes(data)
            started = time.perf_counter()
            try:
                found = outcome(base, damage, against_model=base.is_whole and num_read % MODEL_EVERY == 0)
            except Exception as error:
                found = f"other: {type(error).__name__}"
                if len(failures) < 20:
                    failures.append({"case": number, "damage": damage, "traceback": traceback.format_exc()[-2000:]})
            took = time.perf_counter() - started
            if took > CASE_SECONDS:
                failures.append({"case": number, "damage": damage, "seconds": took})
            slowest, num_read = max(slowest, took), num_read + (base.is_whole and found.startswith("read"))
            counts[found] += 1
            by_damage.setdefault(damage, Counter())[found] += 1
            for name in changed:
                (base.folder / name).write_bytes(base.files[name])
    return {
        "cases": len(cases),
        "outcomes": counts,
        "outcomes_by_damage": by_damage,
        "failures": failures,
        "slowest_case_seconds": slowest,
        "cpu_seconds": time.process_time() - begin,
    }


def merge(total: dict[str, Any], part: dict[str, Any]) -> None:
    """Add the counts of ``part`` to ``total``."""
    for key in ("cases", "cpu_seconds"):
        total[key] += part[key]
    total["outcomes"].update(part["outcomes"])
    for damage, found in part["outcomes_by_damage"].items():
        total["outcomes_by_damage"].setdefault(damage, Counter()).update(found)
    total["failures"] = (total["failures"] + part["failures"])[:20]
    total["slowest_case_seconds"] = max(total["slowest_case_seconds"], part["slowest_case_seconds"])


def run_part(cases: range, seed: int) -> dict[str, Any]:
    """:func:`fuzz` in a folder of its own, in memory where there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        return fuzz(cases, seed, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", type=int, help="repeat one case")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "fuzz_packed.json")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(run_part(range(arguments.only, arguments.only + 1), arguments.seed), indent=1))
        return 0
    total: dict[str, Any] = {"title": "Damaged packed models", "cases": 0, "seed": arguments.seed, "cpu_seconds": 0.0}
    total |= {"outcomes": Counter(), "outcomes_by_damage": {}, "failures": [], "slowest_case_seconds": 0.0}
    total |= {"address_space_growth_limit_bytes": MEMORY_BYTES, "versions": versions()}
    parts = [range(begin, min(begin + PART_CASES, arguments.cases)) for begin in range(0, arguments.cases, PART_CASES)]
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_part, part, arguments.seed) for part in parts]):
            merge(total, done.result())
            write_json(arguments.output, total)  # what there is so far
            print(f"{total['cases']:,} cases, {dict(total['outcomes'])}, {len(total['failures'])} failures", flush=True)
    print(json.dumps(total["failures"], indent=1))
    return 1 if total["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
