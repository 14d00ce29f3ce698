"""Which variant is taken: the policy with its gates and its objective, and the choice with its reason.

It may import ``evaluation`` and what is below it. Start reading with ``policy.toml``, which explains the format, then
``choice.py``, which applies it.
"""
