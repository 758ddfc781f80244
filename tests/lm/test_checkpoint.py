"""Model directories: round trips, and every way one can be broken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixbits.errors import DataError, FormatError
from mixbits.lm.checkpoint import load_model, model_hash, quiet_transformers, save_model
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import word_tokenizer

SMALL = {"num_layers": 2, "hidden_size": 16, "feed_forward_size": 24, "num_heads": 2, "context": 12}


@pytest.fixture(params=["paper", "llama"])
def saved(request, tmp_path):
    tokenizer = word_tokenizer(["the cat sat on the mat"])
    model = build_model(ModelSize(preset=request.param, **SMALL), tokenizer, seed=0)
    save_model(model, tokenizer, tmp_path / "m")
    return model, tokenizer, tmp_path / "m"


def test_round_trip(saved):
    model, tokenizer, path = saved
    again, again_tokenizer = load_model(path)
    assert again_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert again.config.pad_token_id == tokenizer.pad_token_id
    assert load_model(path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_saving_replaces_and_leaves_nothing_else(saved):
    model, tokenizer, path = saved
    first = model_hash(path)
    assert model_hash(path) == first
    (path / "stray").write_text("x")
    with torch.no_grad():
        model.get_input_embeddings().weight[3] += 1
    save_model(model, tokenizer, path)
    assert model_hash(path) != first
    assert [p.name for p in path.parent.iterdir()] == ["m"]
    assert not (path / "stray").exists()


def test_an_interrupted_save_keeps_the_old_model(saved, monkeypatch):
    model, tokenizer, path = saved
    first = model_hash(path)
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        save_model(model, tokenizer, path)
    assert model_hash(path) == first
    assert [p.name for p in path.parent.iterdir()] == ["m"]
    load_model(path)


def rename_a_weight(path):
    weights = load_file(path / "model.safetensors")
    name = next(n for n in weights if "k_proj.weight" in n)
    weights[name.replace("k_proj", "key_proj")] = weights.pop(name)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def drop_a_weight(path):
    weights = load_file(path / "model.safetensors")
    del weights[next(n for n in weights if "norm" in n)]
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def reshape(path):
    config = json.loads((path / "config.json").read_text())
    config["hidden_size"] = config["word_embed_proj_dim"] = 32
    (path / "config.json").write_text(json.dumps(config))


def edit_config(**changes):
    def edit(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def other_tokenizer(path):
    word_tokenizer(["many more words than the model has ever seen in its short life"]).save_pretrained(path)


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (rename_a_weight, r"1 weights are missing.*k_proj.*key_proj"),
        (drop_a_weight, "weights are missing"),
        (truncate, "cannot be loaded"),
        (reshape, "cannot be loaded"),
        (lambda path: (path / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (lambda path: (path / "config.json").write_text("{"), "cannot be loaded"),
        (edit_config(model_type="nosuch"), "cannot be loaded"),
        (edit_config(num_attention_heads="two"), "cannot be loaded"),
        (other_tokenizer, "do not belong together"),
    ],
)
def test_broken_directories_give_one_clear_error(saved, breaking, message):
    path = saved[2]
    breaking(path)
    with pytest.raises((FormatError, DataError), match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_model_or_no_tokenizer(saved, tmp_path):
    path = saved[2]
    with pytest.raises(DataError, match=r"no config\.json"):
        load_model(tmp_path / "nowhere")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_model(path)
    with pytest.raises(DataError, match="no weight files"):
        model_hash(tmp_path)


def test_quiet_gives_back_what_was_set():
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
    assert logging.get_verbosity() == before
