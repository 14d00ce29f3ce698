"""The parts that a job falls into when it runs on several machines.

It may import ``tracking`` and what is below it. Start reading with ``parts.py``; ``tracking/exchange.py`` brings files.
"""
