"""Searching a tiny trained model: the budget is met, the answer is the same again and after an interruption, text is kept apart."""

import dataclasses

import pytest
import torch

from mixbits.errors import DataError, SpecError
from mixbits.lm.checkpoint import load_model
from mixbits.lm.corpus import BlockDataset, encode_file
from mixbits.pipeline.search import HeldOutLoss, search_precisions, split_blocks
from mixbits.pipeline.search_settings import SearchSettings
from mixbits.pipeline.settings import validate
from mixbits.quant.allocate import allocate
from mixbits.quant.sensitivity import read_sensitivities, write_sensitivities
from mixbits.quant.supernet import SuperNet
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec, parse_specs, predicted_bytes

SETTINGS = SearchSettings(
    relaxation="softmax",
    epochs=2,
    batch_size=8,
    learning_rate=1e-3,
    arch_every=2,
    arch_learning_rate=0.1,
    candidates=("1", "2", "4"),
)


@pytest.fixture(scope="module")
def streams(texts, tokenizer):
    return tuple(encode_file(tokenizer, texts / f"{name}.txt") for name in ("train", "valid"))


@pytest.fixture(scope="module")
def budget(trained):
    inventory = find_units(load_model(trained)[0])
    return predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec(2)))


@pytest.fixture(scope="module")
def found(trained, streams, budget, tmp_path_factory):
    model, _ = load_model(trained)
    folder = tmp_path_factory.mktemp("search")
    return search_precisions(model, *streams, SETTINGS, folder, max_bytes=budget, context=16, show_progress=False)


def test_allocations_fit_and_the_file_is_an_ordinary_sensitivity_file(found, budget, tmp_path):
    inventory = found.sensitivities.inventory
    for allocation in (found.one_best, found.integer_program):
        assert predicted_bytes(inventory, allocation) <= budget
        assert allocation.provenance["predicted_bytes"] == predicted_bytes(inventory, allocation)
    path = write_sensitivities(tmp_path / "s.json", found.sensitivities)
    read = read_sensitivities(path)
    again = allocate(inventory, read, max_bytes=budget)
    assert again.specs == found.integer_program.specs
    facts = read.provenance
    assert facts["held_out_blocks"] > 1
    assert facts["settings"]["arch_every"] == 2
    assert facts["architecture_steps"] == facts["steps"] // 2 == len(found.preferences.history)


def test_the_log_holds_every_architecture_step(found, budget):
    logged = [entry for entry in found.record["log"] if "search_entropy" in entry]
    assert len(logged) == len(found.preferences.history)
    for entry, kept in zip(logged, found.preferences.history, strict=True):
        assert {k: v for k, v in entry.items() if k.startswith("search_")} == {
            k: v for k, v in kept.items() if k != "step"
        }
        assert entry["step"] == kept["step"]
    first, last = logged[0], logged[-1]
    assert last["search_entropy"] < first["search_entropy"]
    assert abs(last["search_expected_bytes"] - budget) < abs(first["search_expected_bytes"] - budget)
    assert all(entry["search_multiplier"] >= 0 for entry in logged)


def test_the_same_call_and_an_interrupted_one_find_the_same(found, trained, streams, budget, tmp_path, monkeypatch):
    from mixbits.quant.supernet import SuperNet

    def call(folder):
        model, _ = load_model(trained)
        return search_precisions(model, *streams, SETTINGS, folder, max_bytes=budget, context=16, show_progress=False)

    step, steps = SuperNet.after_step, found.preferences.provenance["steps"]

    def killed(self, model, number, num_steps):
        if number == steps - 1:
            raise KeyboardInterrupt
        return step(self, model, number, num_steps)

    monkeypatch.setattr(SuperNet, "after_step", killed)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path)
    monkeypatch.setattr(SuperNet, "after_step", step)
    assert any(tmp_path.glob("checkpoint-*"))
    for _ in range(2):  # resumed, then finished already
        assert call(tmp_path).preferences == found.preferences


def test_held_out_blocks_are_the_last_ones_and_not_trained_on(streams):
    train = streams[0]
    part, held_out = split_blocks(train, context=16, share=0.1)
    blocks = BlockDataset(train, 16)
    kept = BlockDataset(part, 16)
    assert len(kept) + len(held_out) == len(blocks)
    assert len(held_out) == round(0.1 * len(blocks))
    for i in range(len(kept)):
        assert torch.equal(kept[i]["input_ids"], blocks[i]["input_ids"])
    for i, row in enumerate(held_out):
        assert torch.equal(row, blocks[len(kept) + i]["input_ids"])
    assert part.sha256 != train.sha256
    assert len(part.sentence) == part.num_tokens
    short = dataclasses.replace(train, ids=train.ids[:20], sentence=train.sentence[:19])
    with pytest.raises(DataError, match="19 tokens, less than two blocks of 16"):
        split_blocks(short, context=16, share=0.1)


def test_held_out_batches_take_every_block_in_turn():
    blocks = torch.arange(5)[:, None].expand(5, 3)
    loss = HeldOutLoss(blocks, batch_size=2, precision=torch.float32, seed=1)
    seen = torch.cat([loss.batch(i)[:, 0] for i in range(5)])
    assert torch.equal(seen.bincount(), torch.full((5,), 2))
    assert torch.equal(loss.batch(0), loss.batch(5))
    assert torch.equal(loss.batch(3), HeldOutLoss(blocks, batch_size=2, precision=torch.float32, seed=1).batch(3))


@pytest.mark.parametrize(
    ("changes", "max_bytes", "message"),
    [
        ({}, 10, "cannot be met: the smallest"),
        ({}, 10**7, "leaves nothing to search"),
        ({"candidates": ("2",)}, None, "at least two"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_it_begins(
    trained, streams, budget, tmp_path, changes, max_bytes, message
):
    model, _ = load_model(trained)
    settings = SETTINGS.model_copy(update=changes)
    with pytest.raises(SpecError, match=message):
        search_precisions(model, *streams, settings, tmp_path, max_bytes=max_bytes or budget, context=16)
    assert not any(tmp_path.iterdir())


def test_unknown_settings_are_refused():
    with pytest.raises(SpecError, match="relaxation"):
        validate(SearchSettings, {"relaxation": "hard"}, where="mixbits search")
    with pytest.raises(SpecError, match="widths"):
        validate(SearchSettings, {"widths": [1]}, where="mixbits search")


@pytest.mark.parametrize(
    "changes",
    [{"relaxation": "gumbel", "basis": "probability"}, {"mode": "outputs", "granularity": "sublayer"}, {"beta": 0.05}],
)
def test_other_ways_to_search(trained, streams, budget, tmp_path, changes):
    model, _ = load_model(trained)
    settings = SETTINGS.model_copy(update={**changes, "epochs": 0.5})
    found = search_precisions(
        model,
        *streams,
        settings,
        tmp_path,
        max_bytes=budget,
        context=16,
        teacher=load_model(trained)[0],
        show_progress=False,
    )
    assert found.one_best.provenance["predicted_bytes"] <= budget
    assert found.sensitivities.provenance["settings"]["relaxation"] == settings.relaxation
    assert found.sensitivities.provenance["basis"] == settings.basis
    if settings.basis == "probability" and found.one_best.provenance["repaired"]:
        assert found.integer_program.specs == found.one_best.specs
    if settings.granularity == "sublayer":
        for group in found.preferences.groups:
            assert len({found.integer_program.specs[name] for name in group}) == 1


def test_a_held_out_loss_that_is_not_finite_names_the_layer(trained, streams):
    model = load_model(trained)[0]
    inventory = find_units(model)
    _, blocks = split_blocks(streams[0], context=16, share=0.1)
    loss = HeldOutLoss(blocks, batch_size=2, precision=torch.float32, seed=1)
    most = predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec(2)))
    net = SuperNet(model, inventory, parse_specs(["1", "2", "4"]), max_bytes=most, held_out_loss=loss, arch_every=1)
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.bias.fill_(float("inf"))
    with pytest.raises(
        DataError,
        match=r"held-out loss is nan at architecture step 1; first not finite: the weights \S+fc2\.bias; expected",
    ):
        net.after_step(model, 1, 10)
