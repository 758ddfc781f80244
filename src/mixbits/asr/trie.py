"""Token tries of hypotheses: every distinct prefix once.

The hypotheses of a list share most of their prefixes, and a causal LM's log p(token | prefix) depends on the
prefix alone, so a list needs one model position per trie node instead of one per token. A :class:`TokenForest` holds
several such trees (one or more per list) as flat integer arrays; a scorer gives each node the log-probability of its
token after its ancestors, and a hypothesis' score is the sum over its path. The arithmetic is that of scoring each
hypothesis alone; only the sharing differs.

A node's context are its ancestors *of the same tree*; its position is its depth.

With ``merge_order`` n, histories of a tree that are equal in their last n tokens share one state, that of the earliest sequence which
reached it (an approximation, as n-gram history merging in lattice rescoring; Liu et al., 2016): what follows them is scored
once. A sequence then visits nodes of several branches, and its score is the sum over its visits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mixbits.errors import DataError, SpecError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_PASS_POSITIONS = 64  # what a forward pass costs besides its positions, in positions


@dataclass(frozen=True)
class TokenForest:
    """Trees over token ids; node arrays have shape (num_nodes,).

    ``tokens``: the id of each node. ``parents``: node number of the parent, −1 at a root; a parent comes before its
    children. ``depths``: 0 at a root. ``tree_offsets`` (num_trees + 1,): tree i owns the nodes
    ``tree_offsets[i]:tree_offsets[i + 1]``, its root first. ``ends`` (num_sequences,): the node where each
    sequence ends. ``num_tokens``: tokens of all sequences, roots not counted (what scoring one by one would score).
    ``visits``, ``visit_offsets`` (num_sequences + 1,): of merged histories, the nodes of each sequence without its root; else None.
    """

    tokens: IntArray
    parents: IntArray
    depths: IntArray
    tree_offsets: IntArray
    ends: IntArray
    num_tokens: int
    visits: IntArray | None = None
    visit_offsets: IntArray | None = None

    @property
    def num_nodes(self) -> int:
        """Nodes of all trees, roots included."""
        return len(self.tokens)

    @property
    def num_trees(self) -> int:
        """Number of trees."""
        return len(self.tree_offsets) - 1

    @property
    def max_tree_nodes(self) -> int:
        """Nodes of the largest tree: the row length when trees are rows of a batch."""
        return int(np.diff(self.tree_offsets).max(initial=0))

    def ancestor_mask(self, tree: int) -> npt.NDArray[np.bool_]:
        """(n, n) for the n nodes of a tree: entry (i, j) is true if j is i or an ancestor of i."""
        start, stop = int(self.tree_offsets[tree]), int(self.tree_offsets[tree + 1])
        mask = np.eye(stop - start, dtype=bool)
        for node in range(1, stop - start):
            mask[node] |= mask[self.parents[start + node] - start]
        return mask

    def path(self, sequence: int) -> IntArray:
        """The nodes of a sequence from root to end (merged histories: the branch of its last node)."""
        nodes = []
        node = int(self.ends[sequence])
        while node >= 0:
            nodes.append(node)
            node = int(self.parents[node])
        return np.array(nodes[::-1], dtype=np.int64)

    def sequence_scores(self, node_scores: npt.ArrayLike) -> FloatArray:
        """Sum of the node scores along each sequence's path or visits, (num_sequences,), summed in float64.

        Raises:
            DataError: wrong shape, or a score that is not finite.
        """
        scores = np.asarray(node_scores, dtype=np.float64)
        if scores.shape != (self.num_nodes,):
            raise DataError(f"the scorer gave shape {scores.shape}; expected one number a node, ({self.num_nodes},)")
        if not np.all(np.isfinite(scores)):
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise DataError(
                f"the scorer gave {scores[bad]} for token id {self.tokens[bad]} at depth {self.depths[bad]}; "
                "expected a finite log-probability (a broken model, or an id outside its vocabulary?)"
            )
        if self.visits is not None and self.visit_offsets is not None:
            running = np.concatenate([[0.0], np.cumsum(scores[self.visits])])
            return running[self.visit_offsets[1:]] - running[self.visit_offsets[:-1]]
        summed = scores.copy()
        order = np.argsort(self.depths, kind="stable")
        bounds = np.searchsorted(self.depths[order], np.arange(int(self.depths.max(initial=0)) + 2))
        for start, stop in pairwise(bounds[1:]):
            level = order[start:stop]
            summed[level] += summed[self.parents[level]]
        return summed[self.ends]


def build_forest(trees: Sequence[Sequence[Sequence[int]]], *, merge_order: int | None = None) -> TokenForest:
    """One tree per entry of ``trees``, which is a list of token-id sequences.

    Args:
        merge_order: histories of a tree that are equal in this many last tokens share a state; None: exact.

    Raises:
        DataError: an empty tree or sequence, or sequences of a tree that do not all start with the same (boundary) token.
        SpecError: a merge order below 1.
    """
    if merge_order is not None and merge_order < 1:
        raise SpecError(f"merge order is {merge_order}; expected at least 1 token of history")
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    visits: list[int] = []
    offsets, ends, visit_offsets, num_tokens = [0], [], [0], 0
    for number, sequences in enumerate(trees):
        if not sequences:
            raise DataError(f"tree {number} has no token sequences")
        boundary = sequences[0][0] if len(sequences[0]) else None
        children: dict[tuple[int, int], int] = {}
        states: dict[tuple[int, ...], int] = {}
        root = len(tokens)
        tokens.append(int(boundary) if boundary is not None else 0)
        parents.append(-1)
        depths.append(0)
        for sequence in sequences:
            if not len(sequence) or sequence[0] != boundary:
                got = list(sequence[:1])
                raise DataError(
                    f"token sequences of a tree must all start with the boundary token {boundary}; one starts {got}"
                )
            state = root
            node = root
            for place, token in enumerate(sequence[1:], 1):
                key = (state, int(token))
                following = children.get(key)
                if following is None:
                    following = children[key] = len(tokens)
                    tokens.append(key[1])
                    parents.append(state)
                    depths.append(depths[state] + 1)
                node = state = following
                if merge_order is not None:
                    visits.append(node)
                    if place >= merge_order:
                        state = states.setdefault(tuple(sequence[place - merge_order + 1 : place + 1]), node)
            ends.append(node)
            visit_offsets.append(len(visits))
            num_tokens += len(sequence) - 1
        offsets.append(len(tokens))
    return TokenForest(
        tokens=np.asarray(tokens, dtype=np.int64),
        parents=np.asarray(parents, dtype=np.int64),
        depths=np.asarray(depths, dtype=np.int64),
        tree_offsets=np.asarray(offsets, dtype=np.int64),
        ends=np.asarray(ends, dtype=np.int64),
        num_tokens=num_tokens,
        visits=None if merge_order is None else np.asarray(visits, dtype=np.int64),
        visit_offsets=None if merge_order is None else np.asarray(visit_offsets, dtype=np.int64),
    )


def split_by_nodes(sequences: Sequence[Sequence[int]], *, max_nodes: int) -> list[tuple[int, list[int]]]:
    """Cut a list of sequences, in order, so that each part's trie has at most ``max_nodes`` nodes, the root counted.

    Returns (nodes, indices of the sequences) of each part. A single sequence longer than that is a part of its own.
    """
    parts: list[tuple[int, list[int]]] = []
    members: list[int] = []
    seen: set[tuple[int, int]] = set()
    numbers: dict[tuple[int, int], int] = {}
    for index, sequence in enumerate(sequences):
        added = _new_prefixes(sequence, numbers, seen)
        if members and len(seen) + len(added) + 1 > max_nodes:
            parts.append((len(seen) + 1, members))
            members = []
            seen.clear()
            added = _new_prefixes(sequence, numbers, seen)
        seen.update(added)
        members.append(index)
    if members:
        parts.append((len(seen) + 1, members))
    return parts


def _new_prefixes(
    sequence: Sequence[int], numbers: dict[tuple[int, int], int], seen: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Prefixes of ``sequence`` (as (number of the shorter prefix, token)) that are not in ``seen``."""
    state, added = 0, []
    for token in sequence[1:]:
        key = (state, int(token))
        state = numbers.setdefault(key, len(numbers) + 1)
        if key not in seen:
            added.append(key)
    return added


def plan_forests(
    lists: Sequence[Sequence[Sequence[int]]], *, max_tokens: int, merge_order: int | None = None
) -> Iterator[tuple[TokenForest, list[tuple[int, int]]]]:
    """Forests over all lists, each with the (list, hypothesis) of every sequence in it.

    Trees are sorted by size and divided so that padded positions (trees × largest tree) and the cost of each forest's own pass are
    least, where trees × largest tree is at most ``max_tokens``, so that memory does not depend on the lists. A list whose trie is larger
    is cut into several trees; only a single sequence longer than ``max_tokens`` exceeds it, alone. ``merge_order``: see :func:`build_forest`.
    """
    trees: list[tuple[int, int, list[int]]] = []
    for number, sequences in enumerate(lists):
        for size, part in split_by_nodes(sequences, max_nodes=max_tokens):
            if merge_order is not None:
                size = build_forest([[sequences[index] for index in part]], merge_order=merge_order).num_nodes
            trees.append((size, number, part))
    trees.sort(key=lambda tree: tree[:2])
    for start, stop in pairwise(_bounds([size for size, _, _ in trees], max_tokens)):
        yield _forest_of(lists, trees[start:stop], merge_order)


def _bounds(sizes: Sequence[int], max_tokens: int) -> list[int]:
    """Where to cut ascending tree sizes into forests, the ends included: the least cost by dynamic programming."""
    costs, starts = [0], [0]
    for stop, size in enumerate(sizes, 1):
        first = max(0, stop - max(1, max_tokens // size))
        cost, start = min((costs[cut] + size * (stop - cut) + _PASS_POSITIONS, cut) for cut in range(first, stop))
        costs.append(cost)
        starts.append(start)
    bounds = [len(sizes)]
    while bounds[-1]:
        bounds.append(starts[bounds[-1]])
    return bounds[::-1]


def _forest_of(
    lists: Sequence[Sequence[Sequence[int]]], batch: Sequence[tuple[int, int, list[int]]], merge_order: int | None
) -> tuple[TokenForest, list[tuple[int, int]]]:
    forest = build_forest(
        [[lists[number][index] for index in part] for _, number, part in batch], merge_order=merge_order
    )
    return forest, [(number, index) for _, number, part in batch for index in part]
