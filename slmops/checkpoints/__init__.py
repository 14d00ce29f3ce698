"""Checkpoints, wherever they come from: fetched, unpacked and checked before anything is converted; and their chat
templates, read and rendered. It may import ``core`` and ``processes``; torch and transformers run in a child process.
Start reading in ``source.py``; ``inspection.py`` and ``weight_files.py`` say what is accepted.
"""
