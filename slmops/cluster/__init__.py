"""The parts that a job falls into when it runs on several machines.

It may import ``tracking`` and what is below it. Start reading with ``parts.py``: what goes to a machine, what it does
there, what comes back; ``tracking/exchange.py`` carries the files.
"""
