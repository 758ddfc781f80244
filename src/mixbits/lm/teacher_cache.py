"""The teacher's last hidden states of each training block, computed once.

Blocks do not change between epochs and the teacher is frozen, so its layers need to run once a block; what is left of its share in a
step is the output layer. Measured (4 layers, d 128, 10,001 words, 2,048 tokens, one core): a step takes 0.88 of the time once its
blocks are known, 1.04 while they are filled in. Kept in 16 bits: under bfloat16 that is what the output layer reads anyway, under float32 it is a
rounding to 11 bits. A block always has its states rounded and computed by itself, so that a resumed run, whose cache is empty, gives the
same bits.

Limits: only teachers whose logits are plainly the output layer of the last hidden state; memory is bounded by ``limit_bytes``
(blocks beyond it run the teacher every time), and states beyond the range of float16 are never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from mixbits.lm.corpus import BlockDataset
from mixbits.lm.loss import has_plain_head, hidden_states


class IndexedBlocks(Dataset):
    """Blocks that say which they are: {"input_ids": (context + 1,), "index": int}."""

    def __init__(self, blocks: BlockDataset) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.blocks[index], "index": index}


def can_cache(teacher: Any) -> bool:
    """True when the teacher's logits follow from its last hidden state alone."""
    return has_plain_head(teacher) and isinstance(teacher.get_output_embeddings(), nn.Linear)


class TeacherCache:
    """Last hidden states of the first blocks that fit in ``limit_bytes``, on the CPU, filled as they are asked for."""

    def __init__(
        self, teacher: Any, num_blocks: int, context: int, *, limit_bytes: int, dtype: torch.dtype = torch.float16
    ) -> None:
        width = teacher.get_output_embeddings().in_features
        self.teacher, self.num_kept = teacher, min(num_blocks, limit_bytes // (2 * context * width))
        self._states = torch.empty(self.num_kept, context, width, dtype=dtype)  # pages are taken as they are written
        self._known = torch.zeros(self.num_kept, dtype=torch.bool)

    @property
    def num_known(self) -> int:
        """Blocks held so far."""
        return int(self._known.sum())

    @torch.no_grad()
    def states(self, index: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, d), in float32 or the autocast type, of the blocks ``index`` (B,) that read ``inputs`` (B, T)."""
        rows = [self._block(int(i), block) for i, block in zip(index.tolist(), inputs, strict=True)]
        low = torch.get_autocast_dtype(inputs.device.type) if torch.is_autocast_enabled(inputs.device.type) else None
        return torch.stack(rows).to(inputs.device, low or torch.float32)

    def _block(self, index: int, inputs: torch.Tensor) -> torch.Tensor:
        if index < self.num_kept and self._known[index]:
            return self._states[index]
        exact = hidden_states(self.teacher, inputs[None])[0]
        rounded = exact.to("cpu", self._states.dtype)
        if not bool(torch.isfinite(rounded).all()):
            return exact.cpu()
        if index < self.num_kept:
            self._states[index] = rounded
            self._known[index] = True
        return rounded
