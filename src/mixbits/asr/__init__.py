"""Rescoring of speech recognizers' n-best lists: formats, prefix tries, tuning, word errors, significance.

Pure NumPy and Python: nothing here imports a model. The model side is handed in as callables.

What there is, one module a subject (import from the module):

* ``nbest``: :class:`Hypothesis`, :class:`NBest`; ``formats.jsonl``: ``read_nbest``, ``write_nbest``;
  ``formats.registry``: ``read_any``, ``write_any`` for every format; ``lint``: ``lint_lists``.
* ``wer``: ``count_errors``, ``error_table``, ``one_best_errors``, ``oracle_errors`` → :class:`ErrorCounts`.
* ``significance``: ``mapsswe``; ``bootstrap``: ``paired_bootstrap``, ``bootstrap_blocks``.
* ``trie``: :class:`TokenForest`, ``build_forest``, ``plan_forests``: what a scorer gets.
* ``lattice``, ``lattice_paths``: :class:`Lattice`, ``best_path``, ``nbest_paths``, ``prune``; ``formats.lattice_files``: ``find_lattices``,
  ``read_lattices``; ``lattice_rescore``: ``rescore_lattice`` with a :class:`Certificate` of its error.
* ``rescore``: ``lm_features`` (slow, calls the scorer) and ``apply_weights`` (fast), or ``rescore`` for both.
* ``features``: what hypotheses are ranked by, and the signs; ``tune``: ``tune_on_lists``, ``tune_weights`` (exact line
  search in ``linesearch``); ``weights``: :class:`Weights`, ``load_weights``, ``check_no_overlap``.

A scorer is ``score_forest(forest) -> (num_nodes,)`` log p(token | ancestors), 0 at roots, natural log, optionally
with an attribute ``max_length``. A typical run::

    dev, test = read_nbest("dev.jsonl.gz"), read_nbest("test.jsonl.gz")
    lm_dev = lm_features(dev, encode=encode, score_forest=score_forest)
    tuned = tune_on_lists(dev, neural_lm_score=lm_dev.neural_lm_score, num_unknown=lm_dev.num_unknown)
    rescored = rescore(test, weights=tuned.weights, encode=encode, score_forest=score_forest)
    print(one_best_errors(rescored.lists), mapsswe(reference_texts(test), one_best_texts(test), rescored.one_best))
    write_nbest("rescored.jsonl.gz", rescored.lists)
"""
