"""The PyTorch operators: registered as PyTorch wants them, traced by torch.compile, clear about what they cannot do."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mixbits.errors import SpecError
from mixbits.kernels import cpu, ops

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="no compiled library (no C++ compiler here)")
SPECS = ("1.58", "3-g7", "4-half-step-g32-s8", "8", "16")


def rows(m, cols, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((m, cols)).astype(np.float32))


def numbers(matrix):
    k = matrix.layout
    return matrix.packed, matrix.scales, None, matrix.rows, matrix.cols, k.group, k.bits, k.mul, k.off


OFFSETS, TARGETS = torch.tensor([0, 2, 2, 3]), torch.tensor([0, 32, 7])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_values(twin, spec, activations):
    t = twin(spec, 33, 20)
    x, bias = rows(6, 20), torch.arange(33.0)
    for given in (None, bias):
        y = ops.linear(x, t.matrix, given, activations=activations)
        extra = None if given is None else given.numpy()
        if activations == "int8" and spec != "16":
            assert torch.equal(y, torch.from_numpy(t.int8_product(x.numpy(), extra)))
        else:
            exact = x.numpy().astype(np.float64) @ t.exact.T + (0 if extra is None else extra)
            assert np.abs(y.numpy() - exact).max() <= 1e-5 * max(1.0, np.abs(exact).max())
    logits = ops.linear(x, t.matrix, bias, activations=activations).double().log_softmax(-1)
    offsets, targets = torch.tensor([0, 1, 1, 3, 3, 3, 4]), torch.tensor([4, 0, 32, 9])
    found, partition = ops.log_softmax_at(x, t.matrix, offsets, targets, bias, activations=activations)
    assert torch.allclose(found.double(), logits[[0, 2, 2, 5], targets], atol=1e-5, rtol=1e-6)
    assert partition.shape == (6,)
    ids = torch.tensor([[0, 32], [5, 0]])
    assert torch.equal(ops.embedding(ids, t.matrix), torch.from_numpy(t.rounded)[ids])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(twin, dtype):
    t = twin("4", 33, 20)
    x, bias = rows(5, 20).to(dtype), rows(1, 33)[0].to(dtype)
    y = ops.linear(x, t.matrix, bias)
    assert y.dtype == dtype
    assert torch.equal(y, ops.linear(x.float(), t.matrix, bias.float()).to(dtype))
    found, partition = ops.log_softmax_at(x[:3], t.matrix, OFFSETS.int(), TARGETS.short(), bias)
    assert found.dtype == partition.dtype == torch.float32
    expected = ops.log_softmax_at(x[:3].float(), t.matrix, OFFSETS, TARGETS, bias.float())
    assert torch.equal(found, expected[0])
    assert torch.equal(partition, expected[1])
    ids = torch.tensor([3, 1])
    for kind in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(ops.embedding(ids.to(kind), t.matrix), ops.embedding(ids, t.matrix))


def test_shapes_and_strides(twin):
    t = twin("2", 33, 20)
    flat = ops.linear(rows(24, 20), t.matrix)
    assert torch.equal(ops.linear(rows(24, 20).view(2, 3, 4, 20), t.matrix), flat.view(2, 3, 4, 33))
    assert torch.equal(ops.linear(rows(24, 20)[5], t.matrix), flat[5])
    assert torch.equal(ops.linear(rows(24, 20).T.contiguous().T, t.matrix), flat)
    assert torch.equal(ops.linear(rows(24, 40)[:, ::2], t.matrix), ops.linear(rows(24, 40)[:, ::2].clone(), t.matrix))
    assert torch.equal(ops.linear(rows(1, 20).expand(3, 20), t.matrix), ops.linear(rows(1, 20), t.matrix).expand(3, 33))
    bias = torch.arange(66.0)[::2]
    assert torch.equal(ops.linear(rows(2, 20), t.matrix, bias), ops.linear(rows(2, 20), t.matrix, bias.clone()))
    for empty in ((0, 20), (0, 3, 20), (3, 0, 20)):
        assert ops.linear(torch.zeros(empty), t.matrix).shape == (*empty[:-1], 33)
    ids = torch.arange(24).view(4, 6)
    assert torch.equal(ops.embedding(ids.T, t.matrix), ops.embedding(ids, t.matrix).transpose(0, 1))
    assert ops.embedding(torch.tensor(5), t.matrix).shape == (20,)
    assert ops.embedding(torch.zeros(0, 2, dtype=torch.long), t.matrix).shape == (0, 2, 20)
    found, partition = ops.log_softmax_at(rows(24, 20).view(4, 6, 20), t.matrix, torch.arange(25), torch.arange(24))
    assert found.shape == (24,)
    assert partition.shape == (4, 6)
    found, partition = ops.log_softmax_at(rows(1, 20)[0], t.matrix, torch.tensor([0, 1]), torch.tensor([3]))
    assert partition.shape == ()


def test_arguments_that_do_not_fit(twin):
    m = twin("2-g7", 33, 20).matrix
    x = rows(3, 20)
    for bad, message in (
        (x[:, :19], "20 in the last dimension"),
        (x.long(), "floating"),
        (torch.tensor(1.0), "floating"),
    ):
        with pytest.raises(SpecError, match=message):
            ops.linear(bad, m)
    with pytest.raises(SpecError, match=r"bias has shape \(32,\); expected \(33,\)"):
        ops.linear(x, m, torch.zeros(32))
    with pytest.raises(SpecError, match=r"ids are torch\.float32"):
        ops.embedding(x, m)
    for ids in ([33], [-1], [2**40]):
        with pytest.raises(SpecError, match="mixbits::embedding: a token id is outside the vocabulary"):
            ops.embedding(torch.tensor(ids), m)
    for offsets, targets, message in (
        ([0, 1, 2], [0, 1], "offsets have shape"),
        ([0, 1, 2, 3], [0, 1], "number of targets"),
        ([0, 2, 1, 2], [0, 1], "mixbits::log_softmax_at: a buffer"),
        ([0, 2, 2, 2], [1, 0], "mixbits::log_softmax_at: a token"),
        ([0, 0, 1, 2], [0, 33], "outside the vocabulary"),
    ):
        with pytest.raises(SpecError, match=message):
            ops.log_softmax_at(x, m, torch.tensor(offsets), torch.tensor(targets))
    with pytest.raises(SpecError, match=r"targets are torch\.float32"):
        ops.log_softmax_at(x, m, torch.tensor([0, 0, 0, 1]), torch.tensor([1.0]))
    with pytest.raises(SpecError, match="activations is 'bf16'"):
        ops.linear(x, m, activations="bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, dtype=torch.uint8)}, "packed is torch.uint8 with 3 bytes"),
        ({0: torch.zeros(3)}, "packed is torch.float32"),
        ({1: torch.zeros(3)}, r"scales are torch.float32 \(3,\)"),
        ({1: torch.zeros(192, dtype=torch.float64)}, "scales are torch.float64"),
        ({2: torch.zeros(3)}, "group_scales are given"),
        ({3: 0}, "packed is"),
        ({3: 2**40}, "packed is"),
        ({4: 19}, "floating-point numbers, 19"),
        ({5: -1}, "packed is"),
        ({6: 5}, "packed is"),
        ({6: 8}, "packed is"),
        ({7: 3}, "no such bit width"),
        ({8: 300}, "no such bit width"),
    ],
)
def test_numbers_that_do_not_belong_to_the_tensors(twin, change, message):
    """The raw operator takes nothing on trust: it would read outside the tensors."""
    arguments = list(numbers(twin("2-g7", 33, 20).matrix))
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(SpecError, match=message):
        torch.ops.mixbits.linear(rows(3, 20), *arguments, None, 0)


def test_no_gradients_and_saying_so(twin):
    m = twin("2", 33, 20).matrix
    x = rows(3, 20).requires_grad_()
    with pytest.raises(RuntimeError, match=r"mixbits::linear has no gradient.*torch\.no_grad"):
        ops.linear(x, m)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.linear(x.detach(), m, torch.zeros(33, requires_grad=True))
    with pytest.raises(RuntimeError, match="mixbits::log_softmax_at has no gradient"):
        ops.log_softmax_at(x, m, OFFSETS, TARGETS)
    with torch.no_grad():
        assert not ops.linear(x, m).requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.linear(x, m), ops.linear(x.detach(), m))
    assert not ops.linear(x.detach(), m).requires_grad


def test_opcheck(twin):
    """PyTorch's own tests of an operator: schema, fake kernel against the real one, with dynamic shapes."""
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for spec in ("2", "4-g7", "16"):
        arguments = numbers(twin(spec, 33, 20).matrix)
        for bias in (None, torch.zeros(33)):
            torch.library.opcheck(torch.ops.mixbits.linear, (rows(3, 20), *arguments, bias, 0), test_utils=utilities)
        torch.library.opcheck(torch.ops.mixbits.linear, (rows(6, 20).view(2, 3, 20).half(), *arguments, None, 1), test_utils=utilities)  # fmt: skip
        torch.library.opcheck(torch.ops.mixbits.embedding, (torch.tensor([[0, 5]]), *arguments), test_utils=utilities)
        torch.library.opcheck(
            torch.ops.mixbits.log_softmax_at, (rows(3, 20), *arguments, None, OFFSETS, TARGETS, 0), test_utils=utilities
        )


@pytest.mark.slow
def test_compiled_without_graph_breaks(twin):
    """One graph for a whole function, other numbers of rows included, and the same bits as eager."""
    first, last = twin("4", 24, 20).matrix, twin("1.58-g7", 33, 24).matrix

    def model(ids, x, offsets, targets):
        hidden = ops.embedding(ids, first) + x
        hidden = torch.relu(ops.linear(hidden, first))
        return ops.log_softmax_at(hidden, last, offsets, targets)[0], ops.linear(hidden, last)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="inductor")
    with torch.no_grad():
        for m in (3, 5, 8):
            arguments = (torch.arange(m), rows(m, 20), torch.arange(m + 1), torch.arange(m) * 3)
            for mine, theirs in zip(compiled(*arguments), model(*arguments), strict=True):
                assert torch.equal(mine, theirs)


def test_traced_as_one_graph(twin):
    """The quick part of the above: no code is generated."""
    matrix = twin("3", 24, 20).matrix
    compiled = torch.compile(lambda x: ops.linear(x, matrix) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(rows(3, 20)), ops.linear(rows(3, 20), matrix) * 2)


def test_gpu_tensors_are_traced_and_have_kernels(twin):
    """Shapes, dtypes and devices as on a GPU that need not be there; what computes them: triton_operator_cases.py."""
    for name in ("linear", "embedding", "log_softmax_at"):
        for key in ("CUDA", "AutogradCUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mixbits::{name}", key)
    with FakeTensorMode(), torch.device("cuda"):
        words, scales = torch.empty(3, 1, 4, 16, 8, dtype=torch.int32), torch.empty(48)
        arguments = (words, scales, torch.empty(3, 48, dtype=torch.float16), 33, 20, 7, 4, 1, 7)
        x = torch.empty(2, 3, 20, dtype=torch.bfloat16)
        y = torch.ops.mixbits.linear(x, *arguments, None, 1)
        rows = torch.ops.mixbits.embedding(torch.empty(5, dtype=torch.int64), *arguments)
        offsets, targets = torch.empty(7, dtype=torch.int64), torch.empty(4, dtype=torch.int64)
        found = torch.ops.mixbits.log_softmax_at(x, *arguments, None, offsets, targets, 1)
    facts = [(tuple(t.shape), t.dtype, t.device.type) for t in (y, rows, *found)]
    f32 = torch.float32
    assert facts == [
        ((2, 3, 33), torch.bfloat16, "cuda"),
        ((5, 20), f32, "cuda"),
        ((4,), f32, "cuda"),
        ((2, 3), f32, "cuda"),
    ]


class Elsewhere(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cpu = property(lambda self: False)
    device = property(lambda self: torch.device("cuda", 0))


def test_tensors_on_a_gpu_never_reach_the_library(twin):
    m = twin("2-g7", 33, 20).matrix
    x, bias = rows(3, 20), torch.zeros(33)
    calls = {
        "x": lambda: ops._rows_of(x.as_subclass(Elsewhere), 20),
        "bias": lambda: ops._multiply(x, m.struct, bias.as_subclass(Elsewhere), 0),
        "packed": lambda: ops._matrix(m.packed.as_subclass(Elsewhere), *numbers(m)[1:]),
        "scales": lambda: ops._matrix(m.packed, m.scales.as_subclass(Elsewhere), *numbers(m)[2:]),
        "ids": lambda: ops._embedding(torch.tensor([1]).as_subclass(Elsewhere), *numbers(m)),
        "targets": lambda: ops._log_softmax_at(x, *numbers(m), None, OFFSETS, TARGETS.as_subclass(Elsewhere), 0),
    }
    for name, call in calls.items():
        with pytest.raises(SpecError, match=f"{name} is on cuda:0.*move the model"):
            call()
