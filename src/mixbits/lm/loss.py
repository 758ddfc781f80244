"""Cross-entropy over a large vocabulary without holding the logits, and distillation from a teacher.

A word-level softmax dominates a small language model, and on a CPU it is bound by memory traffic. So the hidden states go
through the output layer a few hundred rows at a time: training computes loss and gradients of a chunk together and throws its
logits away (:func:`training_loss`); scoring keeps one number per token (:func:`token_nll`). The chunks of one call share two or three
buffers and everything in them happens in place; their rows are padded to whole cache lines, without which a matrix product with
an odd vocabulary (10,001 words) takes up to 1.4 times as long.

With a teacher the loss is ``(1 - w) * CE(targets) + w * T^2 * KL(teacher_T || student_T)``, where ``_T`` is the softmax of logits / T
(Hinton et al., 2015); its gradient needs only the two distributions, chunk by chunk. To that ``w_h`` times the squared error between hidden
states may be added, over the variance of the teacher's (1 = no better than their mean; :func:`hidden_state_error`).

Models whose logits are not plainly ``output_layer(last hidden state)`` (soft caps, logit scales) are recognised once, by planting
values behind the output layer, and take the ordinary path through full logits. Under bfloat16 the loss value carries the rounding of single probabilities (about 0.2 %
each, averaged over the tokens); its gradients are those of ordinary autocast. All losses are means in nats per token; ``input_ids`` are (B, T + 1): a model reads
the first T and predicts the last T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

_CHUNK_ROWS = 512
_SCORE_CHUNK_ELEMENTS = 8_000_000
_LINE_ELEMENTS = 16  # 64 bytes of float32
_FillLogits = Callable[[slice, torch.Tensor], None]
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
        teacher_logits: _FillLogits | None,
        teacher_weight: float,
        temperature: float,
    ) -> torch.Tensor:
        num_rows, (vocabulary, _) = hidden.shape[0], weight.shape
        low = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and ctx.needs_input_grad[2] else None
        buffers = _logit_buffers(min(num_rows, _CHUNK_ROWS), vocabulary, hidden, 1 if teacher_logits is None else 3)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, num_rows, _CHUNK_ROWS):
            rows = slice(start, min(start + _CHUNK_ROWS, num_rows))
            index = targets[rows, None]
            student, *others = (buffer[: len(index)] for buffer in buffers)
            _fill(student, hidden[rows], low, bias)
            if teacher_logits is None:
                total += _cross_entropy_(student, index).double().sum()
            else:
                teacher_logits(rows, others[0])
                total += _distil_(student, others[0], others[1], index, teacher_weight, temperature).double().sum()
            grad = student[:, :vocabulary]
            torch.mm(grad, low, out=grad_hidden[rows])
            if grad_weight is not None and grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, hidden[rows])
            elif grad_weight is not None:
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
        return *(None if g is None else g * outer.to(g.dtype) for g in ctx.saved_tensors), None, None, None, None


def _logit_buffers(num_rows: int, vocabulary: int, like: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Logits of a chunk, rows padded to whole cache lines (and past powers of two, whose rows share cache sets)."""
    padded = (vocabulary // _LINE_ELEMENTS + 1) * _LINE_ELEMENTS
    return [torch.empty(num_rows, padded, dtype=like.dtype, device=like.device) for _ in range(count)]


def _fill(buffer: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write the logits of hidden rows (n, d) into a buffer (n, padded); the padding gets no probability."""
    logits = buffer[:, : weight.shape[0]]
    torch.mm(hidden, weight.T, out=logits)
    if bias is not None:
        logits += bias.to(logits.dtype)
    _pad(buffer, weight.shape[0])


def _pad(buffer: torch.Tensor, vocabulary: int) -> None:
    buffer[:, vocabulary:] = torch.finfo(buffer.dtype).min / 2  # finite: the difference of two paddings is 0


def _softmax_(logits: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits into probabilities in place; returns log p[index] and the logits' log-partition, each (n, 1)."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    chosen = logits.gather(1, index).to(exact)
    torch.softmax(logits, -1, out=logits)
    log_p = logits.gather(1, index).to(exact).clamp_min_(torch.finfo(torch.float32).tiny).log_()
    return log_p, chosen - log_p


def _cross_entropy_(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row (n, 1); the logits become its gradient."""
    log_p, _ = _softmax_(logits, index)
    logits.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=logits.dtype))
    return -log_p


def _distil_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    spare: torch.Tensor,
    index: torch.Tensor,
    weight: float,
    temperature: float,
) -> torch.Tensor:
    """(1 - w) CE + w T^2 KL(teacher_T || student_T) of each row (n, 1); the student's logits become its gradient.

    KL = log Z_s - log Z_t + sum_v t_v (teacher_v - student_v), with the logits over T. The buffers are used up.
    """
    exact = torch.promote_types(student.dtype, torch.float32)
    softened = student if temperature == 1 else student / temperature
    if temperature != 1:
        teacher.div_(temperature)
    torch.sub(teacher, softened, out=spare)
    log_p, log_partition = _softmax_(softened, index)
    _, teacher_log_partition = _softmax_(teacher, index)
    gap = spare.mul_(teacher).sum(-1, dtype=exact, keepdim=True)
    divergence = log_partition - teacher_log_partition + gap
    if temperature == 1:
        student.sub_(teacher, alpha=weight)
    else:
        log_p, _ = _softmax_(student, index)
        softened.sub_(teacher)
        student.mul_(1 - weight).add_(softened, alpha=weight * temperature)
    student.scatter_add_(1, index, torch.full_like(index, weight - 1.0, dtype=student.dtype))
    return weight * temperature**2 * divergence - (1 - weight) * log_p


def hidden_state_error(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the squared error between hidden states (.., d), over the variance of the teacher's.

    The variance is that over rows, averaged over features: always answering with the teacher's mean state costs 1.
    """
    errors = []
    for mine, other in zip(student, teacher, strict=True):
        exact = torch.promote_types(mine.dtype, torch.float32)
        reference = other.detach().flatten(0, -2).to(exact)
        variance = (reference - reference.mean(0)).square().mean()
        errors.append((mine.flatten(0, -2).to(exact) - reference).square().mean() / variance.clamp_min(1e-12))
    return torch.stack(errors).mean()


def training_loss(
    model: Any,
    input_ids: torch.Tensor,
    *,
    teacher: Any = None,
    teacher_weight: float = 0.0,
    temperature: float = 1.0,
    hidden_weight: float = 0.0,
    hidden_layers: Literal["last", "all"] = "last",
    teacher_hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean loss in nats per token with gradients; works under autocast.

    input_ids: (B, T + 1). ``teacher``: a frozen model over the same vocabulary; ``teacher_weight`` w mixes
    ``(1 - w) * CE + w * temperature^2 * KL``, and ``hidden_weight`` adds that much :func:`hidden_state_error` of the last or
    of all layers' states. ``teacher_hidden``: its last hidden states (B, T, d), if they are known already (plain heads, "last").
    """
    inputs, targets = input_ids[:, :-1], input_ids[:, 1:].reshape(-1)
    distil, match = teacher is not None and teacher_weight > 0, teacher is not None and hidden_weight > 0
    every = match and hidden_layers == "all"
    last, states, logits = _outputs(model, inputs, every=every)
    teacher_logits, teacher_states = None, None
    if distil or match:
        teacher_logits, teacher_states = _teacher_outputs(teacher, inputs, teacher_hidden, every=every)
    if not distil:
        teacher_logits = None
    if logits is not None:
        loss = _full_loss(logits.flatten(0, 1).float(), targets, teacher_logits, teacher_weight, temperature)
    else:
        hidden, head = last.flatten(0, 1), model.get_output_embeddings()
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        with torch.autocast(hidden.device.type, enabled=False):
            loss = _ChunkedCrossEntropy.apply(
                hidden, head.weight, head.bias, targets, teacher_logits, float(teacher_weight), float(temperature)
            )
    if match:
        assert teacher_states is not None
        loss = loss + hidden_weight * hidden_state_error(states, teacher_states)
    return loss


def _outputs(
    model: Any, inputs: torch.Tensor, *, every: bool
) -> tuple[torch.Tensor, Sequence[torch.Tensor], torch.Tensor | None]:
    """(last hidden state, the last or all layers' states, logits where the head is not plain)."""
    plain = has_plain_head(model) and isinstance(model.get_output_embeddings(), nn.Linear)
    if plain and not every:
        last = hidden_states(model, inputs)
        return last, (last,), None
    found = (model.base_model if plain else model)(input_ids=inputs, use_cache=False, output_hidden_states=True)
    last = found.last_hidden_state if plain else found.hidden_states[-1]
    return last, found.hidden_states[1:] if every else (last,), None if plain else found.logits


@torch.no_grad()
def _teacher_outputs(
    teacher: Any, inputs: torch.Tensor, known: torch.Tensor | None, *, every: bool
) -> tuple[_FillLogits, Sequence[torch.Tensor]]:
    """(what writes its logits of some rows into a buffer, its last or all hidden states), from one forward pass or none."""
    if known is None:
        last, states, logits = _outputs(teacher, inputs, every=every)
    else:
        last, states, logits = known, (known,), None
    if logits is not None:
        full = logits.flatten(0, 1)

        def copy(rows: slice, buffer: torch.Tensor) -> None:
            buffer[:, : full.shape[1]] = full[rows]
            _pad(buffer, full.shape[1])

        return copy, states
    hidden, head = last.flatten(0, 1), teacher.get_output_embeddings()
    low = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        low = torch.get_autocast_dtype(hidden.device.type)
    hidden, weight = hidden.to(low), head.weight.detach().to(low)
    bias = None if head.bias is None else head.bias.detach().to(low)

    def multiply(rows: slice, buffer: torch.Tensor) -> None:
        if low == buffer.dtype:
            _fill(buffer, hidden[rows], weight, bias)
        else:
            buffer[:, : len(weight)] = F.linear(hidden[rows], weight, bias)
            _pad(buffer, len(weight))

    return multiply, states


def _full_loss(
    logits: torch.Tensor, targets: torch.Tensor, fill: _FillLogits | None, weight: float, temperature: float
) -> torch.Tensor:
    """The same loss from full logits (n, V) in float32, for heads that are not plain."""
    loss = F.cross_entropy(logits, targets)
    if fill is None:
        return loss
    (buffer,) = _logit_buffers(len(targets), logits.shape[1], logits, 1)
    with torch.no_grad():
        fill(slice(0, len(targets)), buffer)
    reference = (buffer[:, : logits.shape[1]] / temperature).log_softmax(-1)
    divergence = F.kl_div((logits / temperature).log_softmax(-1), reference, log_target=True, reduction="batchmean")
    return (1 - weight) * loss + weight * temperature**2 * divergence


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
