"""What everything else is made of: errors, values, the job, settings, files, locks, and what this machine is. Start
reading in ``values.py`` and ``job.py``."""
