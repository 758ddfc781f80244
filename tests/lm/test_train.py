"""Training: it learns, it repeats itself to the bit, and a killed run ends where an uninterrupted one does."""

import copy
import importlib.util
import io
import json
import math
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.lm import train as train_module
from mixbits.lm.loss import has_plain_head
from mixbits.lm.perplexity import perplexity
from mixbits.lm.train import last_complete_checkpoint, train_model
from mixbits.lm.trainer import LMTrainer

_path = Path(__file__).parent / "train_job.py"
_spec = importlib.util.spec_from_file_location("train_job", _path)
job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(job)

NUM_STEPS = job.STEPS_PER_EPOCH * job.EPOCHS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bitwise equality needs the same number of threads in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder with the checkpoints of every job of KILLS."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, str(_path), str(folder)], check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """{method: (model, method, result, folder)} of jobs that nobody disturbed."""
    found = {}
    for kind in job.METHODS:
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = (*job.run(folder, kind), folder)
    return found


def same_tensors(a, b):
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[name], b[name]) for name in a)
    return a == b


def validations(result):
    return [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry]


@pytest.mark.parametrize("kind", job.METHODS)
def test_it_learns_and_delivers_the_best_validation(kind, uninterrupted):
    model, method, found, _ = uninterrupted[kind]
    losses = validations(found)
    assert len(losses) == job.EPOCHS * job.EVALS
    assert min(losses) < 0.8 * math.log(27)
    assert found["valid_nats"] == min(losses)
    assert found["steps"] == NUM_STEPS
    with method.delivered(model) if method else nullcontext():
        stored = perplexity(model, job.streams()[1], context=job.CONTEXT, stride=job.CONTEXT)
    assert stored.nats_per_token == pytest.approx(found["valid_nats"], abs=1e-5)


def test_the_same_seed_gives_the_same_bits(uninterrupted, tmp_path):
    model, _, found, _ = uninterrupted["none"]
    again, _, found_again = job.run(tmp_path / "again")
    assert same_tensors(model.state_dict(), again.state_dict())
    assert found_again["valid_nats"] == found["valid_nats"]
    other, _, _ = job.run(tmp_path / "other", seed=4)
    assert not same_tensors(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", job.KILLS)
def test_killed_and_resumed_is_the_same_to_the_bit(name, killed, uninterrupted):
    kind, at_step, half_written = job.KILLS[name]
    folder = killed / name
    if half_written:
        assert (folder / f"checkpoint-{at_step}").is_dir()
    checkpoint = last_complete_checkpoint(folder)
    assert (checkpoint is None) == (at_step < 5)
    if checkpoint:
        assert checkpoint.name == ("checkpoint-15")
    model, method, found = job.run(folder, kind, resume=True)
    expected_model, expected_method, expected, _ = uninterrupted[kind]
    assert found["valid_nats"] == expected["valid_nats"]
    assert found["steps"] == expected["steps"]
    assert validations(found) == validations(expected)
    assert same_tensors(model.state_dict(), expected_model.state_dict())
    if method is not None:
        assert same_tensors(method.state_dict(), expected_method.state_dict())


@pytest.mark.parametrize("kind", job.METHODS)
def test_a_finished_run_is_given_back_and_not_trained_further(kind, uninterrupted, tmp_path, monkeypatch):
    model, method, found, folder = uninterrupted[kind]
    moved = shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.setattr(LMTrainer, "training_step", lambda *a, **k: pytest.fail("trained"))
    again, method_again, found_again = job.run(moved, kind, resume=True)
    assert same_tensors(again.state_dict(), model.state_dict())
    assert found_again["valid_nats"] == found["valid_nats"]
    assert found_again["steps"] == found["steps"]
    if method is not None:
        assert same_tensors(method_again.state_dict(), method.state_dict())


def test_the_best_checkpoint_comes_back_with_the_methods_state(tmp_path, monkeypatch):
    """A learning rate that ruins the model after the first validations: the early weights and scales must return."""
    states = {}
    save = LMTrainer._save_checkpoint

    def remember(self, *args, **kwargs):
        states[self.state.global_step] = copy.deepcopy((self.lm.state_dict(), self.method.state_dict()))
        return save(self, *args, **kwargs)

    monkeypatch.setattr(LMTrainer, "_save_checkpoint", remember)
    evaluate = LMTrainer.evaluate
    worse = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])

    def planned(self, *args, **kwargs):
        evaluate(self, *args, **kwargs)
        return {"eval_loss": next(worse)}

    monkeypatch.setattr(LMTrainer, "evaluate", planned)
    model, method, found = job.run(tmp_path, "straight-through")
    assert found["valid_nats"] == 2.0
    assert same_tensors(model.state_dict(), states[10][0])
    assert same_tensors(method.state_dict(), states[10][1])
    assert not same_tensors(states[10][1], states[30][1])


def test_early_stopping_survives_a_kill_and_a_resume(tmp_path, monkeypatch):
    """Patience counts across a resume, and a run that stopped early is not trained further."""
    step = LMTrainer.training_step
    changes = {"epochs": 20, "learning_rate": 0.1, "patience": 3, "schedule": "constant"}
    model, _, found = job.run(tmp_path / "whole", **changes)
    assert found["steps"] < 200
    losses = validations(found)
    assert min(losses) == found["valid_nats"] == losses[-4]

    class Killed(BaseException):
        pass

    def stop(self, *args, **kwargs):
        if self.state.global_step == found["steps"] - 2:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LMTrainer, "training_step", stop)
    with pytest.raises(Killed):
        job.run(tmp_path / "cut", **changes)
    monkeypatch.setattr(LMTrainer, "training_step", step)
    again, _, resumed = job.run(tmp_path / "cut", resume=True, **changes)
    assert resumed["steps"] == found["steps"]
    assert same_tensors(again.state_dict(), model.state_dict())
    monkeypatch.setattr(LMTrainer, "training_step", lambda *a, **k: pytest.fail("trained"))
    once_more, _, finished = job.run(tmp_path / "cut", resume=True, **changes)
    assert finished["steps"] == found["steps"]
    assert same_tensors(once_more.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("changes", "steps", "evaluated"),
    [
        ({"epochs": 0.25, "evals_per_epoch": 1}, 2, [2]),
        ({"epochs": 0.01, "evals_per_epoch": 1}, 1, [1]),
        ({"epochs": 1.5, "evals_per_epoch": 1}, 15, [10, 15]),
        ({"epochs": 1, "evals_per_epoch": 4}, 10, [3, 6, 9, 10]),
        ({"epochs": 1, "evals_per_epoch": 99}, 10, list(range(1, 11))),
    ],
)
def test_parts_of_epochs_and_validations(changes, steps, evaluated, tmp_path):
    _, _, found = job.run(tmp_path, **changes)
    assert found["steps"] == steps
    assert [entry["step"] for entry in found["log"] if "eval_loss" in entry] == evaluated


@pytest.mark.parametrize("epochs", [0.5, 1])
def test_a_resumed_part_of_an_epoch_is_not_one_step_longer(epochs, tmp_path):
    changes = {"epochs": epochs, "evals_per_epoch": 1}
    model, _, found = job.run(tmp_path, **changes)
    again, _, resumed = job.run(tmp_path, resume=True, **changes)
    assert resumed["steps"] == found["steps"]
    assert same_tensors(again.state_dict(), model.state_dict())


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    step = LMTrainer.training_step

    def poisoned(self, *args, **kwargs):
        if self.state.global_step == 12:
            with torch.no_grad():
                self.lm.get_input_embeddings().weight.fill_(math.nan)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LMTrainer, "training_step", poisoned)
    with pytest.raises(DataError, match=r"training loss is nan at step 13.*learning_rate"):
        job.run(tmp_path)
    kept = last_complete_checkpoint(tmp_path)
    assert kept.name == "checkpoint-10"
    assert json.loads((kept / "trainer_state.json").read_text())["global_step"] == 10


def test_a_validation_loss_that_is_not_finite_stops_before_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[LMTrainer.__module__], "token_nll", lambda model, ids: ids.float() * math.nan)
    with pytest.raises(DataError, match="validation loss is nan at step 5"):
        job.run(tmp_path)
    assert last_complete_checkpoint(tmp_path) is None


def test_old_checkpoints_without_resume_are_an_error_and_are_kept(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted["none"][3], tmp_path / "old")
    before = sorted(p.name for p in folder.rglob("*"))
    with pytest.raises(DataError, match="--resume"):
        job.run(folder)
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_a_checkpoint_with_a_broken_state_is_named(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted["none"][3], tmp_path / "old")
    (last_complete_checkpoint(folder) / "trainer_state.json").write_text("{")
    with pytest.raises(FormatError, match=r"checkpoint-30: checkpoint cannot be read"):
        job.run(folder, resume=True)


def test_a_finished_run_without_its_best_checkpoint_is_an_error(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted["none"][3], tmp_path / "old")
    state_file = last_complete_checkpoint(folder) / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state_file.write_text(json.dumps({**state, "best_global_step": 1}))
    with pytest.raises(DataError, match="best checkpoint of this finished run is missing"):
        job.run(folder, resume=True)


def test_resume_with_nothing_to_resume_from_starts(tmp_path, uninterrupted):
    (tmp_path / "checkpoint-5").mkdir()
    model, _, _ = job.run(tmp_path, resume=True)
    assert same_tensors(model.state_dict(), uninterrupted["none"][0].state_dict())


def test_a_teacher_is_frozen_and_must_share_the_vocabulary(tmp_path):
    from mixbits.lm.presets import ModelSize, build_model
    from mixbits.lm.tokenizer import word_tokenizer

    student, teacher = job.model(), job.model("llama", seed=9)
    before = copy.deepcopy(teacher.state_dict())
    settings = job.settings(epochs=1, teacher_weight=0.5)
    train_model(student, *job.streams(), settings, tmp_path / "a", teacher=teacher, show_progress=False)
    assert same_tensors(teacher.state_dict(), before)
    size = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=16, num_heads=2, context=8)
    stranger = build_model(size, word_tokenizer(["a b c"]), seed=0)
    with pytest.raises(SpecError, match="teacher has 6 words, student 27"):
        train_model(student, *job.streams(), settings, tmp_path / "b", teacher=stranger, show_progress=False)
    assert not (tmp_path / "b").exists()


def test_texts_too_short_and_contexts_too_long(tmp_path):
    train, valid = job.streams()
    short = train_module.TokenStream(valid.ids[:4], valid.sentence[:3], 3, 0, "")
    for pair, name in (((short, valid), "training"), ((train, short), "validation")):
        with pytest.raises(DataError, match=f"{name} text has 3 tokens"):
            train_model(job.model(), *pair, job.settings(), tmp_path / "x", show_progress=False)
    with pytest.raises(SpecError, match="context is 9 tokens"):
        train_model(job.model(), train, valid, job.settings(context=9), tmp_path / "x", show_progress=False)
    assert not (tmp_path / "x").exists()


def test_the_global_generators_are_left_alone(tmp_path):
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    job.run(tmp_path, epochs=0.5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


@pytest.mark.parametrize("preset", ["paper", "llama"])
def test_bfloat16_reaches_the_chunked_loss_and_leaves_the_model_alone(preset, tmp_path, monkeypatch):
    module = sys.modules[LMTrainer.__module__]
    seen, original = [], module.training_loss

    def look(model, *args, **kwargs):
        seen.append((torch.is_autocast_enabled("cpu"), has_plain_head(model)))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(module, "training_loss", look)
    model = job.model(preset)
    forward = model.forward
    found = train_model(
        model, *job.streams(), job.settings(precision="bfloat16"), tmp_path, show_progress=False
    )  # fmt: skip
    assert set(seen) == {(True, True)}
    assert model.forward == forward
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.zeros(1, 2, dtype=torch.long)).logits.dtype == torch.float32
    exact = perplexity(model, job.streams()[1], context=job.CONTEXT, stride=job.CONTEXT)
    assert exact.nats_per_token == pytest.approx(found["valid_nats"], abs=0.02)  # bfloat16 logits there
    assert found["valid_nats"] < 0.8 * math.log(27)


class Own:
    """A method with a tensor of its own, whose gradient is always ``slope``, and the model's first bias at another rate."""

    def __init__(self, slope=1.0):
        self.own, self.slope = torch.nn.Parameter(torch.full((3,), 2.0)), slope
        self.gradients, self.norms, self.rates, self.sizes = [], [], [], []

    def parameters(self, model):
        return None

    def extra_parameters(self, model):
        bias = next(p for n, p in model.named_parameters() if n.endswith("bias"))
        return [
            {"params": [self.own], "lr": 0.5, "weight_decay": 0.0},
            {"params": [bias], "lr": 0.0, "weight_decay": 0.25},
        ]

    def before_forward(self, model):
        assert self.own.grad is None

    def after_backward(self, model):
        self.own.grad = torch.full((3,), self.slope)
        squares = [float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(squares) + 3 * self.slope**2))

    def after_step(self, model, step, num_steps):
        self.gradients.append(float(self.own.grad[0]))
        return {}

    def delivered(self, model):
        return nullcontext()

    def state_dict(self):
        return {"own": self.own.detach()}

    def load_state_dict(self, state):
        self.own.data.copy_(state["own"])


def run_own(folder, method, monkeypatch, **changes):
    """(model, result, [(lr, weight_decay, num_params) of each group] after each step)."""
    groups, step = [], torch.optim.AdamW.step

    def look(self, *args, **kwargs):
        groups.append([(g["lr"], g["weight_decay"], len(g["params"])) for g in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    student = job.model()
    result = train_model(
        student, *job.streams(), job.settings(**changes), folder, method=method, resume=True, show_progress=False
    )
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return student, result, groups


def test_extra_groups_have_their_own_rate_and_decay_and_the_schedule_scales_them(tmp_path, monkeypatch):
    method = Own()
    changes = {
        "learning_rate": 0.01,
        "warmup_fraction": 0.2,
        "schedule": "linear",
        "weight_decay": 0.125,
        "max_grad_norm": 1e9,
    }
    model, _, groups = run_own(tmp_path, method, monkeypatch, **changes)
    assert len(groups) == NUM_STEPS
    shares = [min(step / 6, (30 - step) / 24) for step in range(30)]
    for share, found in zip(shares, groups, strict=True):
        rates, decays, counts = zip(*found, strict=True)
        assert rates == pytest.approx((0.01 * share, 0.01 * share, 0.5 * share, 0.0))
        assert decays == (0.125, 0.0, 0.0, 0.25)
        assert sum(counts) == len(list(model.parameters())) + 1
        assert counts[2:] == (1, 1)
    # AdamW with a constant gradient moves by its rate each step, whatever the gradient
    assert method.own[0].item() == pytest.approx(2 - 0.5 * sum(shares), abs=1e-4)
    untouched = next(p for n, p in job.model().named_parameters() if n.endswith("bias"))
    assert torch.equal(next(p for n, p in model.named_parameters() if n.endswith("bias")), untouched)


@pytest.mark.parametrize("slope", [0.0, 100.0])
def test_clipping_covers_what_only_the_method_owns(slope, tmp_path, monkeypatch):
    method = Own(slope)
    _, result, _ = run_own(tmp_path, method, monkeypatch, max_grad_norm=0.5, epochs=1)
    assert method.gradients == pytest.approx([slope * 0.5 / norm for norm in method.norms], rel=1e-4)
    logged = [entry["grad_norm"] for entry in result["log"] if "grad_norm" in entry]
    assert logged == pytest.approx(method.norms, rel=1e-5)  # one log entry a step


def test_extra_groups_resume_to_the_bit(tmp_path, monkeypatch):
    whole, cut = Own(), Own()
    model, _, _ = run_own(tmp_path / "whole", whole, monkeypatch)
    step = LMTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 17:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LMTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_own(tmp_path / "cut", cut, monkeypatch)
    monkeypatch.setattr(LMTrainer, "training_step", step)
    again = Own()
    resumed, _, _ = run_own(tmp_path / "cut", again, monkeypatch)
    assert same_tensors(resumed.state_dict(), model.state_dict())
    assert torch.equal(again.own, whole.own)


@pytest.mark.parametrize(("schedule", "last"), [("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)])
def test_every_schedule_warms_up(schedule, last, tmp_path):
    _, _, found = job.run(tmp_path, schedule=schedule, warmup_fraction=0.2, learning_rate=0.01)
    rates = [entry["learning_rate"] / 0.01 for entry in found["log"] if "learning_rate" in entry]
    assert rates[0] < 0.6
    assert max(rates) == pytest.approx(1.0, abs=0.1)  # every third step is logged
    assert rates[-1] == pytest.approx(last, abs=0.1)


def test_log_files_get_one_line_a_validation_and_a_terminal_its_bar_back(tmp_path, capsys, monkeypatch):
    train_model(job.model(), *job.streams(), job.settings(), tmp_path / "a", title="tiny")
    captured = capsys.readouterr()
    assert captured.out == ""
    printed = captured.err.splitlines()
    assert len(printed) == job.EPOCHS * job.EVALS
    assert printed[-1].startswith("tiny: step 30 of 30, loss ")
    train_model(job.model(), *job.streams(), job.settings(), tmp_path / "b", show_progress=False)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(LMTrainer, "training_step", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train_model(job.model(), *job.streams(), job.settings(), tmp_path / "c", title="tiny")
    shown = terminal.getvalue()
    assert "tiny" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back


def test_dropout_off_is_training_a_model_without_dropout(tmp_path):
    def run(name, probability, dropout):
        model = job.model()
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = probability
        settings = job.settings(epochs=1).model_copy(update={"dropout": dropout})
        train_model(model, *job.streams(), settings, tmp_path / name, show_progress=False)
        return model.state_dict()

    without = run("without", 0.0, "model")
    assert same_tensors(run("off", 0.5, "off"), without)
    assert not same_tensors(run("on", 0.5, "model"), without)
