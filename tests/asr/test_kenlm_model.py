"""KenLM's Python package, where it is installed, against our own model; without it, what is said."""

from __future__ import annotations

import importlib
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixbits.asr.formats.arpa import read_arpa
from mixbits.asr.kenlm_model import KenlmModel, load_ngram
from mixbits.asr.ngram import BackoffModel
from mixbits.errors import DataError, FormatError, KernelUnavailable

DATA = os.environ.get("MIXBITS_DATA")
FILES = ["arpa/kenlm_test.arpa", "arpa/kenlm_test_nounk.arpa", "arpa/kenlm_toy0.arpa", "arpa/an4.trigramlm.arpa",
         "lattices/kaldi_weather/lm.arpa"]  # fmt: skip
TINY = """\\data\\
ngram 1=3
ngram 2=1

\\1-grams:
-0.5\t</s>
-99\t<s>\t-0.1
-0.7\ta\t-0.2

\\2-grams:
-0.3\t<s> a

\\end\\
"""


@pytest.fixture
def installed() -> None:
    pytest.importorskip("kenlm", reason="kenlm is not installed: pip install kenlm")


@pytest.mark.usefixtures("installed")
@pytest.mark.skipif(DATA is None, reason="MIXBITS_DATA is not set: no ARPA files")
@pytest.mark.parametrize("source", FILES)
def test_the_same_numbers(source: str) -> None:
    ours = read_arpa(f"{DATA}/{source}")
    theirs = load_ngram(f"{DATA}/{source}", engine="kenlm")
    assert isinstance(theirs, KenlmModel)
    assert (theirs.order, theirs.has_unknown) == (ours.order, ours.has_unknown)
    rng = random.Random(0)
    words = [*ours.words, "never_seen", "<s>", "</s>", "<unk>"]
    context = np.divmod(ours.tables[-1].keys, len(ours.words))[1]
    sentences = [[rng.choice(words) for _ in range(rng.randrange(12))] for _ in range(200)]
    sentences += [[ours.words[i] for i in context[rng.randrange(len(context)) :][:8]] for _ in range(100)]
    middle = [word for word in words if word != "<s>"]
    given = [
        [rng.choice(["<s>", "never_seen", *middle[:5]]), *rng.choices(middle, k=rng.randrange(4))] for _ in sentences
    ]
    for histories in (None, given, [[] for _ in sentences]):
        mine = ours.score(sentences, histories=histories)
        other = theirs.score(sentences, histories=histories)
        assert np.allclose(mine.log_p, other.log_p, rtol=2e-6, atol=2e-5)
        assert np.array_equal(mine.is_unknown, other.is_unknown)
        assert np.array_equal(mine.offsets, other.offsets)
    assert [word in ours for word in words] == [word in theirs for word in words]


@pytest.mark.usefixtures("installed")
def test_auto_takes_kenlm_and_bad_files_get_our_error(tmp_path: Path) -> None:
    path = tmp_path / "m.arpa"
    path.write_text(TINY)
    assert isinstance(load_ngram(path), KenlmModel)
    path.write_text(TINY.replace("-0.7", "-0.7x"))
    with pytest.raises(FormatError, match=r"m\.arpa:8: .*is no 1-gram"):
        load_ngram(path)
    with pytest.raises(FormatError, match="KenLM cannot read it"):
        load_ngram(path, engine="kenlm")
    with pytest.raises(DataError, match="no such file"):
        load_ngram(tmp_path / "none.arpa")


def test_without_kenlm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.arpa"
    path.write_text(TINY)

    def refuse(name: str, package: str | None = None) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert isinstance(load_ngram(path), BackoffModel)
    assert isinstance(load_ngram(path, engine="numpy"), BackoffModel)
    with pytest.raises(KernelUnavailable, match="pip install kenlm"):
        load_ngram(path, engine="kenlm")
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    with pytest.raises(FormatError, match="install kenlm"):
        load_ngram(path)
