"""Searching precisions with a super-net: a model and text in, sensitivities of the measure ``search`` and two allocations out.

The training stream is cut: the last blocks are held out for the architecture weights, so that the validation text stays
unseen until the search is over. It is only used for the figure in the log (the loss of the most probable choice, as stored); what is
learned is taken from the last step, not from the step of the best validation loss, because the budget is met at the end.

The model is left with the weights of the search; train the allocation from the full-precision model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mixbits.errors import DataError
from mixbits.lm.corpus import BlockDataset, TokenStream
from mixbits.lm.guards import describe_forward
from mixbits.lm.loss import evaluation_mode, training_loss
from mixbits.lm.precision import Precision, resolve_precision
from mixbits.lm.train import TrainSettings, last_complete_checkpoint, train_model, training_device
from mixbits.lm.trainer import METHOD_FILE
from mixbits.pipeline.prepare import training_context
from mixbits.pipeline.search_settings import SearchSettings
from mixbits.quant.allocate import allocate, budget_bytes
from mixbits.quant.fingerprint import data_hash
from mixbits.quant.groups import group_units
from mixbits.quant.search import Preferences, one_best, to_sensitivities
from mixbits.quant.sensitivity import Sensitivities
from mixbits.quant.supernet import SuperNet
from mixbits.quant.units import find_units
from mixbits.runs import hash_text
from mixbits.spec import BitAllocation, parse_specs


@dataclass(frozen=True)
class SearchResult:
    """``sensitivities``: for any budget; ``one_best`` and ``integer_program``: allocations under the search's own budget."""

    preferences: Preferences
    sensitivities: Sensitivities
    one_best: BitAllocation
    integer_program: BitAllocation
    record: dict[str, Any]


def split_blocks(stream: TokenStream, *, context: int, share: float) -> tuple[TokenStream, torch.Tensor]:
    """The stream without its last ``share`` of blocks, and these as (num_blocks, context + 1) int64; at least one each.

    ``num_words`` of the shorter stream is in proportion. Raises DataError when there are fewer than two blocks.
    """
    blocks = BlockDataset(stream, context)
    if len(blocks) < 2:
        raise DataError(
            f"text has {stream.num_tokens} tokens, less than two blocks of {context}: one to train on and one to hold out for "
            "the search; give more text"
        )
    num_held_out = min(len(blocks) - 1, max(1, round(share * len(blocks))))
    first = len(blocks) - num_held_out
    held_out = torch.stack([blocks[i]["input_ids"] for i in range(first, len(blocks))])
    cut = first * context
    part = replace(
        stream,
        ids=stream.ids[: cut + 1],
        sentence=stream.sentence[:cut],
        num_words=round(stream.num_words * cut / stream.num_tokens),
        num_unknown=round(stream.num_unknown * cut / stream.num_tokens),
        sha256=hash_text(f"{stream.sha256} tokens 0 to {cut}"),
    )
    return part, held_out


class HeldOutLoss:
    """Loss (nats per token, dropout off) of the held-out batch of an architecture step: blocks in a seeded order, over and over."""

    def __init__(self, blocks: torch.Tensor, *, batch_size: int, precision: torch.dtype, seed: int) -> None:
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        self.blocks, self.batch_size, self.precision = blocks[order], min(batch_size, len(blocks)), precision

    def batch(self, index: int) -> torch.Tensor:
        """The batch of architecture step ``index`` (batch_size, context + 1)."""
        rows = (torch.arange(self.batch_size) + index * self.batch_size) % len(self.blocks)
        return self.blocks[rows]

    def __call__(self, model: Any, index: int) -> torch.Tensor:
        device = next(model.parameters()).device
        low = nullcontext() if self.precision == torch.float32 else torch.autocast(device.type, self.precision)
        with evaluation_mode(model), low:
            return training_loss(model, self.batch(index).to(device))

    def place(self, model: Any, index: int) -> str:
        """Where the forward pass of that batch goes wrong."""
        return describe_forward(model, self.batch(index)[:, :-1].to(next(model.parameters()).device))


def search_precisions(
    model: Any,
    train: TokenStream,
    valid: TokenStream,
    settings: SearchSettings,
    folder: Path,
    *,
    max_bytes: int | None = None,
    context: int | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    teacher: Any = None,
    title: str = "search",
    show_progress: bool = True,
) -> SearchResult:
    """Search among ``settings.candidates`` under ``max_bytes`` (default: ``settings.ratio``) and allocate.

    ``groups``: unit names that share a choice (default: by ``settings.granularity``); ``teacher``: of the trained weights, with
    ``settings.teacher_weight``. ``model`` is changed. Checkpoints go to ``folder`` and are resumed from; the same call again gives
    the same result. Raises SpecError for a budget outside the candidates' range or a search that collapsed, DataError for text
    that is too short or a loss that is not finite.
    """
    model.to(training_device())
    inventory = find_units(model)
    budget = budget_bytes(inventory, ratio=settings.ratio) if max_bytes is None else max_bytes
    context = context or training_context(model)
    stream, blocks = split_blocks(train, context=context, share=settings.held_out_share)
    precision = resolve_precision(settings.precision, "cuda" if torch.cuda.is_available() else "cpu")
    held_out = HeldOutLoss(
        blocks, batch_size=settings.batch_size, precision=getattr(torch, precision), seed=settings.seed
    )
    method = SuperNet(
        model, inventory, parse_specs(settings.candidates), max_bytes=budget, held_out_loss=held_out,
        groups=groups or group_units(inventory, settings.granularity), mode=settings.mode, relaxation=settings.relaxation,
        temperatures=settings.temperatures, arch_every=settings.arch_every,
        arch_learning_rate=settings.arch_learning_rate, beta=settings.beta, seed=settings.seed,
    )  # fmt: skip
    found = train_model(
        model, stream, valid, _train_settings(settings, context, precision, teacher), folder,
        method=method, teacher=teacher, resume=True, title=title, show_progress=show_progress,
    )  # fmt: skip
    last = last_complete_checkpoint(folder)
    assert last is not None
    method.load_state_dict(torch.load(last / METHOD_FILE, weights_only=True))
    preferences = method.preferences()
    facts = {
        "settings": settings.model_dump(mode="json"),
        "text_sha256": train.sha256,
        "held_out_blocks": len(blocks),
        "held_out_sha256": data_hash([blocks]),
    }
    sensitivities = to_sensitivities(preferences, basis=settings.basis, provenance=facts)
    return SearchResult(
        replace(preferences, provenance={**preferences.provenance, **facts}),
        sensitivities,
        one_best(preferences, max_bytes=budget),
        allocate(inventory, sensitivities, max_bytes=budget, groups=preferences.groups),
        {"steps": found["steps"], "log": found["log"], "precision": precision},
    )


def _train_settings(settings: SearchSettings, context: int, precision: Precision, teacher: Any) -> TrainSettings:
    return TrainSettings(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        context=context,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        precision=precision,
        teacher_weight=settings.teacher_weight if teacher is not None else 0.0,
        seed=settings.seed,
    )
