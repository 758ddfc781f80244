"""Word-level vocabularies as ordinary Hugging Face tokenizers.

The vocabulary is the text's words by falling count (ties alphabetically), cut by size or by count, behind ``<pad>``,
``<unk>`` and ``</s>`` (the sentence boundary: bos and eos). A real pad token matters: OPT's default pad id 1 gets an embedding row that
starts at zero and receives no gradient. A ``<unk>`` that stands in the text itself (Penn Treebank) is the same token; a
``<pad>`` or ``</s>`` there is no word of the vocabulary (`mixbits.lm.corpus` reads it as ``<unk>``, never as a boundary).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixbits.errors import DataError

PAD, UNKNOWN, BOUNDARY = "<pad>", "<unk>", "</s>"


def word_tokenizer(
    sentences: Iterable[str], *, max_words: int | None = None, min_count: int = 1, max_length: int | None = None
) -> Any:
    """Build a word-level tokenizer from sentences.

    ``max_words``: most frequent words kept, special tokens aside; ``min_count``: drop rarer words; ``max_length``: the
    model's context, saved with the tokenizer. Raises DataError when no words are left.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if max_words is not None and max_words < 1:
        raise DataError(f"vocabulary size is {max_words}; expected at least 1 word")
    counts: Counter[str] = Counter()
    for line in sentences:
        counts.update(line.split())
    special = (PAD, UNKNOWN, BOUNDARY)
    kept = [word for word, count in counts.items() if count >= min_count and word not in special]
    kept = sorted(kept, key=lambda word: (-counts[word], word))[:max_words]
    if not kept:
        raise DataError(f"no word occurs {min_count} times or more; lower min_count or give more text")
    vocabulary = {word: index for index, word in enumerate([*special, *kept])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length or int(1e9),
    )


def load_tokenizer(path: str | Path) -> Any:
    """Any Hugging Face tokenizer from a local directory. Raises DataError when there is none."""
    from transformers import AutoTokenizer

    path = Path(path)
    if not (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        raise DataError(
            f"{path}: no tokenizer.json or tokenizer_config.json; expected a Hugging Face tokenizer directory"
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: tokenizer cannot be loaded ({reason})") from None
