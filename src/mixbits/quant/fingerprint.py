"""Hashes that say which model and which tokens a measurement was made on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn


def model_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all saved tensors, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def data_hash(batches: Sequence[torch.Tensor]) -> str:
    """SHA-256 over the shapes and token ids of the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{tuple(batch.shape)}\n".encode())
        digest.update(batch.detach().cpu().long().contiguous().numpy().tobytes())
    return digest.hexdigest()
