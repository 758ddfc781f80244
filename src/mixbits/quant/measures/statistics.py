"""A mean per token over sequences, with the standard error that says how far it depends on which sequences were drawn."""

from __future__ import annotations

import math

import torch


def token_mean(sums: torch.Tensor, num_tokens: torch.Tensor) -> tuple[float, float]:
    """Sum over tokens of N sequences -> (mean per token, standard error over sequences).

    sums, num_tokens: (N,). The ratio estimator, so longer sequences weigh more; for equal lengths the ordinary standard error
    of a mean. Infinite for one sequence.
    """
    sums, num_tokens = sums.double(), num_tokens.double()
    count, total = len(sums), float(num_tokens.sum())
    mean = float(sums.sum()) / total
    if count == 1:
        return mean, math.inf
    residual = float((sums - mean * num_tokens).square().sum())
    return mean, math.sqrt(residual * count / (count - 1)) / total
