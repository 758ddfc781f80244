"""Mean per token and its error: ordinary statistics for equal lengths, the spread of the estimator otherwise."""

import math

import pytest
import torch

from mixbits.quant.measures.statistics import token_mean


def test_equal_lengths():
    sums = torch.tensor([3.0, 5.0, 10.0])
    mean, error = token_mean(sums, torch.full((3,), 4))
    assert mean == pytest.approx(float((sums / 4).mean()))
    assert error == pytest.approx(float((sums / 4).std()) / math.sqrt(3))
    assert token_mean(sums[:1], torch.tensor([4])) == (0.75, math.inf)


def test_unequal_lengths():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (4000, 50), generator=generator)
    noise = torch.randn(4000, 50, generator=generator)
    sums = lengths * (2.0 + noise)
    found = [token_mean(s, n) for s, n in zip(sums, lengths, strict=True)]
    means, errors = torch.tensor(found).T
    assert float(means.std()) == pytest.approx(float(errors.square().mean().sqrt()), rel=0.05)
