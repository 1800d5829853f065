"""Isthmus: the networking agent of a node in a cluster that stretches from the cloud to the edge."""

__version__ = "0.1.0"
