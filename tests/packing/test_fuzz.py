"""A short run of ``benchmarks/fuzz_packed.py``: some thousand damaged models, and the fuzzer itself finds what it should."""

import importlib.util
import sys
from pathlib import Path

import pytest

from mixbits.errors import FormatError

_path = Path(__file__).parents[2] / "benchmarks" / "fuzz_packed.py"
if not _path.exists():
    pytest.skip("benchmarks are not part of the source distribution", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("fuzz_packed", _path)
fuzz_packed = importlib.util.module_from_spec(_spec)
sys.modules["fuzz_packed"] = fuzz_packed  # where dataclasses look for their module
_spec.loader.exec_module(fuzz_packed)


def test_damaged_models_are_read_or_refused(tmp_path):
    found = fuzz_packed.fuzz(range(2000), 1, tmp_path)
    assert not found["failures"]
    assert found["outcomes"]["FormatError"] > 1500
    assert found["outcomes"]["read"] > 100
    assert sum(found["outcomes"].values()) == found["cases"] == 2000
    assert len(found["outcomes_by_damage"]) > 12
    assert set(found["outcomes"]) <= {"read", "read, refused by the model", "FormatError", "DataError"}


def test_a_case_depends_on_its_number_alone(tmp_path):
    bases = [fuzz_packed.Base.of(fuzz_packed.GOLDEN / "v2", tmp_path / name) for name in ("v2", "v2-part")]
    cases = [fuzz_packed.make_case(bases, 3, number) for number in range(30)]
    assert cases == [fuzz_packed.make_case(bases, 3, number) for number in range(30)]
    assert len({str(case) for case in cases}) == 30


def test_the_fuzzer_finds_what_it_looks_for(tmp_path, monkeypatch):
    base = fuzz_packed.Base.of(fuzz_packed.GOLDEN / "v2", tmp_path / "v2")
    assert fuzz_packed.outcome(base, "", against_model=True) == "read"
    base.tensors = {name: bytes(len(data)) for name, data in base.tensors.items()}
    with pytest.raises(AssertionError, match="other tensors, unnoticed"):
        fuzz_packed.outcome(base, "", against_model=False)

    def raising(error):
        def verify(folder):
            raise error

        monkeypatch.setattr(fuzz_packed, "verify_packed", verify)

    for error in (KeyError("x"), MemoryError(), RecursionError()):
        raising(error)
        with pytest.raises(type(error)):
            fuzz_packed.outcome(base, "", against_model=False)
    raising(FormatError("something is wrong somewhere"))
    with pytest.raises(AssertionError, match="no file is named"):
        fuzz_packed.outcome(base, "", against_model=False)
    raising(FormatError(f"{base.folder}: wrong"))
    assert fuzz_packed.outcome(base, "", against_model=False) == "FormatError"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set on Linux only")
def test_memory_is_limited_and_given_back():
    with fuzz_packed.limited_memory(64 << 20), pytest.raises(MemoryError):
        bytearray(256 << 20)
    assert len(bytearray(256 << 20)) == 256 << 20
