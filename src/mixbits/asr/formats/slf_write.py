"""HTK SLF lattices out: words on links, one utterance a file; see :mod:`mixbits.asr.formats.slf`.

Final scores are written on ``!NULL`` links to a last node, as SLF has none; transition ids are not written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np

from mixbits.asr.formats.lines import packed_file
from mixbits.asr.formats.slf import NULL
from mixbits.asr.lattice import FloatArray, Lattice
from mixbits.errors import DataError


def write_slf(path: str | os.PathLike[str], lattice: Lattice) -> None:
    """Write a lattice (compressed if the name ends in ``.gz`` or ``.xz``); the file appears when complete.

    Transition ids are not written. Raises DataError: a label with a line end.
    """
    with packed_file(path) as file:
        file.writelines(slf_lines(lattice))


def slf_lines(lattice: Lattice) -> Iterator[bytes]:
    """The lines of a lattice."""
    has_end_scores = bool(np.any(lattice.final_lm_score) or np.any(lattice.final_acoustic_score))
    leaves = np.isin(lattice.finals, lattice.src)
    has_last = has_end_scores or len(lattice.finals) > 1 or bool(np.any(leaves))
    end = lattice.num_states if has_last else int(lattice.finals[0])
    yield b"VERSION=1.1\n" + f"UTTERANCE={_quoted(lattice.utterance)}\n".encode()
    if lattice.weights is not None:
        scales = (lattice.weights.lm_scale, lattice.weights.word_insertion_penalty, lattice.weights.acoustic_scale)
        yield "lmscale={!r} wdpenalty={!r} acscale={!r}\n".format(*scales).encode()
    yield f"start={lattice.start} end={end}\n".encode()
    num_last = len(lattice.finals) if has_last else 0
    yield f"N={lattice.num_states + has_last} L={lattice.num_arcs + num_last}\n".encode()
    times = lattice.state_times
    for state in range(lattice.num_states):
        is_known = times is not None and math.isfinite(times[state])
        yield (f"I={state}\tt={float(times[state])!r}\n" if is_known and times is not None else f"I={state}\n").encode()
    if has_last:
        last = math.nan if times is None else float(times[lattice.finals].max())
        yield (f"I={end}\tt={last!r}\n" if math.isfinite(last) else f"I={end}\n").encode()
    labels = [NULL, *map(_quoted, lattice.labels[1:])]
    others = _other_columns(lattice)
    columns = (lattice.src, lattice.dst, lattice.word, lattice.acoustic_score, lattice.lm_score)
    for arc, (src, dst, word, acoustic, lm) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        extra = "".join(f"\t{name}={values[arc]}" for name, values in others.items())
        yield f"J={arc}\tS={src}\tE={dst}\tW={labels[word]}\ta={acoustic!r}\tl={lm!r}{extra}\n".encode()
    if has_last:
        zeros = "".join(f"\t{name}={','.join(['0'] * values[0].count(',') + ['0'])}" for name, values in others.items())
        ends = zip(
            lattice.finals.tolist(), lattice.final_acoustic_score.tolist(), lattice.final_lm_score.tolist(), strict=True
        )
        for arc, (state, acoustic, lm) in enumerate(ends, lattice.num_arcs):
            yield f"J={arc}\tS={state}\tE={end}\tW={NULL}\ta={acoustic!r}\tl={lm!r}{zeros}\n".encode()


def _other_columns(lattice: Lattice) -> dict[str, list[str]]:
    """Texts of the other scores by field, ``i.1`` and ``i.2`` joined as ``i``; nothing where there are no arcs."""
    grouped: dict[str, list[FloatArray]] = {}
    for name in sorted(lattice.other, key=lambda n: (n.partition(".")[0], int(n.partition(".")[2] or 0))):
        grouped.setdefault(name.partition(".")[0], []).append(lattice.other[name])
    found = {}
    for name, columns in grouped.items():
        texts = ([repr(value).removesuffix(".0") for value in column.tolist()] for column in columns)
        found[name] = [",".join(parts) for parts in zip(*texts, strict=True)]
    return found if lattice.num_arcs else {}


def _quoted(label: str) -> str:
    if any(character in label for character in "\n\r"):
        raise DataError(f"label {label[:60]!r} holds a line end, which an SLF file cannot")
    if label and not any(c.isspace() or c in "\"'\\=#" for c in label):
        return label
    return '"' + label.replace("\\", "\\\\").replace('"', '\\"') + '"'
