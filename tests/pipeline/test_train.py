"""From a text file to a model directory: held-out sentences, vocabularies, work folders, resuming."""

import math

import numpy as np
import pytest

from mixbits.errors import DataError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import TokenStream, read_sentences
from mixbits.lm.perplexity import perplexity
from mixbits.lm.presets import ModelSize
from mixbits.lm.train_settings import TrainSettings
from mixbits.lm.trainer import LMTrainer
from mixbits.pipeline import train as train_module
from mixbits.pipeline.checks import check_learned
from mixbits.pipeline.prepare import split_sentences, split_text, training_context
from mixbits.pipeline.settings import Vocabulary
from mixbits.pipeline.train import train_from_text
from mixbits.pipeline.workplace import work_folder

SIZE = {"num_layers": 1, "hidden_size": 16, "feed_forward_size": 32, "num_heads": 2, "context": 16}


def train(text, output, *, vocabulary=None, size=None, valid=None, resume=False, **changes):
    base = {
        "epochs": 1,
        "batch_size": 8,
        "context": 16,
        "learning_rate": 0.01,
        "precision": "float32",
        "evals_per_epoch": 2,
    }
    return train_from_text(
        text, output, size=ModelSize(**{**SIZE, **(size or {})}), settings=TrainSettings(**{**base, **changes}),
        vocabulary=Vocabulary(**(vocabulary or {})), valid=valid, resume=resume, show_progress=False,
    )  # fmt: skip


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("preset", ["paper", "llama"])
def test_a_text_becomes_a_model_directory(preset, texts, tmp_path):
    record = train(texts / "train.txt", tmp_path / "m", valid=texts / "valid.txt", size={"preset": preset}, epochs=3)
    assert names(tmp_path) == ["m"]
    model, tokenizer = load_model(tmp_path / "m")
    assert record["num_parameters"] == model.num_parameters()
    assert record["valid_ppl"] == math.exp(record["valid_nats"]) < 0.8 * len(tokenizer)
    _, valid = split_text(tokenizer, texts / "train.txt", texts / "valid.txt")
    found = perplexity(model, valid, context=16, stride=16)
    cut = len(found.nll) // 16 * 16  # training's validation leaves the last part of a block out
    assert found.nll[:cut].mean() == pytest.approx(record["valid_nats"], abs=1e-5)


def test_any_tokenizer_directory(texts, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    backend.train([str(texts / "train.txt")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(tmp_path / "bpe")
    train(texts / "train.txt", tmp_path / "m", vocabulary={"path": str(tmp_path / "bpe")}, epochs=0.2)
    model, tokenizer = load_model(tmp_path / "m")
    assert model.config.vocab_size == len(tokenizer) == 280
    assert model.config.pad_token_id is None


def test_every_20th_sentence_is_held_out_of_training_by_text(tmp_path, texts):
    lines = [f"s{i}" for i in range(100)]
    lines[3] = lines[19]  # a copy of a held-out sentence elsewhere
    (tmp_path / "t").write_text("\n".join(lines))
    kept, held_out = split_sentences(tmp_path / "t")
    assert held_out == ["s19", "s39", "s59", "s79", "s99"]
    assert kept == [line for line in lines if line not in held_out]
    assert len(kept) == 94
    assert split_sentences(texts / "train.txt", texts / "valid.txt")[1] == list(read_sentences(texts / "valid.txt"))


def test_at_most_2000_sentences_are_held_out(tmp_path):
    (tmp_path / "t").write_text("\n".join(f"s{i}" for i in range(60_000)))
    kept, held_out = split_sentences(tmp_path / "t")
    assert len(held_out) == 2000
    assert len(kept) == 58_000


def test_held_out_words_are_not_in_the_vocabulary(tmp_path):
    lines = ["a b c d e f g h i j k l m n o p q"] * 60
    lines[19] = "only here " * 9
    lines[39], lines[59] = "b a " * 9, "c a " * 9
    (tmp_path / "t").write_text("\n".join(lines))
    train(tmp_path / "t", tmp_path / "m", epochs=0.1)
    assert "only" not in load_model(tmp_path / "m")[1].get_vocab()


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["few words"] * 39, "too few to hold some out"), (["all the same"] * 60, "none is left to train on")],
)
def test_texts_that_cannot_be_split(tmp_path, lines, message):
    (tmp_path / "t").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        train(tmp_path / "t", tmp_path / "m")
    assert names(tmp_path) == ["t"]


def train_until(step, text, output):
    """Train, and press Ctrl-C at a step."""
    original = LMTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            train(text, output)


def test_an_interrupted_training_goes_on_to_the_same_model(texts, tmp_path):
    train(texts / "train.txt", tmp_path / "whole")
    train_until(12, texts / "train.txt", tmp_path / "cut")
    assert names(tmp_path) == ["cut.work", "whole"]
    with pytest.raises(DataError, match="--resume"):
        train(texts / "train.txt", tmp_path / "cut")
    train(texts / "train.txt", tmp_path / "cut", resume=True)
    assert model_hash(tmp_path / "cut") == model_hash(tmp_path / "whole")
    assert names(tmp_path) == ["cut", "whole"]
    with pytest.raises(DataError, match="exists already"):
        train(texts / "train.txt", tmp_path / "cut", resume=True)


def test_a_kill_while_the_model_is_written_loses_nothing(texts, tmp_path, monkeypatch):
    """Everything trained, then killed: the model is written from the checkpoints, without another step."""
    save = train_module.save_model

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        train(texts / "train.txt", tmp_path / "m")
    monkeypatch.setattr(train_module, "save_model", save)
    monkeypatch.setattr(LMTrainer, "training_step", lambda *a, **k: pytest.fail("trained"))
    train(texts / "train.txt", tmp_path / "m", resume=True)
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 0.02}, {"size": {"hidden_size": 20}}, {"vocabulary": {"max_words": 5}}, {"text": "valid.txt"}],
)
def test_checkpoints_of_something_else_are_not_resumed(texts, tmp_path, changes):
    train_until(12, texts / "train.txt", tmp_path / "m")
    changes = dict(changes)
    text = changes.pop("text", "train.txt")
    with pytest.raises(DataError, match="other settings or another text"):
        train(texts / text, tmp_path / "m", resume=True, **changes)
    assert any(work_folder(tmp_path / "m").glob("checkpoint-*"))


def test_training_context_is_the_models_but_not_more_than_asked(make_model, tmp_path):
    model, _ = load_model(make_model(tmp_path / "m"))
    assert training_context(model) == 16
    assert training_context(model, 8) == 8


def test_a_model_that_learned_only_word_frequencies_is_named(texts, tmp_path, caplog):
    train(texts / "train.txt", tmp_path / "good", valid=texts / "valid.txt", epochs=3)
    assert "word frequencies" not in caplog.text
    train(texts / "train.txt", tmp_path / "bad", valid=texts / "valid.txt", learning_rate=1e-6, epochs=0.1)
    assert "nothing was learned from context" in caplog.text
    assert f"{tmp_path / 'bad'}: validation loss" in caplog.text


def test_the_loss_of_word_frequencies(caplog):
    """Training tokens 1 1 1 0 and one more for each of three types: (2, 4, 1) / 7; validation tokens 1 2."""
    train_stream, valid_stream = (
        TokenStream(np.array([0, *ids], np.int32), np.zeros(len(ids), np.int32), len(ids), 0, "")
        for ids in ([1, 1, 1, 0], [1, 2])
    )
    nats = -(math.log(4 / 7) + math.log(1 / 7)) / 2
    check_learned(nats - 0.03, train_stream, valid_stream, "m")
    assert not caplog.text
    check_learned(nats - 0.01, train_stream, valid_stream, "m")
    assert (
        f"m: validation loss {nats - 0.01:.3f} nats a token, and word frequencies alone give {nats:.3f}" in caplog.text
    )
