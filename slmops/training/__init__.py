"""Retraining up to a fine-tuned checkpoint, and the outcome of a whole retraining.

The way of the data: ``sources`` fetches them, ``examples`` reads their lines, ``checks`` compares them with each other
and with the evaluation set, ``data`` writes the checked files. ``finetune`` trains on these in a child process
(``finetune_worker``), which continues after a crash, and says whether the result is better than before. The package
may import ``selection``, ``evaluation``, ``foundry``, ``conversion``, ``checkpoints``, ``processes`` and ``core``.
Start reading at ``values``, then at ``data.prepare`` and ``finetune.finetune``.
"""
