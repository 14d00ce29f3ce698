"""How good and how fast a variant is: speed and memory, quality, edge cases, soak, drift, and the evaluation set.

Each measurement has a worker (``*_worker.py``) that runs in a child process, and a module that starts it and reads its
result; :mod:`~slmops.evaluation.summary` makes metrics of these results, and :mod:`~slmops.evaluation.statistics` their
intervals. It may import foundry, conversion, checkpoints, processes and core. Start reading in
:mod:`~slmops.evaluation.quality` and :mod:`~slmops.evaluation.speed`.
"""
