"""Score token tries with a causal language model: every distinct prefix of many hypotheses once, exactly.

One row of the batch is one tree. A node may look at its ancestors only (a 4D mask) and stands at its depth (``position_ids``), so
every node sees what it would see in its own hypothesis, and the arithmetic is that of scoring one by one. Leaves are never
read: a prefix that nothing follows needs no hidden state, only its own probability after its parent. Output-layer rows are
computed once per distinct prefix, a chunk at a time, and reduced to the log-probabilities that are asked for.

The mask is *additive* floating point (0 or the lowest finite number). transformers' eager attention adds a boolean mask as
0/1 and is silently wrong; SDPA and eager are both exact with an additive one. Because other models ignore or
misread such masks (ALiBi, recurrent, index-based local attention), a scorer checks itself on a small forest against
plain scoring when it is made, and refuses the model if they differ.

Memory: trees x (largest tree)^2 mask entries, trees x (largest tree) hidden states, one chunk of logits; the caller
bounds trees x largest tree. :func:`score_sequences` is the slow twin: padded batches, full log-softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mixbits.errors import DataError, SpecError
from mixbits.lm.loss import has_plain_head, hidden_states

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_LOGITS_AT_ONCE = 2_000_000
_LEAST_ROWS_AT_ONCE = 128  # of the output layer, so that its weights are not read for a few rows only
_NAIVE_LOGITS_AT_ONCE = 64_000_000
_EXACT_LAYERS = {"full_attention", "sliding_attention"}
_CHECK_TOLERANCE_NATS = {torch.float32: 1e-3, torch.float64: 1e-6}
_CHECK_TOLERANCE_LOW_PRECISION = 0.05  # relative, for 16-bit models: they round each of a few log-probabilities


class Forest(Protocol):
    """What is needed of :class:`mixbits.asr.trie.TokenForest`: a parent stands before its children, a tree's root first."""

    @property
    def tokens(self) -> IntArray: ...
    @property
    def parents(self) -> IntArray: ...
    @property
    def depths(self) -> IntArray: ...
    @property
    def tree_offsets(self) -> IntArray: ...


@dataclass(frozen=True)
class ForestRows:
    """Inner nodes (those with children) of a forest, one tree a row of ``width`` places, padded at the end.

    ``tokens``, ``positions`` (num_trees, width); ``mask`` (num_trees, width, width): entry (i, j) is true if j is i or an
    ancestor of i (padding sees itself). ``place`` (num_nodes,): row x width + column of an inner node, -1 for a leaf.
    """

    tokens: IntArray
    positions: IntArray
    mask: npt.NDArray[np.bool_]
    place: IntArray


def forest_rows(forest: Forest) -> ForestRows:
    """Lay the inner nodes of a forest out in rows; masks are built a level of depth at a time."""
    parents, depths, offsets = forest.parents, forest.depths, forest.tree_offsets
    num_trees = len(offsets) - 1
    inner = np.zeros(len(parents), dtype=bool)
    inner[parents[parents >= 0]] = True
    tree = np.repeat(np.arange(num_trees), np.diff(offsets))
    before = np.concatenate([[0], np.cumsum(inner)])
    column = before[:-1] - before[offsets[:-1]][tree]
    width = max(1, int(np.diff(before[offsets]).max(initial=1)))
    tokens = np.zeros((num_trees, width), dtype=np.int64)
    positions = np.zeros((num_trees, width), dtype=np.int64)
    tokens[tree[inner], column[inner]] = forest.tokens[inner]
    positions[tree[inner], column[inner]] = depths[inner]
    mask = np.zeros((num_trees, width, width), dtype=bool)
    mask[:, np.arange(width), np.arange(width)] = True
    nodes = np.flatnonzero(inner)
    nodes = nodes[np.argsort(depths[nodes], kind="stable")]
    bounds = np.searchsorted(depths[nodes], np.arange(int(depths.max(initial=0)) + 2))
    for start, stop in pairwise(bounds[1:]):
        level = nodes[start:stop]
        rows, here = tree[level], column[level]
        mask[rows, here] = mask[rows, column[parents[level]]]
        mask[rows, here, here] = True
    place = np.where(inner, tree * width + column, -1)
    return ForestRows(tokens, positions, mask, place)


def additive_mask(mask: npt.NDArray[np.bool_], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(B, 1, N, N): 0 where ``mask`` is true, the lowest finite number of ``dtype`` elsewhere."""
    hidden = torch.from_numpy(~mask).to(device)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)


def max_sequence_length(model: Any) -> int | None:
    """Most ids a sequence may have: the model's positions plus one, because the last id is predicted but never read.

    Positions end at ``max_position_embeddings`` or, where layers slide, at the window. None: the configuration has no bound.
    """
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    kinds = getattr(config, "layer_types", None)
    if kinds is None or "sliding_attention" in kinds:
        limits.append(getattr(config, "sliding_window", None))
    known = [int(limit) for limit in limits if limit]
    return min(known) + 1 if known else None


class ForestScorer:
    """Callable: forest -> (num_nodes,) float64, log p(token | ancestors) in nats, 0 at roots.

    Works for transformers' causal LMs with softmax attention over all earlier positions, full precision or packed. The model
    is put into evaluation mode while scoring.

    Args:
        max_length: most ids of a sequence, all counted; by default :func:`max_sequence_length`.

    Raises:
        SpecError: the model cannot score tries exactly (score it one by one, :class:`SequenceScorer`).
        DataError: its log-probabilities are not finite; token ids outside its vocabulary (when called).
    """

    def __init__(self, model: Any, *, max_length: int | None = None) -> None:
        self.model = model
        self.max_length = max_length or max_sequence_length(model)
        config = model.config.get_text_config()
        self.vocabulary_size = int(config.vocab_size)
        kinds = set(getattr(config, "layer_types", None) or ()) - _EXACT_LAYERS
        if kinds or "local" in (getattr(config, "attention_layers", None) or ()):
            raise SpecError(
                f"{type(model).__name__} has layers that are not plain attention ({', '.join(sorted(kinds)) or 'local'}), so shared "
                "prefixes cannot be scored in one row; score one by one"
            )
        self._check()

    @torch.no_grad()
    def __call__(self, forest: Forest) -> FloatArray:
        highest = int(forest.tokens.max(initial=0))
        if highest >= self.vocabulary_size:
            raise DataError(
                f"token id {highest} is outside the model's vocabulary of {self.vocabulary_size}; use its own tokenizer"
            )
        was_training = self.model.training
        self.model.eval()
        try:
            return self._score(forest)
        finally:
            self.model.train(was_training)

    def _score(self, forest: Forest) -> FloatArray:
        rows = forest_rows(forest)
        num_trees, width = rows.tokens.shape
        scores = np.zeros(len(forest.tokens))
        children = np.flatnonzero(forest.parents >= 0)
        from_place = rows.place[forest.parents[children]]
        children = children[np.argsort(from_place, kind="stable")]
        from_place = np.sort(from_place)
        plain = has_plain_head(self.model)
        step = num_trees if plain else max(1, _LOGITS_AT_ONCE // (width * self.vocabulary_size))
        for first in range(0, num_trees, step):
            part = slice(first, min(first + step, num_trees))
            states = self._forward(rows, part, plain=plain)
            low, high = np.searchsorted(from_place, [part.start * width, part.stop * width])
            places = from_place[low:high] - part.start * width
            scores[children[low:high]] = self._log_probs(states, places, forest.tokens[children[low:high]], plain=plain)
        return scores

    def _forward(self, rows: ForestRows, part: slice, *, plain: bool) -> torch.Tensor:
        """Hidden states (plain head) or logits of some rows, (places, d or vocabulary)."""
        device = next(self.model.parameters()).device
        ids = torch.from_numpy(rows.tokens[part]).to(device)
        inputs = {
            "attention_mask": additive_mask(rows.mask[part], self.model.dtype, device),
            "position_ids": torch.from_numpy(rows.positions[part]).to(device),
        }
        if plain:
            return hidden_states(self.model, ids, **inputs).flatten(0, 1)
        return self.model(input_ids=ids, use_cache=False, **inputs).logits.flatten(0, 1)

    def _log_probs(self, states: torch.Tensor, places: IntArray, tokens: IntArray, *, plain: bool) -> FloatArray:
        """Log-probability of each token after the prefix at its place; ``places`` ascending, so each row is used once."""
        head = self.model.get_output_embeddings() if plain else None
        distinct, owner = np.unique(places, return_inverse=True)
        index = torch.from_numpy(distinct).to(states.device)
        targets, owners = torch.from_numpy(tokens).to(states.device), torch.from_numpy(owner).to(states.device)
        found = torch.empty(len(tokens), dtype=torch.float32, device=states.device)
        chunk = max(_LEAST_ROWS_AT_ONCE, _LOGITS_AT_ONCE // self.vocabulary_size)
        for start in range(0, len(distinct), chunk):
            low, high = (int(bound) for bound in np.searchsorted(owner, [start, start + chunk]))
            picked = states[index[start : start + chunk]]
            logits = (picked if head is None else head(picked)).float()
            local = owners[low:high] - start
            found[low:high] = logits[local, targets[low:high]] - torch.logsumexp(logits, -1)[local]
        return found.double().cpu().numpy()

    def _check(self) -> None:
        """Compare with plain scoring on two small trees. Raises SpecError if they differ, DataError if not finite."""
        forest, sequences = _check_forest(self.vocabulary_size, self.max_length or 6)
        expected = score_sequences(self.model, sequences)
        if not np.all(np.isfinite(expected)):
            raise DataError("the model gives log-probabilities that are not finite; its weights are broken")
        name = type(self.model).__name__
        try:
            nodes = self(forest)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise SpecError(f"{name} takes no ancestor mask ({str(error)[:100]}); score one by one") from error
        got = np.array([nodes[path].sum() for path in forest.paths])
        tolerance = _CHECK_TOLERANCE_NATS.get(self.model.dtype)
        allowed = _CHECK_TOLERANCE_LOW_PRECISION * np.abs(expected) if tolerance is None else tolerance
        if not np.all(np.abs(got - expected) <= allowed):
            worst = float(np.abs(got - expected).max())
            raise SpecError(
                f"{name} scores shared prefixes differently from single sequences (by {worst:.2g} nats), so it does not respect ancestor "
                "masks or positions; load it with attn_implementation='sdpa' or score one by one"
            )


@dataclass(frozen=True)
class _CheckForest:
    tokens: IntArray
    parents: IntArray
    depths: IntArray
    tree_offsets: IntArray
    paths: list[list[int]]


def _check_forest(vocabulary_size: int, max_length: int) -> tuple[_CheckForest, list[list[int]]]:
    """Two trees whose second branches stand in the row after the first ones, and their sequences."""
    tokens = [0, 1, 2, 3, 4, 5, 3, 1, 6, 0, 5, 2, 1]
    parents = [-1, 0, 1, 2, 3, 1, 5, 6, 0, -1, 9, 9, 11]
    depths = [0, 1, 2, 3, 4, 2, 3, 4, 1, 0, 1, 1, 2]
    keep = [node for node, depth in enumerate(depths) if depth < max(max_length, 2)]
    number = {old: new for new, old in enumerate(keep)} | {-1: -1}
    ids = np.array([tokens[node] % vocabulary_size for node in keep])
    above = [number[parents[node]] for node in keep]
    paths: list[list[int]] = []
    for node, parent in enumerate(above):
        paths.append([node] if parent < 0 else [*paths[parent], node])
    leaves = [path for node, path in enumerate(paths) if node not in above and len(path) > 1]
    roots = [node for node, parent in enumerate(above) if parent < 0]
    forest = _CheckForest(
        ids, np.array(above), np.array([depths[node] for node in keep]), np.array([*roots, len(keep)]), leaves
    )
    return forest, [[int(ids[node]) for node in path] for path in leaves]


@torch.no_grad()
def score_sequences(model: Any, sequences: Sequence[Sequence[int]]) -> FloatArray:
    """Summed log-probability (nats) of each sequence after its first id, (num_sequences,): the slow twin.

    One batch, padded on the right (which causal attention never looks at), full log-softmax over the vocabulary.
    """
    lengths = torch.tensor([len(ids) for ids in sequences])
    if len(lengths) == 0 or int(lengths.max()) < 2:
        return np.zeros(len(sequences))
    device = next(model.parameters()).device
    padded = torch.zeros((len(sequences), int(lengths.max())), dtype=torch.long)
    for row, ids in enumerate(sequences):
        padded[row, : len(ids)] = torch.as_tensor(list(ids))
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=padded[:, :-1].to(device), use_cache=False).logits.float()
    finally:
        model.train(was_training)
    log_p = logits.log_softmax(-1).gather(-1, padded[:, 1:, None].to(device)).squeeze(-1).double().cpu()
    scored = torch.arange(1, padded.shape[1])[None, :] < lengths[:, None]
    return torch.where(scored, log_p, 0.0).sum(-1).numpy()


class SequenceScorer:
    """Callable: sequences -> (num_sequences,): :func:`score_sequences` in parts of bounded memory, for any causal LM."""

    def __init__(self, model: Any, *, max_length: int | None = None) -> None:
        self.model = model
        self.max_length = max_length or max_sequence_length(model)

    def __call__(self, sequences: Sequence[Sequence[int]]) -> FloatArray:
        longest = max((len(ids) for ids in sequences), default=1)
        vocabulary_size = int(self.model.config.get_text_config().vocab_size)
        step = max(1, _NAIVE_LOGITS_AT_ONCE // (longest * vocabulary_size))
        parts = [score_sequences(self.model, sequences[i : i + step]) for i in range(0, len(sequences), step)]
        return np.concatenate(parts) if parts else np.zeros(0)
