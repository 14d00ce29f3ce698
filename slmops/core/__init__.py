"""What everything else is made of: errors, the values that pass between packages, the job, settings, files, locks, and
what this machine is. It may import nothing of slmops. Start reading in ``values.py`` and ``job.py``.
"""
