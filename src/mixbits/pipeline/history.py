"""Earlier utterances of a conversation as the language model's context.

Utterances of one conversation (or, where lists name none, of one speaker) stand in the order of the file, or of their ``start`` where
every one has such a number. A new conversation starts without history. The model sees earlier texts as it saw its training text:
boundary, words, boundary, words, boundary; at most so many of their last tokens as are asked for and fit.

Which text an earlier utterance has:

* ``first-pass``: its one-best as the file has it;
* ``rescored``: its one-best after rescoring with its own history, one utterance after the other, all conversations side by side;
* ``reference``: what was said, which no recognizer knows: the bound of what history can bring, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mixbits.asr.nbest import NBest, one_best_texts, reference_texts
from mixbits.asr.rescore import LmFeatures, apply_weights
from mixbits.asr.weights import Weights
from mixbits.errors import DataError, SpecError

History = Literal["none", "first-pass", "rescored", "reference"]
ScoreAfter = Callable[[Sequence[NBest], Sequence[Sequence[str]]], LmFeatures]
"""(lists, texts before each of them, earliest first) -> LM scores."""


def conversations(lists: Sequence[NBest]) -> list[list[int]]:
    """Numbers of the utterances of each conversation, in the order in which they were spoken.

    Raises:
        DataError: an utterance names neither conversation nor speaker.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for number, entry in enumerate(lists):
        if entry.conversation is not None:
            key = ("conversation", entry.conversation)
        elif entry.speaker is not None:
            key = ("speaker", entry.speaker)
        else:
            raise DataError(
                f"utterance {entry.utterance!r} names neither conversation nor speaker, so there are no earlier utterances; "
                "add the field to the list, or rescore without history"
            )
        groups.setdefault(key, []).append(number)
    for group in groups.values():
        starts = [lists[number].extra.get("start") for number in group]
        if all(isinstance(start, (int, float)) and not isinstance(start, bool) for start in starts):
            group.sort(key=lambda number: lists[number].extra["start"])
    return list(groups.values())


def earlier_texts(groups: Sequence[Sequence[int]], texts: Sequence[str], *, max_words: int) -> list[list[str]]:
    """Texts before each utterance, earliest first: as many whole ones as are needed for ``max_words`` words."""
    before: list[list[str]] = [[] for _ in texts]
    for group in groups:
        for place, number in enumerate(group):
            before[number] = _last_words([texts[other] for other in group[:place]], max_words)
    return before


def _last_words(texts: Sequence[str], max_words: int) -> list[str]:
    kept: list[str] = []
    for text in reversed(texts):
        if max_words <= 0:
            break
        kept.insert(0, text)
        max_words -= len(text.split()) + 1  # its boundary
    return kept


def score_with_history(
    lists: Sequence[NBest], history: History, score: ScoreAfter, *, max_words: int, weights: Weights | None = None
) -> LmFeatures:
    """LM scores of lists after their history; ``weights`` choose the one-bests of history "rescored".

    Raises:
        SpecError: history "rescored" without weights. DataError: no conversations, or no references for "reference".
    """
    groups = conversations(lists)
    if history != "rescored":
        texts = reference_texts(lists) if history == "reference" else one_best_texts(lists)
        return score(lists, earlier_texts(groups, texts, max_words=max_words))
    if weights is None:
        raise SpecError("history 'rescored' needs weights to choose the earlier utterances' texts by")
    chosen = [""] * len(lists)
    parts: list[tuple[list[int], LmFeatures]] = []
    for turn in range(max(len(group) for group in groups)):
        current = [group[turn] for group in groups if len(group) > turn]
        spoken = [lists[number] for number in current]
        before = [group[:turn] for group in groups if len(group) > turn]
        lm = score(spoken, [_last_words([chosen[number] for number in some], max_words) for some in before])
        for number, text in zip(current, apply_weights(spoken, lm, weights, allow_overlap=True).one_best, strict=True):
            chosen[number] = text
        parts.append((current, lm))
    return _joined(lists, parts)


def _joined(lists: Sequence[NBest], parts: Sequence[tuple[list[int], LmFeatures]]) -> LmFeatures:
    """Scores of parts of the lists in the order of the lists."""
    order = [number for current, _ in parts for number in current]
    sizes = np.array([len(lists[number].hypotheses) for number in order])
    rows = np.concatenate([np.full(size, number) for number, size in zip(order, sizes, strict=True)])
    back = np.argsort(rows, kind="stable")
    found = [lm for _, lm in parts]
    ngram = [lm.ngram_score for lm in found if lm.ngram_score is not None]
    return LmFeatures(
        neural_lm_score=np.concatenate([lm.neural_lm_score for lm in found])[back],
        num_unknown=np.concatenate([lm.num_unknown for lm in found])[back],
        num_tokens=np.concatenate([lm.num_tokens for lm in found])[back],
        num_nodes=sum(lm.num_nodes for lm in found),
        seconds=sum(lm.seconds for lm in found),
        num_windows=sum(lm.num_windows for lm in found),
        ngram_score=np.concatenate(ngram)[back] if len(ngram) == len(found) else None,
    )
