"""How a version gets from the registry to those who use it: promotion, the pull onto a device, the private catalog.

It may import ``tracking`` and the floors below it, but not MLflow itself. Start reading with ``promotion.py``, which
decides whether a version becomes the champion, and ``pull.py``, which brings one onto this device; ``installed.py``
knows what is there, and ``remeasurement.py`` measures it again.
"""
