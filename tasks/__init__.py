"""Prefect tasks: when a step is retried, cached, timed out. What is done lives in ``slmops``."""

import logging

# The library's records go to the Prefect page too (PREFECT_LOGGING_EXTRA_LOGGERS); Prefect sets no level for them.
logging.getLogger("slmops").setLevel(logging.INFO)
