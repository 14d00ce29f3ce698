"""Foundry Local: the folder layout that it reads, registration, its runtime and web service, its private catalog, and
the ``foundry`` command; also the values that describe a version of a model. This package imports only ``conversion``
and lower ones, and no other package may import Foundry's SDK. Start reading at :func:`register.register`.
"""
