"""Keeping it so: watch, work queue, reconcile, local API, worker processes, clean start and stop."""
