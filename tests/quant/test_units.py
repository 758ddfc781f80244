"""Units of four model families with ties, custom modules, and nothing left uncounted."""

import logging

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mixbits.errors import SpecError
from mixbits.quant.units import as_matrix, find_units, unit_matrices, unit_parameters
from mixbits.spec import ModelInventory, Unit


def test_every_parameter_is_counted_once(model):
    inventory = find_units(model)
    total = sum(p.numel() for p in model.parameters())  # parameters() gives a tied one once
    assert inventory.num_parameters + inventory.unused_position_weights == total
    names = [u.weight for u in inventory.units] + [n for n, _ in inventory.others]
    assert len(names) == len(set(names))
    assert {p.shape for p in unit_parameters(model, inventory).values()} <= {p.shape for p in model.parameters()}


def test_a_tied_softmax_is_the_embedding(model):
    inventory = find_units(model)
    embedding = next(u for u in inventory.units if u.kind == "embedding")
    if model.config.tie_word_embeddings:
        assert embedding.tied == ("lm_head",)
        assert "lm_head" not in {u.name for u in inventory.units}
    else:
        assert embedding.tied == ()
        assert "lm_head" in {u.name for u in inventory.units}


def test_expected_units_of_opt(opt):
    inventory = find_units(opt)
    kinds = {u.name.removeprefix("model.decoder."): (u.kind, u.rows, u.cols) for u in inventory.units}
    layer = "layers.0."
    assert kinds == {
        "embed_tokens": ("embedding", 53, 16),
        "embed_positions": ("embedding", 34, 16),
        **{f"{layer}self_attn.{p}_proj": ("linear", 16, 16) for p in ("k", "v", "q", "out")},
        layer + "fc1": ("linear", 24, 16),
        layer + "fc2": ("linear", 16, 24),
    }
    # OPT keeps two more position rows than it can use.
    assert inventory.unused_position_weights == 2 * 16
    assert [u.name for u in inventory.units if u.is_position_table] == ["model.decoder.embed_positions"]


def test_a_subclass_is_no_unit_not_even_of_the_position_table(opt):
    class Shifted(type(opt.model.decoder.embed_positions)):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    opt.model.decoder.embed_positions.__class__ = Shifted
    inventory = find_units(opt)
    assert not any(u.is_position_table for u in inventory.units)
    assert ("model.decoder.embed_positions.weight", (34, 16)) in inventory.others
    assert inventory.unused_position_weights == 2 * 16


def test_conv1d_is_seen_as_outputs_by_inputs():
    module = nn.Sequential(Conv1D(6, 4))  # 4 inputs, 6 outputs, stored (4, 6)
    (unit,) = find_units(module).units
    assert (unit.kind, unit.rows, unit.cols) == ("conv1d", 6, 4)
    matrix = unit_matrices(module, find_units(module))["0"]
    assert matrix.shape == (6, 4)
    assert torch.equal(matrix, module[0].weight.detach().T)
    assert as_matrix(torch.zeros(2, 3), "linear").shape == (2, 3)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.table = nn.Parameter(torch.zeros(10, 10))
        self.register_buffer("saved", torch.zeros(5))
        self.register_buffer("scratch", torch.zeros(99), persistent=False)
        self.register_buffer("counter", torch.zeros(2, dtype=torch.long))


def test_other_parameters_are_named_counted_and_told(caplog):
    with caplog.at_level(logging.WARNING):
        inventory = find_units(Custom())
    assert dict(inventory.others) == {"linear.bias": (4,), "table": (10, 10), "saved": (5,)}
    assert inventory.num_parameters == 12 + 4 + 100 + 5
    assert "table (10, 10) is not a unit" in caplog.text


def test_linear_shared_by_two_modules_is_one_unit():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    (unit,) = find_units(module).units
    assert (unit.name, unit.tied) == ("a", ("b",))


def test_bad_models():
    with pytest.raises(SpecError, match=r"no nn\.Linear"):
        find_units(nn.LayerNorm(4))
    crossed = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Conv1D(4, 4)})
    crossed["b"].weight = crossed["a"].weight
    with pytest.raises(SpecError, match="other orientation"):
        find_units(crossed)
    missing = ModelInventory((Unit("nowhere", "nowhere.weight", 4, 4, "linear"),), ())
    with pytest.raises(SpecError, match="'nowhere'"):
        unit_parameters(nn.Linear(4, 4), missing)
