"""n-gram model files through KenLM's Python package where it is installed: less memory, its binary files, the same numbers.

KenLM holds 32-bit floats, so its scores agree with :class:`mixbits.asr.ngram.BackoffModel`'s to about 1e-6 relative; its ``ngram_length`` also counts n-grams that it fills
in because longer ones end in them. What it cannot read (xz, long
n-grams, damaged files) goes to our own reader, which reads it or says what is wrong with it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mixbits.asr.formats.arpa import read_arpa
from mixbits.asr.ngram import BEGIN, END, LN10, MISSING_UNKNOWN_LOG10, UNKNOWN, NgramModel, NgramScores
from mixbits.errors import DataError, FormatError, KernelUnavailable

NgramEngine = Literal["auto", "numpy", "kenlm"]
_ROUNDING = 1e-3


def load_ngram(path: str | os.PathLike[str], *, engine: NgramEngine = "auto") -> NgramModel:
    """Read an n-gram model file. ``auto``: with KenLM where it is installed and reads the file, else our own reader.

    Raises:
        FormatError, DataError: as :func:`mixbits.asr.formats.arpa.read_arpa`. KernelUnavailable: KenLM is asked for and not installed.
    """
    if engine == "numpy":
        return read_arpa(path)
    try:
        importlib.import_module("kenlm")
    except ImportError:
        if engine == "kenlm":
            raise KernelUnavailable(
                "kenlm is not installed; install it (pip install kenlm) or use engine numpy"
            ) from None
        return read_arpa(path)
    if not os.path.isfile(path):
        raise DataError(f"{os.fspath(path)}: no such file; expected an ARPA or KenLM binary n-gram file")
    try:
        return KenlmModel(path)
    except FormatError:
        if engine == "kenlm":
            raise
        return read_arpa(path)


class KenlmModel:
    """An ARPA or KenLM binary file read by KenLM; scores as :class:`mixbits.asr.ngram.BackoffModel` does.

    Raises:
        FormatError: KenLM cannot read it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._kenlm: Any = importlib.import_module("kenlm")
        self._name = os.fspath(path)
        config = self._kenlm.Config()
        config.show_progress = False
        config.arpa_complain = self._kenlm.ARPALoadComplain.NONE
        try:
            self._model = self._kenlm.Model(self._name, config)
        except (OSError, RuntimeError) as error:
            raise FormatError(f"{self._name}: KenLM cannot read it: {' '.join(str(error).split())[:300]}") from error
        self.order: int = self._model.order
        nothing, after = self._kenlm.State(), self._kenlm.State()
        self._model.NullContextWrite(nothing)
        unknown = self._model.BaseFullScore(nothing, UNKNOWN, after).log_prob
        self.has_unknown = bool(abs(unknown - MISSING_UNKNOWN_LOG10) > _ROUNDING)

    def __contains__(self, word: object) -> bool:
        """Whether ``word`` can stand in a text and is known."""
        return isinstance(word, str) and word not in (BEGIN, END, UNKNOWN) and word in self._model

    def score(
        self,
        sentences: Sequence[Sequence[str]],
        *,
        histories: Sequence[Sequence[str]] | None = None,
        sentence_end: bool = True,
    ) -> NgramScores:
        """See :meth:`mixbits.asr.ngram.BackoffModel.score`."""
        if histories is not None and len(histories) != len(sentences):
            raise DataError(f"{len(histories)} histories for {len(sentences)} sentences; expected one each")
        full_score = self._model.BaseFullScore
        found: list[tuple[float, bool, int]] = []
        offsets = np.zeros(len(sentences) + 1, dtype=np.int64)
        for number, words in enumerate(sentences):
            state, after = self._begin(None if histories is None else histories[number])
            for word in words:
                result = full_score(state, UNKNOWN if word in (BEGIN, END) else word, after)
                found.append((result.log_prob, result.oov, result.ngram_length))
                state, after = after, state
            if sentence_end:
                result = full_score(state, END, after)
                found.append((result.log_prob, False, result.ngram_length))
            offsets[number + 1] = len(found)
        log_p = np.array([entry[0] for entry in found], dtype=np.float64) * LN10
        if not np.all(np.isfinite(log_p)):
            raise FormatError(f"{self._name}: KenLM gives scores that are not finite; the file is damaged")
        is_unknown = np.array([entry[1] for entry in found], dtype=bool)
        length = np.array([entry[2] for entry in found], dtype=np.int64)
        if not self.has_unknown:
            length[is_unknown] = 0
        return NgramScores(log_p, is_unknown, length, offsets)

    def _begin(self, history: Sequence[str] | None) -> tuple[Any, Any]:
        """The state after a history (None: the beginning of a sentence), and one to write to."""
        state, after = self._kenlm.State(), self._kenlm.State()
        history = [BEGIN] if history is None else list(history)[max(0, len(history) - self.order + 1) :]
        if history[:1] == [BEGIN]:
            self._model.BeginSentenceWrite(state)
        else:
            self._model.NullContextWrite(state)
        for word in history[history[:1] == [BEGIN] :]:
            self._model.BaseFullScore(state, UNKNOWN if word in (BEGIN, END) else word, after)
            state, after = after, state
        return state, after
