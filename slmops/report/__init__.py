"""A comparison for people: as text for the terminal, as Markdown for Prefect and MLflow, as an HTML page with charts.

It may import ``selection`` and what is below it. Start reading with ``tables.py``, of which all three are made.
"""
