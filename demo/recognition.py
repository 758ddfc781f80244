"""First-pass recognition with pocketsphinx: a trigram of the training text, and scored 20-best lists.

Scores. pocketsphinx counts in log base 1.0001 and drops the lowest 10 bits (`SENSCR_SHIFT` in hmm.h): an integer
score k stands for the natural log k · 2^10 · ln 1.0001. `Hypothesis.score` in Python is neither: it is
1.0001^k, so the natural log is 2^10 · ln(score), in steps of about 0.1 nats.
That score is the sum of the acoustic score and `bestpathlw` times the trigram score of `<s>`, of every word and of
`</s>` (ps_lattice.c, `ps_astar_start` and `path_extend`); with the word insertion penalty `wip` set to 1 there is
no further term. Hence acoustic = total − bestpathlw · (ln p(text) + ln p(<s>)), with a rounding error of at most
0.1 · bestpathlw / lw nats a word; penalties of silences and fillers stay in the acoustic part.

Order. The A* search behind `Decoder.nbest` uses a bigram look-ahead for a trigram, so paths do not come in the
order of their scores, and many differ only in silences or pronunciations. `nbest_list` reads a fixed number of
paths, keeps each text's best, and sorts.

Limits: words missing from the pronunciation dictionary are `<unk>` in the trigram and cannot be recognized.
The flat second pass is off: on the demo's data it takes half as long again for two to three points of word error rate.
"""

import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.arpa import ArpaModel, read_arpa
from mixbits.errors import DataError

SENONE_SCORE_SHIFT = 10
SEARCH_LM_SCALE = 8.0
"""`lw`: trigram weight of the tree search, which decides what is in the lattice."""
NBEST_LM_SCALE = 10.0
"""`bestpathlw`: trigram weight of the n-best list's total score."""
MAX_HYPOTHESES = 20
_MAX_PATHS = 400


@dataclass(frozen=True)
class ScoredText:
    """One hypothesis. Natural logs, higher is better: `acoustic_score` unscaled, `lm_score` of the trigram."""

    text: str
    acoustic_score: float
    lm_score: float

    @property
    def total_score(self) -> float:
        """What ranks the list: acoustic score + 10 · trigram score."""
        return self.acoustic_score + NBEST_LM_SCALE * self.lm_score


@dataclass(frozen=True)
class FirstPass:
    """Files of the first pass: an ARPA trigram and the pronunciations of its words."""

    arpa: Path
    dictionary: Path


def import_pocketsphinx() -> Any:
    """The pocketsphinx module, or a DataError that says what to install."""
    try:
        return importlib.import_module("pocketsphinx")
    except ImportError as error:
        raise DataError(
            "the demo recognizes its speech with pocketsphinx, which is not installed; run: pip install 'mixbits[demo]'"
        ) from error


def read_dictionary() -> dict[str, list[str]]:
    """The pronunciation dictionary in the pocketsphinx wheel (cmudict): word -> its lines, alternatives included."""
    path = Path(import_pocketsphinx().get_model_path()) / "en-us" / "cmudict-en-us.dict"
    lines_of: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line:
            word = re.sub(r"\(\d+\)$", "", line.split()[0])
            lines_of.setdefault(word, []).append(line)
    return lines_of


def build_first_pass(sentences: Iterable[str], dictionary: dict[str, list[str]], folder: Path) -> FirstPass:
    """Make the trigram with `pocketsphinx_lm -a` and the dictionary of its words; both go to `folder`.

    Words without a pronunciation become `<unk>`. Raises DataError when pocketsphinx's tool is missing or fails.
    """
    if importlib.util.find_spec("pocketsphinx.lm") is None:
        raise DataError(
            "this pocketsphinx has no pocketsphinx_lm tool; run: pip install 'mixbits[demo]' (5.1 or later)"
        )
    lines = [[word if word in dictionary else "<unk>" for word in sentence.split()] for sentence in sentences]
    vocabulary = sorted({word for line in lines for word in line} - {"<unk>"})
    if not vocabulary:
        raise DataError("the training text has no word of the pronunciation dictionary: no first pass can be built")
    first_pass = FirstPass(folder / "first_pass.arpa", folder / "first_pass.dict")
    text_path = folder / "first_pass.txt"
    text_path.write_text("".join(" ".join(line) + "\n" for line in lines), encoding="utf-8")
    first_pass.dictionary.write_text(
        "".join(f"{entry}\n" for word in vocabulary for entry in dictionary[word]), encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "pocketsphinx.lm",
        "-a",
        "-s",
        str(text_path),
        "-o",
        str(first_pass.arpa),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text_path.unlink()
    if done.returncode != 0 or not first_pass.arpa.is_file():
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"pocketsphinx_lm could not make the first-pass trigram (exit code {done.returncode}): {reason}"
        )
    return first_pass


def natural_log_score(score: float) -> float:
    """Natural log of a pocketsphinx `Hypothesis.score` (1.0001 to the power of an integer score, 10 bits dropped)."""
    if not 0.0 < score < math.inf:
        raise ValueError(f"a pocketsphinx score is a positive number, got {score!r}")
    return math.ldexp(math.log(score), SENONE_SCORE_SHIFT)


def nbest_list(paths: Iterable[tuple[str, float]], model: ArpaModel) -> list[ScoredText]:
    """Hypotheses from (text, combined natural-log score) paths: best path of each text, split in two scores, sorted.

    At most 20, best total first, ties in the order of the text. Scores are rounded to 4 decimals before they are
    sorted, so that the order in a file is the order of the numbers in it.
    """
    best: dict[str, float] = {}
    for text, total in paths:
        best[text] = max(total, best.get(text, -math.inf))
    start = model.word_score("<s>", ())
    scored = []
    for text, total in best.items():
        lm_score = model.sentence_score(text)
        acoustic_score = total - NBEST_LM_SCALE * (lm_score + start)
        scored.append(ScoredText(text, round(acoustic_score, 4), round(lm_score, 4)))
    scored.sort(key=lambda item: (-item.total_score, item.text))
    return scored[:MAX_HYPOTHESES]


class Recognizer:
    """A pocketsphinx decoder with its trigram.

    The noise estimate is forgotten before each utterance, but the acoustic model's fast-match lists are not, and
    they move scores by a few tenths of a nat: for results that do not depend on what was recognized before,
    call `restart` at fixed points (`demo.speech` does, every 25 utterances).
    """

    def __init__(self, first_pass: FirstPass, *, nbest_lm_scale: float = NBEST_LM_SCALE) -> None:
        self.model = read_arpa(first_pass.arpa)
        self._first_pass = first_pass
        self._nbest_lm_scale = nbest_lm_scale
        self.restart()

    def restart(self) -> None:
        """Make a fresh decoder (0.2 s); the trigram that splits the scores is kept."""
        pocketsphinx = import_pocketsphinx()
        self.decoder = pocketsphinx.Decoder(
            hmm=os.path.join(pocketsphinx.get_model_path(), "en-us", "en-us"),
            lm=str(self._first_pass.arpa),
            dict=str(self._first_pass.dictionary),
            lw=SEARCH_LM_SCALE,
            bestpathlw=self._nbest_lm_scale,
            wip=1.0,
            fwdflat=False,
            loglevel="FATAL",
        )

    def paths(self, samples: np.ndarray) -> list[tuple[str, float]]:
        """(text, combined natural-log score) of the first 400 paths through the lattice, in the decoder's order."""
        self.decoder.start_stream()  # forgets the noise estimate
        self.decoder.start_utt()
        self.decoder.process_raw(samples.astype("<i2").tobytes(), full_utt=True)
        self.decoder.end_utt()
        found: list[tuple[str, float]] = []
        for number, hypothesis in enumerate(self.decoder.nbest() or ()):
            if number >= _MAX_PATHS:
                break
            if hypothesis is not None and hypothesis.hypstr:
                found.append((hypothesis.hypstr, natural_log_score(hypothesis.score)))
        return found

    def recognize(self, samples: np.ndarray) -> list[ScoredText]:
        """The n-best list of int16 samples at 16 kHz; never empty (silence gives one empty hypothesis)."""
        found = nbest_list(self.paths(samples), self.model)
        return found or [ScoredText("", 0.0, self.model.sentence_score(""))]
