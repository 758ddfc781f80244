"""mixbits: Transformer language models in one to three bits a weight, and speech rescoring with them."""

__version__ = "0.1.0"
