"""Plain lower-case sentences from Python's documentation, split into train, valid, test and speech.

Documents are cut into paragraphs, freed of doctest, code blocks, headings and reStructuredText marks, split
into sentences and written as words: letters a-z with inner apostrophes, one space between words, no punctuation.
Identifiers are split into their words (`os.path.join()` is "os path join"), numbers are spelled, and a sentence
that is mostly symbols is dropped. Sentences are unique, so a held-out sentence is never in the training text.
Near-duplicates ("return the name" / "return a name") do stay on both sides: the perplexities of the demo are
those of repetitive prose.

The split hashes each sentence's text, not its position, so that adding a document moves no other sentence.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from textwrap import dedent

MIN_WORDS, MAX_WORDS = 4, 40
SPEECH_MIN_WORDS, SPEECH_MAX_WORDS = 4, 16
VALID_SHARE, TEST_SHARE, SPEECH_SHARE = 0.04, 0.04, 0.12

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_COMMON = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "can",
        "for",
        "from",
        "if",
        "in",
        "is",
        "it",
        "not",
        "of",
        "on",
        "or",
        "return",
        "returns",
        "that",
        "the",
        "this",
        "to",
        "with",
        "you",
    ]
)
_ABBREVIATIONS = {
    "e.g.": "for example",
    "i.e.": "that is",
    "etc.": "and so on",
    "vs.": "versus",
    "cf.": "see",
    "n.b.": "note",
}
_CODE_SYMBOLS = re.compile(r"[=<>{}\[\]|\\@$%#^~+&_/*]")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


def spell_number(digits: str) -> str:
    """The words of a whole number of at most six digits; longer ones digit by digit."""
    value = int(digits)
    if len(digits) > 6 or (len(digits) > 1 and digits[0] == "0"):
        return " ".join(_ONES[int(digit)] for digit in digits)
    if value < 20:
        return _ONES[value]
    if value < 100:
        rest = "" if value % 10 == 0 else " " + _ONES[value % 10]
        return _TENS[value // 10] + rest
    size, name = (1000, "thousand") if value >= 1000 else (100, "hundred")
    rest = "" if value % size == 0 else " " + spell_number(str(value % size))
    return f"{spell_number(str(value // size))} {name}{rest}"


def prose_paragraphs(document: str) -> Iterator[str]:
    """Yield the prose paragraphs of a docstring or topic as single lines; code, doctest and headings are left out.

    A block is code when it starts a doctest, follows a line ending in `::` with deeper indentation, or when its
    symbols outnumber its words; list items start paragraphs of their own.
    """
    literal_indent: int | None = None
    for block in re.split(r"\n[ \t]*\n", dedent(document.expandtabs())):
        lines = [line.rstrip() for line in block.splitlines() if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if literal_indent is not None and indent > literal_indent:
            continue
        literal_indent = indent if lines[-1].endswith("::") else None
        if lines[0].lstrip().startswith((">>>", "...", ".. ", "$ ", "% ", "|")) or "::=" in block:
            continue
        yield from _items(lines)


def _items(lines: list[str]) -> Iterator[str]:
    """Join a block's lines into paragraphs: list items and field lines (`:param x:`, `name -- text`) start new ones."""
    current: list[str] = []
    for line in (raw.strip() for raw in lines):
        if line.startswith(">>>"):
            break
        if re.fullmatch(r"[-=*~^\"'`+#.| ]{3,}", line):  # a heading's underline, a table's rule
            yield " ".join(current[:-1])
            current = []
            continue
        marker = re.match(r"([-*+o•]|\d+[.)]|\(\w\)|:[^:]+:|[\w.*]+(?:\([^)]*\))?\s+--?)\s+", line)
        if marker:
            yield " ".join(current)
            current = [line[marker.end() :]]
        else:
            current.append(line)
    yield " ".join(current)


def normalise_words(sentence: str) -> list[str]:
    """The lower-case words of a sentence: marks removed, identifiers split, numbers spelled."""
    text = re.sub(r":[\w:]+:`([^`]*)`", r"\1", sentence)  # :func:`name`
    text = re.sub(r"\[\d+\]|\(\)|[`\"*]", " ", text).replace("’", "'")
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)  # camelCase
    text = re.sub(r"(\d)\.(\d)", r"\1 point \2", text)
    text = re.sub(r"(\d),(\d{3})\b", r"\1\2", text)
    text = re.sub(r"\d+", lambda match: f" {spell_number(match.group())} ", text)
    return _WORD.findall(text.lower())


def sentences_of(document: str) -> Iterator[str]:
    """Yield the sentences of one document, each as space-separated lower-case words."""
    for paragraph in prose_paragraphs(document):
        for short, long in _ABBREVIATIONS.items():
            paragraph = re.sub(re.escape(short), long, paragraph, flags=re.IGNORECASE)
        for piece in re.split(r"(?<=[.!?:;])[\"')\]]*\s+(?=[\"'(`*]*[A-Za-z])", paragraph):
            symbols = len(_CODE_SYMBOLS.findall(re.sub(r":\w+:`|`|\*\w+\*|\w_\w", " ", piece)))
            words = normalise_words(piece)
            if not MIN_WORDS <= len(words) <= MAX_WORDS or symbols * 5 > len(words):
                continue
            letters = sum(len(word) == 1 and word not in ("a", "i") for word in words)
            if letters * 5 <= len(words) and not _COMMON.isdisjoint(words):
                yield " ".join(words)


def documentation_sentences(documents: Iterable[tuple[str, str]]) -> list[str]:
    """The unique sentences of (name, text) documents, in order of first appearance."""
    return list(dict.fromkeys(sentence for _, text in documents for sentence in sentences_of(text)))


@dataclass(frozen=True)
class TextSplit:
    """Unique sentences, one list a purpose; no sentence is in two lists."""

    train: list[str]
    valid: list[str]
    test: list[str]
    speech: list[str]

    def __post_init__(self) -> None:
        parts = [*self.train, *self.valid, *self.test, *self.speech]
        if len(parts) != len(set(parts)):
            raise ValueError("a sentence is in more than one part of the split, or twice in one")


def hash_fraction(sentence: str, *, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed only; it decides the split and every order."""
    digest = hashlib.sha256(f"{seed}\n{sentence}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_sentences(sentences: list[str], dictionary: frozenset[str], *, num_speech: int, seed: int = 0) -> TextSplit:
    """Split sentences; up to `num_speech` speakable ones (4-16 words, all in `dictionary`) go to the speech part.

    A held-out sentence that is not chosen for speech goes to the training text. The speech part is in hash
    order, so that its first half and second half are both random samples.
    """
    bounds = (SPEECH_SHARE, SPEECH_SHARE + VALID_SHARE, SPEECH_SHARE + VALID_SHARE + TEST_SHARE)
    fractions = {sentence: hash_fraction(sentence, seed=seed) for sentence in sentences}
    candidates = [sentence for sentence, value in fractions.items() if value < bounds[0]]
    speakable = [
        sentence
        for sentence in sorted(candidates, key=fractions.__getitem__)
        if SPEECH_MIN_WORDS <= len(sentence.split()) <= SPEECH_MAX_WORDS and dictionary.issuperset(sentence.split())
    ]
    speech = speakable[:num_speech]
    held_out = set(speech)
    return TextSplit(
        train=[s for s, value in fractions.items() if (value < bounds[0] or value >= bounds[2]) and s not in held_out],
        valid=[s for s, value in fractions.items() if bounds[0] <= value < bounds[1]],
        test=[s for s, value in fractions.items() if bounds[1] <= value < bounds[2]],
        speech=speech,
    )
