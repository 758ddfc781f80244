"""Cross-entropy over a large vocabulary without holding the logits.

A word-level softmax dominates a small language model, and on a CPU it is bound by memory traffic. So the hidden states go
through the output layer a few hundred rows at a time: training computes loss and gradients of a chunk together and throws its
logits away (:func:`training_loss`); scoring keeps one number per token (:func:`token_nll`). With a teacher, the gradient
of ``(1 - w) * CE(targets) + w * KL(teacher || student)`` needs only the teacher's probabilities, chunk by chunk.

Models whose logits are not plainly ``output_layer(last hidden state)`` (soft caps, logit scales) are recognised once, by planting
values behind the output layer, and take the ordinary path through full logits. Under bfloat16 the loss value carries the rounding of single probabilities (about 0.2 %
each, averaged over the tokens); its gradients are those of ordinary autocast. All losses are means in nats per token; ``input_ids`` are (B, T + 1): a model reads
the first T and predicts the last T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

_CHUNK_ROWS = 512
_SCORE_CHUNK_ELEMENTS = 8_000_000
_PLAIN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it no module trains (no dropout); afterwards each module's own flag is back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def hidden_states(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Last hidden state (B, T, d) that the output layer reads."""
    return model.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state


def has_plain_head(model: Any) -> bool:
    """True when logits are exactly ``output_layer(last_hidden_state)``; tried once on two tokens and remembered.

    The answer does not depend on the weights, so training cannot make it wrong. Only while hidden states are all zero or not
    finite nothing can be seen: then it is False for now.
    """
    known = _PLAIN_HEADS.get(model)
    if known is None:
        known = _try_head(model)
        if known is None:
            return False
        _PLAIN_HEADS[model] = known
    return known


def _try_head(model: Any) -> bool | None:
    """Does the output layer read the last hidden state, and do logits planted behind it come through untouched?

    The planted logits reach 100, which shows soft caps that the small logits of a fresh model would hide. None: cannot be seen.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    seen: dict[str, torch.Tensor] = {}

    def plant(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen["read"] = args[0]
        planted = torch.linspace(-100, 100, output.numel(), device=output.device)
        seen["logits"] = planted.view_as(output).to(output.dtype)
        return seen["logits"]

    device = next(model.parameters()).device
    ids = torch.tensor([[0, 1]], device=device) % model.config.get_text_config().vocab_size
    hook = head.register_forward_hook(plant)
    try:
        with evaluation_mode(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits, hidden = model(input_ids=ids, use_cache=False).logits, hidden_states(model, ids)
    finally:
        hook.remove()
    if "logits" not in seen or logits.shape != seen["logits"].shape:
        return False
    if not bool(torch.isfinite(hidden).all()) or not bool(hidden.any()):
        return None
    untouched = torch.equal(logits.float(), seen["logits"].float())
    return untouched and torch.allclose(seen["read"].float(), hidden.float(), rtol=1e-3, atol=1e-6)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean loss of rows (n, d) against targets (n,), gradients computed in the forward pass chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        teacher_logits: Callable[[slice], torch.Tensor] | None,
        teacher_weight: float,
    ) -> torch.Tensor:
        num_rows = hidden.shape[0]
        low = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and ctx.needs_input_grad[2] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, num_rows, _CHUNK_ROWS):
            rows = slice(start, min(start + _CHUNK_ROWS, num_rows))
            index = targets[rows, None]
            logits = torch.mm(hidden[rows], low.T)
            if bias is not None:
                logits = logits + bias.to(logits.dtype)
            grad = torch.softmax(logits, -1)
            log_p = grad.gather(1, index).to(exact).clamp_min_(torch.finfo(torch.float32).tiny).log_()
            if teacher_logits is None:
                total -= log_p.double().sum()
                grad.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=grad.dtype))
            else:
                other = teacher_logits(rows)
                teacher = torch.softmax(other, -1)
                # KL(teacher || student) = log Z_s - log Z_t + sum_v t_v (other_v - logits_v); Z from one entry each
                log_t = teacher.gather(1, index).to(exact).clamp_min_(torch.finfo(torch.float32).tiny).log_()
                log_ratio = (logits.gather(1, index).to(exact) - log_p) - (other.gather(1, index).to(exact) - log_t)
                divergence = log_ratio.squeeze(1) + (teacher * (other - logits)).sum(-1, dtype=exact)
                total += (teacher_weight * divergence).double().sum() - (1 - teacher_weight) * log_p.double().sum()
                grad.sub_(teacher, alpha=teacher_weight)
                grad.scatter_add_(1, index, torch.full_like(index, teacher_weight - 1.0, dtype=grad.dtype))
            grad_hidden[rows] = torch.mm(grad, low)
            if grad_weight is not None:
                grad_weight += torch.mm(grad.T, hidden[rows])
            if grad_bias is not None:
                grad_bias += grad.to(exact).sum(0)
        scale = 1.0 / num_rows
        grads = (grad_hidden, grad_weight, grad_bias)
        ctx.save_for_backward(*(None if g is None else g.mul_(scale) for g in grads))
        return (total * scale).to(exact)

    @staticmethod
    def backward(ctx: Any, *grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("training_loss can be differentiated once; use mean_loss with create_graph=True")
        (outer,) = grad_output
        return *(None if g is None else g * outer.to(g.dtype) for g in ctx.saved_tensors), None, None, None


def training_loss(
    model: Any, input_ids: torch.Tensor, *, teacher: Any = None, teacher_weight: float = 0.0
) -> torch.Tensor:
    """Mean loss in nats per token with gradients.

    input_ids: (B, T + 1). ``teacher``: a frozen model over the same vocabulary; ``teacher_weight`` w mixes
    ``(1 - w) * CE + w * KL(teacher || student)``. Works under autocast.
    """
    inputs, targets = input_ids[:, :-1], input_ids[:, 1:].reshape(-1)
    distil = teacher is not None and teacher_weight > 0
    head = model.get_output_embeddings()
    if not (has_plain_head(model) and isinstance(head, nn.Linear)):
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets)
        if not distil:
            return loss
        with torch.no_grad():
            reference = teacher(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), reference, log_target=True, reduction="batchmean")
        return (1 - teacher_weight) * loss + teacher_weight * divergence
    hidden = hidden_states(model, inputs).flatten(0, 1)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    teacher_logits = _teacher_chunks(teacher, inputs) if distil else None
    with torch.autocast(hidden.device.type, enabled=False):
        loss = _ChunkedCrossEntropy.apply(
            hidden, head.weight, head.bias, targets, teacher_logits, float(teacher_weight)
        )
    return loss


def _teacher_chunks(teacher: Any, inputs: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    with torch.no_grad():
        head = teacher.get_output_embeddings()
        if not (has_plain_head(teacher) and isinstance(head, nn.Linear)):
            logits = teacher(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            return lambda rows: logits[rows]
        hidden = hidden_states(teacher, inputs).flatten(0, 1)
        low = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(low), head.weight.detach().to(low)
        bias = None if head.bias is None else head.bias.detach().to(low)
        return lambda rows: F.linear(hidden[rows], weight, bias)


def mean_loss(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Plain differentiable mean cross-entropy (B, T + 1), for curvature: twice differentiable under PyTorch's math attention."""
    logits = model(input_ids=input_ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].reshape(-1))


@torch.no_grad()
def gather_log_probs(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target | hidden) for rows (n, d) and targets (n,), in float32, logits held a chunk at a time."""
    head = model.get_output_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    chunk = max(1, _SCORE_CHUNK_ELEMENTS // vocabulary)
    result = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        logits = head(hidden[rows]).float()
        result[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - torch.logsumexp(logits, -1)
    return result


@torch.no_grad()
def token_nll(model: Any, input_ids: torch.Tensor, *, first: int = 0) -> torch.Tensor:
    """Negative log-probability (nats) of each predicted token, float32 (B, T - first).

    input_ids: (B, T + 1); ``first``: skip that many leading predictions (the overlap of a sliding window).
    """
    inputs, targets = input_ids[:, :-1], input_ids[:, 1:][:, first:]
    if not has_plain_head(model):
        rows = max(1, _SCORE_CHUNK_ELEMENTS // (inputs.shape[1] * model.config.get_text_config().vocab_size))
        parts = []
        for some, wanted in zip(inputs.split(rows), targets.split(rows), strict=True):
            log_probs = model(input_ids=some, use_cache=False).logits[:, first:].float().log_softmax(-1)
            parts.append(-log_probs.gather(-1, wanted[..., None]).squeeze(-1))
        return torch.cat(parts)
    hidden = hidden_states(model, inputs)[:, first:]
    return -gather_log_probs(model, hidden.flatten(0, 1), targets.reshape(-1)).view(targets.shape)
