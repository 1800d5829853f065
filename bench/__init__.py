"""Speed, as ratios of one run on one machine: against the direct connection, and against peers. ``python -m bench``."""
