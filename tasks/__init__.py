"""Prefect tasks: the stages of the flows, thin wrappers over what ``slmops`` does; they may import all of it but the
command line and the API. Start reading with ``stage.py``, which says how a stage is named and when it is retried.
"""
