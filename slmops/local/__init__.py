"""The local Prefect and MLflow servers, and the doctor, which checks what jobs need. Start reading in ``stack.py``."""
