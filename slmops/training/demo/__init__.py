"""Data of the retraining demo: support tickets to route, as JSONL. ``tickets`` generated them; it imports only core."""
