"""Which token sequences a scorer is given, and how their scores add up to those of hypotheses.

Usually one sequence a hypothesis: boundary, its tokens, boundary. Two things make it more:

* **context**: ids (earlier utterances) that stand before a list's hypotheses. The context is scored once as a sequence of its own
  and its score taken off again, so that a hypothesis keeps the log-probability of its own tokens, given the context;
* **windows**: a sequence longer than the scorer takes is cut into windows which each score the next half of the model's length after as
  much of what came before as fits. Nothing is left out; only the history of a token is shorter than in full.

A context that does not fit before the longest hypothesis of its list loses its earliest ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mixbits.asr.nbest import NBest
from mixbits.errors import DataError

LongHypotheses = Literal["refuse", "window"]


@dataclass(frozen=True)
class ScorePlan:
    """``groups``: sequences that may share prefixes; ``rows[group][index]``: the hypotheses that a sequence's score is added to
    (``signs`` +1) or taken off (-1). ``num_windows``: hypotheses that were cut."""

    groups: list[list[Sequence[int]]]
    rows: list[list[list[int]]]
    signs: list[list[int]]
    num_windows: int


def plan_scores(
    lists: Sequence[NBest],
    sequences: Sequence[Sequence[Sequence[int]]],
    *,
    max_length: int | None,
    contexts: Sequence[Sequence[int]] | None = None,
    long_hypotheses: LongHypotheses = "refuse",
) -> ScorePlan:
    """Plan of all hypotheses, numbered through all lists.

    Args:
        sequences: ids of each hypothesis of each list, the boundary token first.
        max_length: the longest sequence the scorer takes, all ids counted; None: any.
        contexts: for each list ids, the first and the last of them a boundary token; they replace the hypotheses' first one.

    Raises:
        DataError: a sequence is empty, or longer than ``max_length`` while ``long_hypotheses`` is "refuse" (named).
    """
    plan, first, num_windows = ScorePlan([], [], [], 0), 0, 0
    for number, (entry, own) in enumerate(zip(lists, sequences, strict=True)):
        group: list[Sequence[int]] = []
        rows: list[list[int]] = []
        signs: list[int] = []
        fitting: list[int] = []
        for rank, ids in enumerate(own, 1):
            if len(ids) == 0:
                raise DataError(
                    f"utterance {entry.utterance!r}, hypothesis {rank}: encoded to no tokens; the tokenizer must add a sentence boundary"
                )
            if max_length is None or len(ids) <= max_length:
                fitting.append(first + rank - 1)
                continue
            if long_hypotheses == "refuse":
                raise DataError(
                    f"utterance {entry.utterance!r}, hypothesis {rank}: {len(ids)} tokens, but the model takes at most {max_length}; use a "
                    "model with a longer context, score long ones by a sliding window, or leave this utterance out (nothing is cut silently)"
                )
            num_windows += 1
            group.append(ids[:max_length])
            rows.append([first + rank - 1])
            signs.append(1)
            for window, num_context in _further_windows(ids, max_length):
                plan.groups.append([window[:num_context], window])
                plan.rows.append([[first + rank - 1]] * 2)
                plan.signs.append([-1, 1])
        longest = max((len(own[row - first]) for row in fitting), default=1)
        context = [] if contexts is None else _shortened(contexts[number], longest, max_length)
        if len(context) > 1 and fitting:
            group.append(context)
            rows.append(fitting)
            signs.append(-1)
        for row in fitting:
            ids = own[row - first]
            group.append([*context, *ids[1:]] if len(context) > 1 else ids)
            rows.append([row])
            signs.append(1)
        plan.groups.append(group)
        plan.rows.append(rows)
        plan.signs.append(signs)
        first += len(own)
    return ScorePlan(plan.groups, plan.rows, plan.signs, num_windows)


def _further_windows(ids: Sequence[int], max_length: int) -> Iterator[tuple[Sequence[int], int]]:
    """After the first ``max_length`` ids: windows, and how many ids of each are context, until all are scored."""
    stride = max(1, max_length // 2)
    for start in range(max_length, len(ids), stride):
        stop = min(start + stride, len(ids))
        begin = max(0, stop - max_length)
        yield ids[begin:stop], start - begin


def _shortened(context: Sequence[int], longest: int, max_length: int | None) -> list[int]:
    """At most so many of the context's ids, the latest ones after its first, that the longest hypothesis fits behind them."""
    room = len(context) if max_length is None else max_length - longest + 1
    if len(context) <= room:
        return list(context)
    return [] if room < 2 else [context[0], *context[len(context) - room + 1 :]]
