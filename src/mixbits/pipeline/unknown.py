"""Words outside a model's vocabulary: what stands for their probability.

* ``penalty``: the probability of ``<unk>`` as it is;
* ``shared``: that, over the number of words which ``<unk>`` stands for;
* ``spelling``: that times the probability of the word's spelling under a character n-gram of the vocabulary (`mixbits.asr.spelling`).

With all three a penalty added per such word is tuned on dev. Only ``spelling`` tells one unknown word from another, and only with the
last two are the scores of words probabilities. A tokenizer without ``<unk>`` knows every word, and nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from mixbits.asr.spelling import SpellingModel
from mixbits.errors import SpecError

UnknownPolicy = Literal["penalty", "shared", "spelling"]


def check_unknown_policy(policy: UnknownPolicy, num_types: int | None) -> None:
    """Raise SpecError when the number of words that ``<unk>`` stands for is missing, too small, or of no use."""
    if policy == "shared" and num_types is None:
        raise SpecError(
            "sharing the probability of <unk> needs the number of words it stands for (the distinct words of the training text outside the vocabulary)"
        )
    if policy != "shared" and num_types is not None:
        raise SpecError(f"the number of unknown words is for sharing only; the policy is {policy}")
    if num_types is not None and num_types < 1:
        raise SpecError(f"<unk> stands for {num_types} words; expected at least 1")


def unknown_word_scores(
    policy: UnknownPolicy, words: Iterable[str], tokenizer: Any, *, num_types: int | None = None
) -> dict[str, float]:
    """What is added to the log-probability of ``<unk>``, in nats, for each of the (unknown) words."""
    check_unknown_policy(policy, num_types)
    words = sorted(set(words))
    if policy == "penalty" or not words:
        return dict.fromkeys(words, 0.0)
    if policy == "shared":
        assert num_types is not None
        return dict.fromkeys(words, -math.log(num_types))
    special = set(tokenizer.all_special_tokens)
    spelling = SpellingModel(word for word in sorted(tokenizer.get_vocab()) if word not in special)
    return {word: spelling.log_prob(word) for word in words}
