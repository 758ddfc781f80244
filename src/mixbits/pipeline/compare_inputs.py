"""What is compared: systems read from files of any kind, brought to the same utterances in the same order.

A system is a ranking of hypotheses for every utterance; its output is the first one. n-best lists of every format, rescored lists,
and one-best transcripts (sclite trn, Kaldi ``text``) are read; transcripts are lists of one hypothesis. References come from a file of
their own or else from the first system that has them, and systems that contradict each other about one are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mixbits.asr.formats.references import read_references
from mixbits.asr.formats.registry import ReadOptions, detect_format, read_any
from mixbits.asr.formats.trn import Alternations
from mixbits.asr.nbest import Hypothesis, NBest
from mixbits.asr.weights import Weights
from mixbits.errors import DataError, FormatError, SpecError

_SUFFIXES = (".gz", ".xz", ".jsonl", ".json", ".tsv", ".trn", ".txt")


@dataclass(frozen=True)
class System:
    """One system's lists, best first.

    ``weights``: what the ranking was made with, where that is known; ``num_bytes``: size of its language model's weight files.
    """

    name: str
    lists: tuple[NBest, ...]
    source: str | None = None
    data_hash: str | None = None
    weights: Weights | None = None
    num_bytes: int | None = None

    @property
    def texts(self) -> list[str]:
        """The output: the first hypothesis of every list."""
        return [entry.one_best.text for entry in self.lists]

    @property
    def longest(self) -> int:
        """Hypotheses of the longest list."""
        return max(len(entry.hypotheses) for entry in self.lists)


@dataclass(frozen=True)
class MatchedSystems:
    """Systems whose lists are of the same utterances in the same order, all with the same references, speakers and fields."""

    systems: tuple[System, ...]
    notes: tuple[str, ...] = ()

    @property
    def utterances(self) -> tuple[NBest, ...]:
        """One list an utterance: reference, speaker, conversation and extra fields are those of all systems."""
        return self.systems[0].lists


def read_system(argument: str, *, alternations: Alternations = "refuse") -> System:
    """A system from ``PATH`` or ``NAME=PATH``: n-best lists of any format, or one-best transcripts (trn, Kaldi text).

    The default name is the file's, without the suffixes of formats.

    Raises:
        FormatError, DataError: see the readers. SpecError: ``NAME=`` without a name or a path.
    """
    name, path = _name_and_path(argument)
    if path.is_dir() or _is_lists(path):
        file = read_any(path, options=ReadOptions(alternations=alternations))
        return System(name, file.lists, str(path), file.data_hash)
    found = read_references(path, alternations=alternations)
    lists = tuple(NBest(utterance, (Hypothesis(text, 0.0),)) for utterance, text in found.texts.items())
    return System(name, lists, str(path), found.data_hash)


def match_systems(
    systems: Sequence[System],
    *,
    references: str | Path | None = None,
    alternations: Alternations = "refuse",
    common: bool = False,
) -> MatchedSystems:
    """Bring all systems to the utterances of the first one, in its order, and give all the same references and fields.

    Args:
        references: a file of references (trn, Kaldi text, NeMo manifest), in the place of the lists' own.
        common: compare the utterances that all systems have; otherwise a missing one is an error. Utterances without a
            reference are left out and noted in either case.

    Raises:
        DataError: utterances that differ, references that contradict each other or are missing for all.
        SpecError: fewer than two systems, or two of one name.
    """
    _check_names(systems)
    by_id = [{entry.utterance: entry for entry in system.lists} for system in systems]
    names = _shared_utterances(systems, by_id, common=common)
    notes = []
    if common and (left := max(map(len, by_id)) - len(names)):
        notes.append(
            f"Compared are the {len(names):,} utterances that all systems have; the longest list has {left:,} more."
        )
    texts = None if references is None else read_references(references, alternations=alternations).texts
    facts = [_facts(systems, [lists[name] for lists in by_id], texts) for name in names]
    known = [entry for entry in facts if entry.reference is not None]
    if not known:
        where = "the lists" if references is None else str(references)
        raise DataError(f"{where}: no reference for any of {len(names)} utterances; give them with --references FILE")
    if len(known) < len(facts):
        notes.append(f"{len(facts) - len(known):,} of {len(facts):,} utterances have no reference and are left out.")
    matched = []
    for system, lists in zip(systems, by_id, strict=True):
        rows = tuple(replace(fact, hypotheses=lists[fact.utterance].hypotheses) for fact in known)
        matched.append(replace(system, lists=rows))
    return MatchedSystems(tuple(matched), tuple(notes))


def _name_and_path(argument: str) -> tuple[str, Path]:
    path = Path(argument)
    name, equals, rest = argument.partition("=")
    if equals and not path.exists():
        if not name.strip() or not rest:
            raise SpecError(f"got {argument!r}; expected a file, or NAME=FILE")
        return name.strip(), Path(rest)
    while path.suffix in _SUFFIXES:
        path = path.with_suffix("")
    return path.name, Path(argument)


def _is_lists(path: Path) -> bool:
    """False for a file that no format of n-best lists claims: it is then read as transcripts."""
    try:
        detect_format(path)
    except FormatError:
        return False
    return True


def _check_names(systems: Sequence[System]) -> None:
    if len(systems) < 2:
        raise SpecError(f"a comparison needs at least two systems, got {len(systems)}")
    names = [system.name for system in systems]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"two systems are named {twice!r}; name them apart: NAME=FILE")


def _shared_utterances(systems: Sequence[System], by_id: Sequence[dict[str, NBest]], *, common: bool) -> list[str]:
    """Utterances of the first system that all have, in its order."""
    shared = [name for name in by_id[0] if all(name in lists for lists in by_id)]
    if not shared:
        raise DataError(
            f"systems {systems[0].name!r} and {systems[-1].name!r} share no utterance with all others; their ids are like "
            f"{next(iter(by_id[0]))!r} and {next(iter(by_id[-1]))!r}"
        )
    if not common:
        everything = dict.fromkeys(name for lists in by_id for name in lists)
        for system, lists in zip(systems, by_id, strict=True):
            missing = [name for name in everything if name not in lists]
            if missing:
                raise DataError(
                    f"system {system.name!r} has no output for {len(missing)} utterances that another one has (first: {missing[0]!r}); "
                    "give complete lists, or compare what all have: --common"
                )
    return shared


def _facts(systems: Sequence[System], entries: Sequence[NBest], texts: dict[str, str] | None) -> NBest:
    """The first system's list with reference and fields from wherever they are."""
    first = entries[0]
    own = [
        (system.name, entry.reference)
        for system, entry in zip(systems, entries, strict=True)
        if entry.reference is not None
    ]
    if texts is not None:
        reference = texts.get(first.utterance)
    else:
        reference = own[0][1] if own else None
        for name, other in own[1:]:
            if other.split() != (reference or "").split():
                raise DataError(
                    f"utterance {first.utterance!r} has different references in {own[0][0]!r} ({(reference or '')[:60]!r}) and {name!r} "
                    f"({other[:60]!r}); decide with --references FILE"
                )
    return replace(
        first,
        reference=reference,
        speaker=next((e.speaker for e in entries if e.speaker is not None), None),
        conversation=next((e.conversation for e in entries if e.conversation is not None), None),
        extra={key: value for entry in reversed(entries) for key, value in entry.extra.items()},
    )
