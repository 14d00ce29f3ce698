"""From a checkpoint to variants: the recipes, Olive in a child process, the checks of what it made, and the store of
finished variants. It may import ``checkpoints`` and what is below it; Olive, torch and ONNX Runtime are loaded only in
its workers (``*_worker.py``). Start reading in ``recipes.py`` and ``convert.py``.
"""
