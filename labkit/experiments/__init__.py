"""Runs, metrics, the ladder, claims and verdicts."""
