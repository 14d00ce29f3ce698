"""How good and how fast a variant is: speed and memory, quality, edge cases, soak, drift, and the evaluation set.

Each measurement runs in a child process, as a worker (``*_worker.py``) or as the module that starts it and reads its
result. :mod:`~slmops.evaluation.summary` makes metrics of these results, :mod:`~slmops.evaluation.statistics` their
intervals. It may import foundry, conversion, checkpoints, processes and core. Start reading in
:mod:`~slmops.evaluation.quality` and :mod:`~slmops.evaluation.speed`.
"""
