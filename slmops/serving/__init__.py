"""Serving a model: an OpenAI-compatible service before runtime processes, one per version.

``service`` is the whole; ``proxy`` is what clients see; ``fleet`` decides which version answers. The service follows
the registry (``registry_watch``); a retraining watches how a new champion does (``new_champion``), and other commands
find the service of a home through ``home_service``. It may import everything below: delivery, tracking, foundry, core.
Start reading at ``service.run``.
"""
