"""The local Prefect and MLflow servers, and the doctor, which checks what a job needs. It may import every package but
``cli``. Start reading in ``stack.py``.
"""
