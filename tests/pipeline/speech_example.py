"""A small world for rescoring tests: a grammar, a model that has learned it, and lists whose recognizer is often wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mixbits.asr.formats.jsonl import write_nbest
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.lm.checkpoint import save_model
from mixbits.lm.loss import mean_loss
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import word_tokenizer

SUBJECTS, VERBS, OBJECTS = ("dogs", "cats", "birds"), ("chase", "watch"), ("mice", "fish", "worms")
WORDS = (*SUBJECTS, *VERBS, *OBJECTS)


def sentences(rng: np.random.Generator, count: int) -> list[str]:
    """``subject verb object``, sometimes two joined by ``and``."""
    found = []
    for _ in range(count):
        clause = [" ".join(rng.choice(kind) for kind in (SUBJECTS, VERBS, OBJECTS)) for _ in range(rng.integers(1, 3))]
        found.append(" and ".join(clause))
    return found


def make_lists(name: str, count: int, seed: int, *, references: bool = True) -> list[NBest]:
    """Five hypotheses each: the truth and corrupted ones (some words unknown), sorted by a noisy acoustic score."""
    rng = np.random.default_rng(seed)
    lists = []
    for number, truth in enumerate(sentences(rng, count)):
        texts = [truth]
        while len(texts) < 5:
            words = truth.split()
            words[rng.integers(len(words))] = str(rng.choice([*WORDS, "and", "mumble"]))
            if " ".join(words) not in texts:
                texts.append(" ".join(words))
        scored = [Hypothesis(t, float(rng.normal(1.0 if t == truth else 0.0))) for t in texts]
        scored.sort(key=lambda hypothesis: -hypothesis.acoustic_score)
        lists.append(NBest(f"{name}-{number}", tuple(scored), truth if references else None, f"{name}-s{number % 12}"))
    return lists


def build_world(folder: Path) -> None:
    """Writes ``trained`` and ``untrained`` models and ``dev``, ``test`` and ``blind`` (no references) lists to ``folder``."""
    rng = np.random.default_rng(0)
    text = sentences(rng, 400)
    tokenizer = word_tokenizer(text, max_length=16)
    size = ModelSize(preset="llama", num_layers=1, hidden_size=16, feed_forward_size=32, num_heads=2, context=16)
    model = build_model(size, tokenizer, seed=0)
    save_model(model.eval(), tokenizer, folder / "untrained")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    rows = [[2, *tokenizer(line)["input_ids"], 2] for line in text]
    for _ in range(60):
        lengths = (5, 9)
        ids = [torch.tensor([row for row in rows if len(row) == length]) for length in lengths]
        optimizer.zero_grad()
        sum(mean_loss(model, batch) for batch in ids).backward()
        optimizer.step()
    save_model(model.eval(), tokenizer, folder / "trained")
    write_nbest(folder / "dev.jsonl", make_lists("dev", 80, 1))
    write_nbest(folder / "test.jsonl.gz", make_lists("test", 200, 2))
    write_nbest(folder / "blind.jsonl", make_lists("blind", 10, 3, references=False))
