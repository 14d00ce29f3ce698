"""Foundry Local: the folder layout that it reads, registration, its runtime and web service, its private catalog and
its command ``foundry``; also the values that describe a version of a model. It may import ``conversion`` and what is
below it, and it alone imports Foundry's SDK. Start reading in ``register.py``; ``runtime.py`` is where models answer.
"""
