"""Whole clusters on one machine, in network namespaces: sites, NATs, nodes, pods.

Builds what a lab file describes and runs the real commands in it. Never changes the root namespace, and removes only
what its registry or its name prefix says it made.
"""
