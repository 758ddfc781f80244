"""The errors mixbits raises on purpose.

Every message says what was wrong, what was got, what was expected, where, and what to do about it.
The command line turns each of them into one line on stderr and exit code 2.
"""


class MixbitsError(Exception):
    """Base class: anything a user can cause and can fix."""


class SpecError(MixbitsError, ValueError):
    """A bit-width, grid, allocation or setting that does not make sense, or a budget that cannot be met."""


class FormatError(MixbitsError, ValueError):
    """A file whose bytes are not what its format promises (truncated, wrong version, NaN, unknown tensor)."""


class DataError(MixbitsError, ValueError):
    """Input data that is missing, empty, in another encoding or inconsistent with the model."""


class KernelUnavailable(MixbitsError, RuntimeError):
    """A kernel back end that was asked for by name does not exist on this machine."""
