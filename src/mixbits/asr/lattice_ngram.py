"""n-gram scores of the arcs of a lattice whose states have one history each in their last n − 1 words."""

from __future__ import annotations

import numpy as np

from mixbits.asr.lattice import FloatArray, Lattice
from mixbits.asr.ngram import BEGIN, NgramModel
from mixbits.errors import DataError


def ngram_scores(lattice: Lattice, model: NgramModel) -> tuple[FloatArray, FloatArray]:
    """(num_arcs,) ln p of each arc's word, 0 where it has none, and (num_finals,) of the sentence end.

    All paths to a state must have the same last n − 1 words, n the model's order (see
    :func:`mixbits.asr.lattice_rescore.split_states`). Raises DataError: a word that the model does not know and has no ``<unk>`` for.
    """
    keep = model.order - 1
    src, dst, word, is_word = (a.tolist() for a in (lattice.src, lattice.dst, lattice.word, lattice.is_word))
    history: list[tuple[str, ...]] = [()] * lattice.num_states
    history[lattice.start] = (BEGIN,)[:keep]
    for arc in lattice.sorted_arcs.tolist():
        before = history[src[arc]]
        after = (*before, lattice.labels[word[arc]]) if is_word[arc] else before
        history[dst[arc]] = after[max(0, len(after) - keep) :]
    spoken = np.flatnonzero(lattice.is_word)
    words = [lattice.labels[label] for label in lattice.word[spoken].tolist()]
    histories = [history[state] for state in lattice.src[spoken].tolist()]
    found = model.score([[each] for each in words], histories=histories, sentence_end=False)
    if found.is_unknown.any() and not model.has_unknown:
        raise DataError(
            f"utterance {lattice.utterance!r}: the n-gram model does not know the word {words[int(np.argmax(found.is_unknown))]!r} and has no <unk>; "
            "expected the n-gram model that made these lattices"
        )
    scores = np.zeros(lattice.num_arcs)
    scores[spoken] = found.log_p
    ends = [history[state] for state in lattice.finals.tolist()]
    return scores, model.score([[]] * len(ends), histories=ends).log_p
