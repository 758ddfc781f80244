"""sclite trn: ``words (utterance)`` a line, for references and for one-best output.

A line that starts with ``;;`` is a comment. In references ``{ a / b / @ }`` are alternatives (``@`` is nothing; they nest) and ``(word)`` is a
word that may be missing. mixbits counts errors against one text, so these are refused, or with ``alternations="first"`` the first
alternative and the word itself are taken. Hypotheses hold no such marks, and our writer refuses texts that sclite would read as marks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from mixbits.asr.formats.lines import WHITE, check_line, encode_line, packed_file, text_lines
from mixbits.asr.formats.problems import DuplicateError, Report, stop
from mixbits.errors import DataError, FormatError, MixbitsError

FORMAT = "sclite trn"
Alternations = Literal["refuse", "first"]


def read(
    path: str | os.PathLike[str], digest: Any, *, alternations: Alternations = "refuse", report: Report = stop
) -> dict[str, str]:
    """Texts by utterance; words are parted by one space.

    Raises:
        FormatError: a line without ``(utterance)`` at its end, alternatives that are refused or broken.
        DataError: no such file, another encoding, a duplicate utterance.
    """
    texts: dict[str, str] = {}
    first: dict[str, str] = {}
    for where, line in text_lines(os.fspath(path), digest, expected="lines 'words (utterance)'", report=report):
        try:
            parts = split_line(line, where)
            if parts is None:
                continue
            text, utterance = parts
            if utterance in texts:
                raise DuplicateError(f"{where}: utterance {utterance!r} was in {first[utterance]} already")
            texts[utterance] = " ".join(_plain_words(text.split(), alternations, where))
            first[utterance] = where
        except MixbitsError as error:
            report(error)
    return texts


def split_line(line: str, where: str) -> tuple[str, str] | None:
    """(words, utterance) of a line, None for a comment or white space."""
    line = line.strip(WHITE)
    if not line or line.startswith(";;"):
        return None
    words, bracket, utterance = line.rpartition("(")
    if not bracket or not utterance.endswith(")") or not utterance[:-1].strip(WHITE):
        raise FormatError(f"{where}: expected 'words (utterance)', got {line[-60:]!r}")
    return words, utterance[:-1].strip(WHITE)


def _plain_words(words: Sequence[str], alternations: Alternations, where: str) -> list[str]:
    if not any(_is_mark(word) for word in words):
        return list(words)
    if alternations == "refuse":
        raise FormatError(
            f"{where}: alternatives '{{ a / b }}', '@' or '(word)'; errors are counted against one text: "
            "give --alternations first to take the first of each"
        )
    rest = iter(words)
    return list(_first_alternatives(rest, where, depth=0))


def _is_mark(word: str) -> bool:
    return word in ("{", "}", "@") or (word.startswith("(") and word.endswith(")"))


def _first_alternatives(words: Iterator[str], where: str, *, depth: int) -> Iterator[str]:
    """The words up to the end of this alternation (or line), the first alternative's only."""
    if depth > 50:
        raise FormatError(f"{where}: alternatives nested more than 50 deep")
    first = True
    for word in words:
        if word == "}" and depth:
            return
        if word == "}":
            raise FormatError(f"{where}: a '}}' without its '{{'")
        if word == "{":
            inner = list(_first_alternatives(words, where, depth=depth + 1))
            yield from inner if first else ()
        elif word == "/" and depth:
            first = False
        elif first and word != "@":
            yield word[1:-1] if _is_mark(word) else word
    if depth:
        raise FormatError(f"{where}: a '{{' without its '}}'")


def check(pairs: Iterable[tuple[str, str]]) -> None:
    """Raise DataError if :func:`write` cannot keep these (utterance, text) whole."""
    seen: set[str] = set()
    for utterance, text in pairs:
        what = f"the text of utterance {utterance!r}"
        if utterance in seen:
            raise DataError(f"utterance {utterance!r} occurs twice; utterance ids must be unique")
        seen.add(utterance)
        if utterance != utterance.strip() or any(character in utterance for character in "()\n\r") or not utterance:
            raise DataError(
                f"utterance id {utterance[:60]!r} holds brackets or white space at an end, which {FORMAT} cannot"
            )
        words = text.split()
        check_line(" ".join(words), what=what, format_name=FORMAT)
        mark = next((word for word in words if _is_mark(word)), None)
        if mark is not None or (words and words[0].startswith(";;")):
            raise DataError(f"{what} holds {mark or ';;'!r}, which {FORMAT} reads as a mark")


def write(path: str | os.PathLike[str], pairs: Sequence[tuple[str, str]]) -> None:
    """Write (utterance, text) pairs, words parted by one space. Raises DataError: see :func:`check`."""
    check(pairs)
    with packed_file(path) as file:
        for utterance, text in pairs:
            line = f"{' '.join(text.split())} ({utterance})".lstrip()
            file.write(encode_line(line, what=f"the text of utterance {utterance!r}"))
