"""Trace, doctor, drops: the decisions of plan/ held against what the kernel and the agent report."""
