"""Runs that go wrong stop with the place, and leave good checkpoints only."""

import importlib.util
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mixbits.errors import DataError
from mixbits.lm.guards import (
    describe_gradients,
    describe_largest,
    exploded_training,
    exploded_validation,
    first_bad_module,
    first_bad_parameter,
)
from mixbits.lm.train import last_complete_checkpoint, train_model
from mixbits.lm.trainer import LMTrainer

_spec = importlib.util.spec_from_file_location("train_job", Path(__file__).parent / "train_job.py")
job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(job)

LAYER = "model.decoder.layers.0"


class Idle:
    """A method that does nothing; ``act`` is called at the start of step 13."""

    def __init__(self, act):
        self.act, self.step = act, 0

    def parameters(self, model):
        return None

    def before_forward(self, model):
        if self.step == 12:
            self.act(model)

    def after_backward(self, model):
        pass

    def after_step(self, model, step, num_steps):
        self.step = step
        return {}

    def delivered(self, model):
        return nullcontext()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def stopped(folder, act, message, **changes):
    """Train with ``act`` at step 13; the error matches, and every checkpoint left is finite. Returns (model, error text)."""
    model = job.model()
    with pytest.raises(DataError, match=message) as error:
        train_model(
            model, *job.streams(), job.settings(**changes), folder, method=Idle(act), show_progress=False
        )  # fmt: skip
    kept = last_complete_checkpoint(folder)
    assert kept.name == "checkpoint-10"
    assert f"the last good checkpoint is kept: {kept} (best: checkpoint-10, " in str(error.value)
    from safetensors.torch import load_file

    assert all(bool(torch.isfinite(t).all()) for t in load_file(kept / "model.safetensors").values())
    return model, str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_are_named(value, tmp_path):
    def act(model):
        model.get_submodule(f"{LAYER}.fc2").weight.data[1, 2] = value

    stopped(tmp_path, act, rf"training loss is nan at step 13; first not finite: the weights {LAYER}\.fc2\.weight;")


@pytest.mark.parametrize(
    ("huge", "blamed"),
    [("fc1", "fc1"), ("self_attn.v_proj", "self_attn_layer_norm")],  # small inputs: only the norm's squares overflow
)
def test_the_first_layer_that_overflows_is_named(huge, blamed, tmp_path):
    """Finite weights, infinite output: everything after it is bad too, only the first is to blame."""

    def act(model):
        signs = torch.tensor([1.0, -1.0]).repeat(8)  # equal ones would cancel after a LayerNorm
        model.get_submodule(f"{LAYER}.{huge}").weight.data.copy_(3e38 * signs)

    stopped(tmp_path, act, rf"at step 13; first not finite: the output of {re.escape(LAYER)}\.{blamed};")


def test_a_bad_gradient_under_a_finite_loss_is_named_and_no_step_is_taken(tmp_path):
    before = {}

    def act(model):
        bias = model.get_submodule(f"{LAYER}.fc1").bias
        before.update({n: p.detach().clone() for n, p in model.named_parameters()})
        bias.register_hook(lambda gradient: gradient * math.inf)

    message = rf"gradient norm is (nan|inf) at step 13; .*backward pass: the gradient of {LAYER}\.fc1\.bias \(1 of \d+"
    model, _ = stopped(tmp_path, act, message)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_gradient_nearest_the_output_is_blamed():
    model = job.model()
    named = list(model.named_parameters())
    for name, parameter in named:
        bad = name.startswith(("model.decoder.embed", f"{LAYER}.self_attn"))
        parameter.grad = torch.full_like(parameter, math.nan if bad else 1.0)
    last = [n for n, _ in named if n.startswith(f"{LAYER}.self_attn")][-1]
    assert f"gradient of {last} (" in describe_gradients(named)
    for _, parameter in named:
        parameter.grad = None
    assert "every single gradient is finite" in describe_gradients(named)


def test_a_bad_gradient_of_a_tensor_of_the_methods_own(tmp_path):
    class Owner(Idle):
        own = torch.nn.Parameter(torch.ones(3))

        def extra_parameters(self, model):
            return [{"params": [self.own]}]

        def after_backward(self, model):
            self.own.grad = torch.tensor([1.0, math.nan if self.step == 6 else 0.0, 1.0])

    with pytest.raises(DataError, match=r"step 7; .*the gradient of the method's parameter 0 \(3,\) \(1 of"):
        train_model(
            job.model(), *job.streams(), job.settings(), tmp_path, method=Owner(lambda m: None), show_progress=False
        )  # fmt: skip
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-5"
    assert torch.isfinite(Owner.own).all()


def test_looking_for_the_module_leaves_the_model_alone():
    model = job.model().train()
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert first_bad_module(model, ids) is None
    assert first_bad_parameter(model.named_parameters()) is None
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    model.model.decoder.embed_positions.weight.data.fill_(math.nan)
    assert first_bad_parameter(model.named_parameters()) == "model.decoder.embed_positions.weight"
    assert first_bad_module(model, ids) == "model.decoder.embed_positions"


def test_a_state_that_is_not_finite_is_never_written(tmp_path, monkeypatch):
    """Even where validation did not see it."""
    evaluate = LMTrainer.evaluate

    def poison(self, *args, **kwargs):
        found = evaluate(self, *args, **kwargs)
        if self.state.global_step == 10:
            self.lm.get_submodule(f"{LAYER}.fc1").bias.data[0] = math.inf
        return found

    monkeypatch.setattr(LMTrainer, "evaluate", poison)
    with pytest.raises(DataError, match=rf"{LAYER}\.fc1\.bias is not finite at step 10.*checkpoint-5 \(best"):
        job.run(tmp_path)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([5, 2, 21, 22, 50], True),  # limits: 3 ln 1000 = 20.7
        ([5, 4, 39, 41, 50], False),  # 10 times the lowest: 40
        ([5, 2, 40, 20, 50], False),  # came back once
        ([5, 2, 40, 41], False),  # two logs only: a spike
        ([40, 41, 50], False),  # nothing to compare with
        ([5, 2, 20, 20, 20], False),
        ([100, 300, 300, 300], False),  # a loss of another scale: 10 times the best counts
        ([100, 1100, 1100, 1100], True),
        ([4, 30, 35, 40, 38, 36], True),  # above the start five times, though never 10 times the lowest
        ([4, 30, 35, 40, 38], False),
        ([4, 30, 35, 20, 38, 36], False),  # came back once
        ([15, 29, 29, 29, 29, 29], False),  # not twice the start
        ([15, 31, 31, 31, 31, 31], True),
        ([60, 45, 30, 25, 22, 21], False),  # low bits: starts far above guessing, and falls
        ([7, 9, 12, 14, 12, 9, 8], False),  # a warm-up too fast, that recovers
    ],
)
def test_exploded_training(losses, stops):
    found = exploded_training(losses, 1000)
    assert (found is not None) == stops
    if found:
        assert f"{losses[-1]}" in found
        assert "limit" in found


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([6.0, 9.0], 1, True),  # limit: ln 1000 + 2 = 8.9
        ([6.0, 8.8], 1, False),
        ([9.0, 9.5, 12.0], 1, False),  # never was below
        ([9.0], 1, False),
        ([6.0, 9.0], 2, False),
        ([6.0, 9.0, 9.0], 2, True),
        ([6.0, 9.0, 8.0, 9.0], 2, False),
        ([40.0, 41.0, 40.0], 1, True),  # stuck: above 3 ln 1000 = 20.7 and no lower than at first
        ([40.0, 41.0], 1, False),
        ([40.0, 41.0, 39.0], 1, False),  # falls
        ([40.0, 20.0, 45.0], 1, False),  # was near guessing once
        ([40.0, 41.0, 40.0], 2, False),
        ([40.0, 41.0, 42.0, 40.0], 2, True),
    ],
)
def test_exploded_validation(losses, patience, stops):
    assert (exploded_validation(losses, 1000, patience=patience) is not None) == stops


def test_an_exploding_training_loss_stops(tmp_path, monkeypatch):
    module, steps = sys.modules[LMTrainer.__module__], []
    original = module.training_loss

    def explode(*args, **kwargs):
        steps.append(1)
        return original(*args, **kwargs) * (1000.0 if len(steps) > 12 else 1.0)

    monkeypatch.setattr(module, "training_loss", explode)
    monkeypatch.setattr(
        torch.nn.utils, "clip_grads_with_norm_", lambda parameters, *a: [p.grad.zero_() for p in parameters]
    )
    with pytest.raises(DataError, match=r"training loss exploded: .* in the last 3 logs.* at step 21.*learning_rate"):
        job.run(tmp_path)  # logs every 3 steps: 15, 18, 21
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-20"


@pytest.mark.parametrize("kind", ["none", "straight-through"])
@pytest.mark.parametrize("learning_rate", [3.0, 12.0])
def test_a_learning_rate_that_is_bad_from_the_first_log_on_stops(kind, learning_rate, tmp_path):
    with pytest.raises(
        DataError,
        match=rf"training loss exploded: .* \(limit .*largest output: that of \S+ \(root .*lower learning_rate \(now {learning_rate:g}\)",
    ):
        job.run(tmp_path, kind, learning_rate=learning_rate, schedule="constant")


@pytest.mark.parametrize("kind", ["none", "straight-through", "admm"])
def test_ordinary_training_is_not_stopped(kind, tmp_path):
    """Far too high a learning rate still, whose loss comes back; and a start of weights times 100, which is bad and falls."""
    job.run(tmp_path / "high", kind, learning_rate=0.3)
    student = job.model()
    with torch.no_grad():
        student.get_input_embeddings().weight.mul_(100)
    found = train_model(
        student, *job.streams(), job.settings(learning_rate=0.3), tmp_path / "bad", method=job.method(kind, student),
        show_progress=False,
    )  # fmt: skip
    losses = [entry["loss"] for entry in found["log"] if "loss" in entry]
    assert losses[0] > 3 * math.log(27) > losses[-1]


@pytest.mark.parametrize(("kind", "last"), [("none", 5), ("straight-through", 10)])
def test_an_exploding_validation_loss_stops_before_the_checkpoint(kind, last, tmp_path, monkeypatch):
    module = sys.modules[LMTrainer.__module__]
    original, calls = module.token_nll, []

    def explode(model, ids):
        calls.append(1)
        return original(model, ids) + (0.0 if len(calls) == 1 else 50.0)

    monkeypatch.setattr(module, "token_nll", explode)
    with pytest.raises(
        DataError, match=r"validation loss rose to 5\d\.\d+ nats.*guessing among 27.* at step"
    ) as stopped:
        job.run(tmp_path, kind)
    assert last_complete_checkpoint(tmp_path).name == f"checkpoint-{last}"
    assert re.search(
        r"the last good checkpoint is kept: \S+checkpoint-5 \(\d\.\d+ nats per token\)$", str(stopped.value)
    )


def test_a_checkpoint_of_an_exploded_run_is_not_called_good(tmp_path, monkeypatch):
    module = sys.modules[LMTrainer.__module__]
    original, calls = module.token_nll, []

    def explode(model, ids):  # above guessing from the first validation on, and rising
        calls.append(1)
        return original(model, ids) + 50.0 * len(calls)

    monkeypatch.setattr(module, "token_nll", explode)
    with pytest.raises(DataError, match=r"no checkpoint is a good one \(best: 5\d\.\d+ nats per token\)"):
        job.run(tmp_path, "none")


def test_the_layer_with_the_largest_output_is_named():
    model = job.model()
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.weight.mul_(1e6)
    said = describe_largest(model, torch.ones(2, 5, dtype=torch.long))
    assert re.fullmatch(r"; largest output: that of model\.decoder\.layers\.0\.fc2 \(root mean square \S+\)", said)
