"""The parts that a job falls into when it runs on several machines; ``tracking/exchange.py`` brings their files."""
