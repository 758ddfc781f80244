"""The teacher's states, computed once a block: the same loss to rounding, the same bits after a resume."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from mixbits.errors import SpecError
from mixbits.lm.corpus import BlockDataset
from mixbits.lm.loss import hidden_states, training_loss
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.teacher_cache import IndexedBlocks, TeacherCache
from mixbits.lm.train import train_model
from mixbits.lm.trainer import LMTrainer

_spec = importlib.util.spec_from_file_location("train_job", Path(__file__).parent / "train_job.py")
job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(job)

NUM_BLOCKS = job.STEPS_PER_EPOCH * 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def blocks():
    return IndexedBlocks(BlockDataset(job.streams()[0], job.CONTEXT))


def batch(blocks, indices):
    items = [blocks[i] for i in indices]
    return torch.tensor([item["index"] for item in items]), torch.stack([item["input_ids"] for item in items])


def teacher(preset="llama"):
    return job.model(preset, seed=9).eval().requires_grad_(False)


def test_the_loss_is_the_same_to_rounding_and_hits_are_the_same_to_the_bit(blocks):
    model, frozen = job.model().eval(), teacher()
    cache = TeacherCache(frozen, len(blocks), job.CONTEXT, limit_bytes=1 << 20)
    index, ids = batch(blocks, [3, 0, 7, 5])
    first = cache.states(index, ids[:, :-1])
    exact = hidden_states(frozen, ids[:, :-1])
    torch.testing.assert_close(first, exact, rtol=2**-11, atol=1e-6)  # float16 has 11 bits
    assert cache.num_known == 4
    frozen.base_model.register_forward_hook(lambda *_: pytest.fail("ran"))
    swapped = cache.states(index.flip(0), ids.flip(0)[:, :-1])
    assert torch.equal(swapped, first.flip(0))
    options = {"teacher": frozen, "teacher_weight": 0.5, "hidden_weight": 0.5}
    cached = training_loss(model, ids, **options, teacher_hidden=first)
    assert cached.item() == pytest.approx(training_loss(model, ids, **options, teacher_hidden=exact).item(), rel=1e-4)


def test_a_blocks_states_do_not_depend_on_its_batch(blocks):
    frozen = teacher()
    alone = TeacherCache(frozen, len(blocks), job.CONTEXT, limit_bytes=1 << 20)
    together = TeacherCache(frozen, len(blocks), job.CONTEXT, limit_bytes=1 << 20)
    index, ids = batch(blocks, range(12))
    found = together.states(index, ids[:, :-1])
    for i in range(12):
        assert torch.equal(alone.states(index[i : i + 1], ids[i : i + 1, :-1])[0], found[i])


def test_memory_is_bounded(blocks):
    bytes_a_block = 2 * job.CONTEXT * 16
    cache = TeacherCache(teacher(), len(blocks), job.CONTEXT, limit_bytes=3 * bytes_a_block + 1)
    assert cache.num_kept == 3
    index, ids = batch(blocks, [1, 2, 3, 30])
    first = cache.states(index, ids[:, :-1])
    assert cache.num_known == 2
    assert torch.equal(cache.states(index, ids[:, :-1]), first)


def test_states_beyond_float16_are_not_kept(blocks):
    frozen = teacher()
    frozen.model.norm.weight.data.fill_(1e6)
    cache = TeacherCache(frozen, len(blocks), job.CONTEXT, limit_bytes=1 << 20)
    index, ids = batch(blocks, [0, 1])
    torch.testing.assert_close(cache.states(index, ids[:, :-1]), hidden_states(frozen, ids[:, :-1]))
    assert cache.num_known == 0


def distilled(folder, passes=None, resume=False, **changes):
    base = {"teacher_weight": 0.5, "teacher_temperature": 2.0, "hidden_weight": 0.1}
    frozen, student = teacher(), job.model()
    if passes is not None:
        frozen.base_model.register_forward_hook(lambda *a: passes.append(a[2].last_hidden_state.shape[0]))
    found = train_model(
        student, *job.streams(), job.settings(**{**base, **changes}), folder, teacher=frozen, resume=resume,
        show_progress=False,
    )  # fmt: skip
    return student, found


def test_the_teacher_runs_once_a_block(tmp_path):
    passes = []
    _, found = distilled(tmp_path / "a", passes)
    extra = len([p for p in passes if p == 1]) - NUM_BLOCKS  # asking for a plain head takes two tokens, twice
    assert 0 <= extra <= 2
    without = []
    _, plain = distilled(tmp_path / "b", without, teacher_cache_mib=0)
    assert sum(without) >= job.EPOCHS * NUM_BLOCKS
    assert found["valid_nats"] == pytest.approx(plain["valid_nats"], abs=2e-3)


def test_one_epoch_needs_no_cache(tmp_path):
    passes = []
    distilled(tmp_path, passes, epochs=1)
    assert max(passes) == 4  # whole batches


@pytest.mark.parametrize("changes", [{}, {"hidden_layers": "all", "teacher_cache_mib": 0}])
def test_distillation_resumes_to_the_bit(changes, tmp_path, monkeypatch):
    model, found = distilled(tmp_path / "whole", **changes)
    step = LMTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 17:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LMTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path / "cut", **changes)
    monkeypatch.setattr(LMTrainer, "training_step", step)
    again, resumed = distilled(tmp_path / "cut", resume=True, **changes)
    assert resumed["valid_nats"] == found["valid_nats"]
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_hidden_states_pull_the_student_to_the_teacher(tmp_path):
    """With a large weight the student's last hidden state becomes the teacher's."""
    student, frozen = job.model(), teacher("paper")
    ids = torch.stack([BlockDataset(job.streams()[1], job.CONTEXT)[i]["input_ids"][:-1] for i in range(8)])
    target = hidden_states(frozen, ids)

    def error(model):
        return float((hidden_states(copy.deepcopy(model).eval(), ids) - target).square().mean().detach())

    before = error(student)
    settings = job.settings(hidden_weight=10.0)
    train_model(student, *job.streams(), settings, tmp_path, teacher=frozen, show_progress=False)
    assert error(student) < 0.5 * before


def test_teachers_that_do_not_fit_are_errors(tmp_path):
    def other(**changes):
        size = {"preset": "paper", "num_layers": 1, "hidden_size": 16, "feed_forward_size": 32, "num_heads": 2}
        return build_model(ModelSize(**{**size, **changes}, context=job.CONTEXT), job.tokenizer(), seed=0)

    def run(frozen, **changes):
        train_model(
            job.model(), *job.streams(), job.settings(**changes), tmp_path / "x", teacher=frozen, show_progress=False
        )

    with pytest.raises(SpecError, match=r"hidden_weight is 0\.5 and there is no teacher"):
        run(None, hidden_weight=0.5)
    with pytest.raises(SpecError, match="teacher has hidden size 32, student 16"):
        run(other(hidden_size=32), hidden_weight=0.5)
    with pytest.raises(SpecError, match="teacher has 2 layers, student 1; hidden_layers all"):
        run(other(num_layers=2), hidden_weight=0.5, hidden_layers="all")
    assert not (tmp_path / "x").exists()
    run(other(num_layers=2), hidden_weight=0.5, epochs=0.1)  # last hidden states only: depth may differ
    run_wide = other(hidden_size=32)
    train_model(
        job.model(), *job.streams(), job.settings(teacher_weight=0.5, epochs=0.1), tmp_path / "y", teacher=run_wide,
        show_progress=False,
    )  # fmt: skip
