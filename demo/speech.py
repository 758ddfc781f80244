"""Spoken sentences recognized into n-best lists: synthesis in one process, recognition in several.

espeak-ng carries state from one sentence to the next (phase, flutter, random numbers), so all sentences are
spoken in order by one fresh process: the audio depends on the list and the seed, never on the number of
processes. The recognizer keeps a little state, too: it is restarted for each block of 25 utterances, and the
blocks are spread over the processors.
Processes are spawned, not forked: the decoder and the resampler bring their own libraries.
"""

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from demo.recognition import FirstPass, Recognizer, ScoredText
from demo.synthesis import Voice

SPEAKERS = (
    "en-us", "en-us+f1", "en-us+f2", "en-us+f5", "en-us+m1", "en-us+klatt", "en-us+Alex", "en-us+adam",
)  # fmt: skip
"""espeak-ng voices that pocketsphinx's American acoustic model understands (first-pass WER below 50 %)."""
WORDS_PER_MINUTE = 150
NOISE = 20.0
"""Standard deviation of the added noise, 16-bit units: about 38 dB below the speech."""

BLOCK_SIZE = 25
"""Utterances between two restarts of the decoder; part of what decides the results."""

_recognizer: Recognizer | None = None


@dataclass(frozen=True)
class Utterance:
    """A sentence to be spoken, and by whom."""

    name: str
    reference: str
    speaker: str


def utterances(part: str, sentences: list[str]) -> list[Utterance]:
    """Name the sentences `part-0001`, … and give them to the eight speakers in turn."""
    return [
        Utterance(f"{part}-{number + 1:04d}", sentence, SPEAKERS[number % len(SPEAKERS)])
        for number, sentence in enumerate(sentences)
    ]


def synthesize(items: list[Utterance], seed: int) -> list[np.ndarray]:
    """Speak the utterances in order with one engine; int16 samples at 16 kHz."""
    voice = Voice(words_per_minute=WORDS_PER_MINUTE)
    return [
        voice.speak(item.reference, speaker=item.speaker, noise=NOISE, seed=seed + number)
        for number, item in enumerate(items)
    ]


def _start_worker(first_pass: FirstPass) -> None:
    global _recognizer
    _recognizer = Recognizer(first_pass)


def _recognize_block(block: list[np.ndarray]) -> list[list[ScoredText]]:
    assert _recognizer is not None
    _recognizer.restart()
    return [_recognizer.recognize(samples) for samples in block]


def speak_and_recognize(
    items: list[Utterance],
    first_pass: FirstPass,
    *,
    seed: int,
    num_processes: int,
    progress: Callable[[str, int], None] = lambda stage, done: None,
) -> list[list[ScoredText]]:
    """The n-best list of every utterance. `progress(stage, done)` is called as work is done.

    Raises DataError when espeak-ng or pocketsphinx is missing or refuses.
    """
    context = multiprocessing.get_context("spawn")
    progress("speaking", 0)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        audio = pool.submit(synthesize, items, seed).result()
    progress("recognizing", 0)
    results: list[list[ScoredText]] = []
    with ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_start_worker, initargs=(first_pass,)
    ) as pool:
        blocks = [audio[start : start + BLOCK_SIZE] for start in range(0, len(audio), BLOCK_SIZE)]
        for found in pool.map(_recognize_block, blocks):
            results.extend(found)
            progress("recognizing", len(results))
    return results


def nbest_record(item: Utterance, hypotheses: list[ScoredText]) -> dict[str, Any]:
    """One line of mixbits's n-best JSONL as a dictionary."""
    return {
        "utterance": item.name,
        "reference": item.reference,
        "speaker": item.speaker,
        "hypotheses": [
            {"text": h.text, "acoustic_score": h.acoustic_score, "lm_score": h.lm_score} for h in hypotheses
        ],
    }


def nbest_lines(items: list[Utterance], results: list[list[ScoredText]]) -> str:
    """The text of an n-best JSONL file."""
    pairs = zip(items, results, strict=True)
    return "".join(json.dumps(nbest_record(item, result), ensure_ascii=False) + "\n" for item, result in pairs)
