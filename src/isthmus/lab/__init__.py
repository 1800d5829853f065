"""Whole clusters on one machine, in network namespaces: sites, NATs, nodes, pods."""
