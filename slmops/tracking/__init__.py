"""All that touches MLflow: jobs, evaluations and their answers, retrainings, files, and the registry of versions.

It alone imports MLflow; otherwise only the packages on the floors below it. Start reading with ``tracker.py``, where a
job and its variants become runs, and ``registry.py``, where a variant becomes a version; ``client.py`` has what all
modules share. ``download.py`` fetches files, and ``exchange.py`` carries files between the machines of a job.
"""
