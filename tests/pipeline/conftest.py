"""A small language of its own (some 400 sentences), and tiny models with a word-level vocabulary of it."""

import random
from pathlib import Path
from typing import Any

import pytest

NOUNS = ["cat", "dog", "bird", "fish", "horse", "cow", "sheep", "goat", "mouse", "fox"]
VERBS = ["sees", "likes", "follows", "hears", "finds"]
ADJECTIVES = ["small", "big", "old", "young", "grey", "quick"]


def sentences(number: int, seed: int) -> list[str]:
    """Sentences of a small grammar, in which a noun's adjective depends on the noun."""
    rng = random.Random(seed)

    def phrase() -> str:
        i = rng.randrange(len(NOUNS))
        adjective = ADJECTIVES[(i + rng.randrange(2)) % len(ADJECTIVES)]
        return f"the {adjective} {NOUNS[i]}" if rng.random() < 0.7 else f"a {NOUNS[i]}"

    return [f"{phrase()} {rng.choice(VERBS)} {phrase()}" for _ in range(number)]


@pytest.fixture(scope="session")
def sentences_of():
    """``sentences_of(number, seed)``."""
    return sentences


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Folder with train.txt, valid.txt and test.txt."""
    folder = tmp_path_factory.mktemp("texts")
    for name, number, seed in (("train", 400, 1), ("valid", 60, 2), ("test", 60, 3)):
        (folder / f"{name}.txt").write_text("\n".join(sentences(number, seed)) + "\n", encoding="utf-8")
    return folder


def random_model(family: str, tokenizer: Any, *, tied: bool = True, context: int = 16, seed: int = 0) -> Any:
    """A random model of a family, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

    torch.manual_seed(seed)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.eos_token_id}
    shared = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
        **special,
    }
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": context}
    rotary = {**sizes, "num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8}
    config = {
        "opt": lambda: OPTConfig(word_embed_proj_dim=16, ffn_dim=32, do_layer_norm_before=False, **sizes, **shared),
        "gpt2": lambda: GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=context, **shared),
        "llama": lambda: LlamaConfig(**rotary, **shared),
        "qwen3": lambda: Qwen3Config(**rotary, **shared),
    }[family]()  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def tokenizer(texts):
    from mixbits.lm.corpus import read_sentences
    from mixbits.lm.tokenizer import word_tokenizer

    return word_tokenizer(read_sentences(texts / "train.txt"), max_length=16)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """``make_model(folder, family, tied=...)``: write a random model directory and return it."""
    from mixbits.lm.checkpoint import save_model

    def make(folder: Path, family: str = "opt", *, tied: bool = True, change: Any = None) -> Path:
        model = random_model(family, tokenizer, tied=tied)
        if change is not None:
            change(model)
        save_model(model, tokenizer, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def trained(texts, tmp_path_factory) -> Path:
    """A tiny OPT that has learned the language a little: a full-precision model directory."""
    from mixbits.lm.presets import ModelSize
    from mixbits.lm.train import TrainSettings
    from mixbits.pipeline.settings import Vocabulary
    from mixbits.pipeline.train import train_from_text

    folder = tmp_path_factory.mktemp("trained") / "model"
    size = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=32, num_heads=2, context=16, dropout=0.0)
    settings = TrainSettings(epochs=6, batch_size=8, context=16, learning_rate=1e-2, precision="float32")
    train_from_text(
        texts / "train.txt", folder, size=size, settings=settings, vocabulary=Vocabulary(), valid=texts / "valid.txt",
        show_progress=False,
    )  # fmt: skip
    return folder
