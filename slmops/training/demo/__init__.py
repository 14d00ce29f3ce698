"""Data of the retraining demo: synthetic support tickets to route, as JSONL."""
