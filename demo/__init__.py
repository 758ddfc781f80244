"""The embedded default data of `make demo`: text and speech made on the spot, with no download.

Not part of the wheel: run from the repository root as `python -m demo.prepare`. The text is the interpreter's
own documentation, the speech is that text spoken by espeak-ng and recognized by pocketsphinx.
"""
