"""Tokenizers the tests share."""

import pytest

SENTENCES = [
    "the cat sat on the mat and the dog lay by the door",
    "a bird sang in the old tree while the rain fell on the roof",
    "the rain fell and the cat slept by the fire",
]


@pytest.fixture(scope="session")
def byte_level():
    """A small byte-level BPE like GPT-2's: one special token that is bos, eos and unk, and no pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(SENTENCES, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
