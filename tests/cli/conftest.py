"""A tiny text and a random OPT with its words: enough for the commands that train."""

import pytest

LINES = [
    f"the {a} {n} {v} a {m}"
    for a in ("small", "old")
    for n in ("cat", "dog", "bird", "fish")
    for v in ("sees", "likes", "hears")
    for m in ("mouse", "horse", "cow", "sheep")
]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """Folder with text.txt, valid.txt and the model directory ``full``."""
    from mixbits.lm.checkpoint import save_model
    from mixbits.lm.presets import ModelSize, build_model
    from mixbits.lm.tokenizer import word_tokenizer

    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text("\n".join(LINES * 2) + "\n")
    (folder / "valid.txt").write_text("\n".join(LINES[::7]) + "\n")
    tokenizer = word_tokenizer(LINES, max_length=16)
    size = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=32, num_heads=2, context=16)
    save_model(build_model(size, tokenizer, seed=0).eval(), tokenizer, folder / "full")
    return folder
