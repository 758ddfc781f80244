"""What can be wrong with one entry of a file while the rest is readable.

A reader hands such an error to its ``report``: by default :func:`stop`, which raises it. ``mixbits lint`` passes a function
that counts instead, and the reader then leaves the entry out. What makes a whole file doubtful (truncated compression,
not the format at all) is always raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from mixbits.errors import DataError, FormatError, MixbitsError

Report = Callable[[MixbitsError], None]


class DuplicateError(DataError):
    """An utterance or hypothesis that was there before."""


class NotFiniteError(FormatError):
    """A score that is NaN or infinite."""


class MissingError(FormatError):
    """A part of an utterance or hypothesis is not there: text, score, or the whole hypothesis."""


def stop(error: MixbitsError) -> NoReturn:
    """The default report: raise the error."""
    raise error
