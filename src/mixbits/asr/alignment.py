"""Which word of a text stands for which word of the reference.

Alignments are kaldialign's: plain edit distance (a substitution costs what an insertion or a deletion does), as in word error
rates, or sclite's costs 4/3/3, as in MAPSSWE. Between equally cheap alignments the choice is kaldialign's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import kaldialign

_EPSILON = -1
Costs = Literal["plain", "sclite"]


@dataclass(frozen=True)
class WordSlots:
    """A text laid along its reference of n words.

    ``words[i]`` stands for reference word i (None: deleted); ``inserted[i]`` are the words inserted before it, ``inserted[n]``
    those after the last one.
    """

    words: tuple[str | None, ...]
    inserted: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class AlignedColumn:
    """One column of texts set side by side: the reference word and each text's word, None where there is none.

    A reference of None is an insertion: at least one text has a word where nothing was said.
    """

    reference: str | None
    words: tuple[str | None, ...]


def word_slots(reference: Sequence[str], words: Sequence[str], *, costs: Costs = "plain") -> WordSlots:
    """Align the words of one text with those of its reference."""
    number = {word: index for index, word in enumerate(dict.fromkeys([*reference, *words]))}
    pairs = kaldialign.align(
        [number[word] for word in reference],
        [number[word] for word in words],
        _EPSILON,
        sclite_mode=costs == "sclite",
    )
    found: list[str | None] = []
    inserted: list[list[str]] = [[]]
    rest = iter(words)
    for expected, got in pairs:
        if expected == _EPSILON:
            inserted[-1].append(next(rest))
        else:
            found.append(None if got == _EPSILON else next(rest))
            inserted.append([])
    return WordSlots(tuple(found), tuple(tuple(entry) for entry in inserted))


def side_by_side(reference: str, texts: Sequence[str]) -> tuple[AlignedColumn, ...]:
    """All texts along one reference: the insertions before a reference word share columns, first with first."""
    words = reference.split()
    slots = [word_slots(words, text.split()) for text in texts]
    columns = []
    for position in range(len(words) + 1):
        extra = [slot.inserted[position] for slot in slots]
        for rank in range(max((len(entry) for entry in extra), default=0)):
            row = tuple(entry[rank] if rank < len(entry) else None for entry in extra)
            columns.append(AlignedColumn(None, row))
        if position < len(words):
            columns.append(AlignedColumn(words[position], tuple(slot.words[position] for slot in slots)))
    return tuple(columns)
