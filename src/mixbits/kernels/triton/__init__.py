"""Triton kernels for packed weights on a GPU: linear layers, embeddings, log-sum-exp of logits.

:mod:`.layout` repacks (torch only), :mod:`.run` calls the kernels, :mod:`.dispatch` chooses among them, :mod:`.operators` serves
:mod:`mixbits.kernels.ops`. Importing ``run`` or ``operators`` needs Triton (``pip install 'mixbits[gpu]'``); this package itself imports nothing.
"""
