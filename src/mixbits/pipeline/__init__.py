"""Whole jobs built from the four siblings lm, quant, packing and asr; the command line and Python users call the same functions."""

import mixbits.hf  # noqa: F401  registers packed models with transformers, so that every job can load them
