"""Hashes against hashlib's known values, versions against importlib and git."""

import hashlib
import os
import subprocess
import sys
from importlib import metadata

import pytest

from mixbits import runs
from mixbits.errors import DataError


def test_hashes_agree_with_the_published_sha256_of_abc(tmp_path):
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a").write_bytes(b"abc")
    assert runs.hash_text("abc") == runs.hash_file(tmp_path / "a") == expected


def test_hash_file_reads_more_than_one_block(tmp_path):
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "big").write_bytes(data)
    assert runs.hash_file(tmp_path / "big") == hashlib.sha256(data).hexdigest()


def test_hash_files_names_files_and_tells_equal_names_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.txt").write_text(folder)
    one = runs.hash_files([tmp_path / "x" / "train.txt"])
    two = runs.hash_files([tmp_path / "x" / "train.txt", tmp_path / "y" / "train.txt"])
    assert one == {"train.txt": runs.hash_text("x")}
    assert two == {"x/train.txt": runs.hash_text("x"), "y/train.txt": runs.hash_text("y")}
    assert runs.hash_files({"train": tmp_path / "y" / "train.txt"}) == {"train": runs.hash_text("y")}


def test_hash_of_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="nothing-here"):
        runs.hash_file(tmp_path / "nothing-here")


def test_versions_agree_with_the_installed_packages():
    found = runs.versions()
    assert found["numpy"] == metadata.version("numpy")
    assert found["python"] == sys.version.split()[0]
    assert found["num_cores"] >= 1
    assert found["num_threads"] >= 1
    assert found["cpu"]
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40


def test_runs_imports_nothing_heavy():
    code = "import mixbits.runs as r, sys; r.versions(); print(sorted({'torch','transformers','numpy'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
