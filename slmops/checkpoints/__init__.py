"""Checkpoints: models in Hugging Face format, wherever they come from. Here they are fetched, unpacked and checked,
before anything is converted, and their chat templates are read and rendered. This package imports only ``core`` and
``processes``; torch and transformers run in a child process (``unpack``). Start reading at :func:`source.resolve`.
"""
