"""The Triton kernels on a GPU: every interpreter case compiled, and what only a device shows. Skipped aloud without one.

``pytest -m gpu tests/kernels/test_triton_gpu.py``; the figures come from benchmarks/bench_gpu.py.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixbits.kernels.triton.layout import repack
from mixbits.packing.bitpack import pack_codes
from mixbits.spec import QuantSpec

CASES = [Path(__file__).with_name(name) for name in ("triton_cases.py", "triton_operator_cases.py")]
READY = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not READY, reason="no GPU, or no Triton: kernels not run on a device"),
]


def unit(text, rows, cols):
    """A weight on the GPU and its float32 matrix there, made without the kernels."""
    spec, g = QuantSpec.parse(text), torch.Generator().manual_seed(0)
    codes = torch.randint(0, spec.num_levels, (rows, cols), generator=g, dtype=torch.uint8)
    scales = (torch.rand(spec.num_float_scales(rows, cols), generator=g) + 0.1).to(torch.float16)
    weight = repack(pack_codes(codes, spec.code_bits), spec, rows, cols, scales=scales, device="cuda")
    group = torch.arange(cols) // (spec.group_size or cols)
    dense = torch.tensor(spec.levels)[codes.long()] * scales.float().view(rows, -1)[:, group]
    return weight, dense.cuda()


def normal(rows, cols, dtype=torch.float32):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()


def test_all_cases_compiled():
    environment = {**os.environ, "MIXBITS_TEST_DEVICE": "cuda", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES[0].parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 105


@pytest.mark.parametrize("spec", ["1", "2", "3", "4-g128", "8"])
@pytest.mark.parametrize(("kernel", "rows"), [("gemv", 1), ("gemv", 16), ("dot", 64), ("dense", 500), ("dot", 500)])
def test_model_sized_layers(spec, kernel, rows):
    from mixbits.kernels.triton.run import linear

    weight, dense = unit(spec, 4096, 4096)
    x = normal(rows, 4096, torch.bfloat16)
    wanted = x.double() @ dense.double().T
    assert (linear(x, weight, kernel=kernel).double() - wanted).norm() < 6e-3 * wanted.norm()


def test_log_sum_exp_of_a_large_vocabulary():
    from mixbits.kernels.triton.run import log_sum_exp

    weight, dense = unit("2", 50_257, 768)
    x, targets = normal(300, 768) / 30, torch.arange(300, device="cuda") * 160
    lse, logits = log_sum_exp(x, weight, targets)
    wanted = x.double() @ dense.double().T
    torch.testing.assert_close(lse.double(), wanted.logsumexp(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits.double(), wanted.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-4)


def test_a_decoding_step_can_be_captured_in_a_graph():
    """No synchronization and no allocation outside the graph's pool: launches dominate small models, so graphs matter."""
    from mixbits.kernels.triton.run import embedding, linear

    weight, _ = unit("2", 512, 512)
    ids = torch.tensor([3], device="cuda")

    def step():
        return linear(embedding(ids, weight, dtype=torch.bfloat16), weight)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    ids.fill_(500)
    graph.replay()
    assert torch.equal(found, step())


def test_tuned_launch_is_used_afterwards(tmp_path, monkeypatch):
    from mixbits.kernels.triton import dispatch

    monkeypatch.setenv("MIXBITS_GPU_CACHE", str(tmp_path / "gpu.json"))
    weight, _ = unit("2", 1024, 512)
    best = dispatch.tune(weight, 2)
    assert best.measured
    assert dispatch.choose_kernel(2, 1024, 512, 2, device="cuda") == best
    assert not dispatch.choose_kernel(2, 1024, 512, 3, device="cuda").measured
