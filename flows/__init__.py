"""Prefect flows: what follows what, one module a flow. They may import everything but the command line and the API.

Start reading with ``optimize.py``, the story of a job. ``running.py`` has what all flows share: how a run is called,
what it waits for, how it ends. ``variant.py`` is for one machine, ``fan_out.py`` for several.
"""
