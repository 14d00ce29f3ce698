"""From a checkpoint to variants: the recipes, Olive in a child process, the checks of what it made, and the store of
finished variants. This package imports only ``checkpoints`` and lower ones; Olive, torch and ONNX Runtime are loaded
in its workers. Start reading at :func:`convert.convert`.
"""
