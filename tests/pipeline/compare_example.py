"""Random n-best lists with speakers, and the same lists in other orders: something to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.pipeline.compare_inputs import System

LETTERS = tuple("abcdefgh")


def make_lists(num_lists: int = 120, *, seed: int = 0, num_hypotheses: int = 6, lm: bool = True) -> tuple[NBest, ...]:
    """Every hypothesis is the reference with noise; scores prefer fewer errors, noisily."""
    rng = np.random.default_rng(seed)
    lists = []
    for number in range(num_lists):
        reference = [str(letter) for letter in rng.choice(LETTERS, size=rng.integers(4, 13))]
        hypotheses = []
        for _ in range(num_hypotheses):
            words = [str(rng.choice(LETTERS)) if rng.random() < 0.15 else word for word in reference]
            words = [word for word in words if rng.random() > 0.04]
            wrong = sum(a != b for a, b in zip(words, reference, strict=False))
            lm_score = float(rng.normal(-2.0 * wrong, 2.0)) if lm else None
            hypotheses.append(Hypothesis(" ".join(words), float(rng.normal(-wrong, 3.0)), lm_score))
        hypotheses.sort(key=lambda h: -h.acoustic_score)
        speaker = f"s{number % 12}"
        extra = {"noise": ("low", "high")[number % 2]}
        lists.append(NBest(f"u{number}", tuple(hypotheses), " ".join(reference), speaker, None, extra))
    return tuple(lists)


def reordered(lists: tuple[NBest, ...], key: Callable[[Hypothesis], float]) -> tuple[NBest, ...]:
    """Every list sorted by ``key``, highest first."""
    return tuple(replace(e, hypotheses=tuple(sorted(e.hypotheses, key=lambda h: -key(h)))) for e in lists)


def three_systems() -> list[System]:
    """The lists as they are, sorted by both scores, and sorted the wrong way round."""
    lists = make_lists()
    return [
        System("first", lists, "first.jsonl", "ab" * 32),
        System("both", reordered(lists, lambda h: h.acoustic_score + 2 * (h.lm_score or 0))),
        System("backwards", reordered(lists, lambda h: -h.acoustic_score)),
    ]
