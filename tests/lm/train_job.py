"""A tiny training job for the tests of the trainer; as a script, jobs that are killed with SIGKILL.

``python train_job.py FOLDER`` runs every job of KILLS in a child process that kills itself there, and leaves its checkpoints in
FOLDER/<name>. All children are forked from one process, which has imported everything but trained nothing.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from mixbits.lm.corpus import encode
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import word_tokenizer
from mixbits.lm.train import train_model
from mixbits.lm.train_settings import TrainSettings
from mixbits.lm.trainer import LMTrainer
from mixbits.quant.admm import Admm
from mixbits.quant.qat import StraightThrough
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec

CONTEXT = 8
STEPS_PER_EPOCH, EPOCHS, EVALS = 10, 3, 2  # validations and checkpoints after steps 5, 10, ..., 30
METHODS = ("none", "straight-through", "admm")
# Name: (method, step at which the job is killed, whether in the middle of writing that step's checkpoint).
KILLS = {
    **{f"{method}-step": (method, 17, False) for method in METHODS},
    **{f"{method}-half-written": (method, 20, True) for method in METHODS},
    "none-first": ("none", 3, False),
}


def lines(num, seed):
    """Sentences in which each word nearly decides the next one."""
    generator = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(24)]
    result = []
    for _ in range(num):
        word, sentence = int(generator.integers(24)), []
        for _ in range(7):
            sentence.append(words[word])
            word = (5 * word + 7 + int(generator.random() < 0.1)) % 24
        result.append(" ".join(sentence))
    return result


def tokenizer():
    return word_tokenizer(lines(300, 0), max_length=CONTEXT)


def streams():
    found = tokenizer()
    return encode(found, lines(STEPS_PER_EPOCH * 4, 1)), encode(found, lines(12, 2))


def model(preset="paper", seed=0):
    dropout = 0.1 if preset == "paper" else None
    size = ModelSize(
        preset=preset, num_layers=1, hidden_size=16, feed_forward_size=32, num_heads=2, context=CONTEXT, dropout=dropout
    )
    return build_model(size, tokenizer(), seed=seed)


def settings(**changes):
    base = {
        "epochs": EPOCHS, "batch_size": 4, "context": CONTEXT, "learning_rate": 0.01, "evals_per_epoch": EVALS,
        "precision": "float32", "seed": 3,
    }  # fmt: skip
    return TrainSettings(**{**base, **changes})


def method(kind, student):
    if kind == "none":
        return None
    inventory = find_units(student)
    allocation = BitAllocation.uniform(inventory, QuantSpec.parse("2"))
    if kind == "straight-through":
        return StraightThrough(student, inventory, allocation)
    return Admm(student, inventory, allocation, gamma=1e-2, gamma_final=1.0, num_updates=12)


def run(folder, kind="none", resume=False, **changes):
    """(model, method, result) of the job."""
    student = model()
    quantizer = method(kind, student)
    found = train_model(
        student, *streams(), settings(**changes), folder, method=quantizer, resume=resume, show_progress=False
    )
    return student, quantizer, found


def killed_run(folder, kind, at_step, in_checkpoint):
    step, save = LMTrainer.training_step, Path.write_text

    def training_step(self, *args, **kwargs):
        if not in_checkpoint and self.state.global_step == at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    def write_text(self, *args, **kwargs):
        if in_checkpoint and self.name == "mixbits_complete" and self.parent.name == f"checkpoint-{at_step}":
            os.kill(os.getpid(), signal.SIGKILL)
        return save(self, *args, **kwargs)

    LMTrainer.training_step, Path.write_text = training_step, write_text
    run(folder, kind)


def warm_up(folder):
    """Have transformers import all that it imports lazily, once for all children."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    step, LMTrainer.training_step = LMTrainer.training_step, stop
    try:
        run(folder, "admm")
    except KeyboardInterrupt:
        LMTrainer.training_step = step


def main(folder):
    torch.set_num_threads(1)
    warm_up(folder / "warm-up")
    for name, (kind, at_step, in_checkpoint) in KILLS.items():
        child = os.fork()
        if child == 0:
            try:
                killed_run(folder / name, kind, at_step, in_checkpoint)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"{name} was not killed: status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
