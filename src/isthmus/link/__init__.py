"""Paths between nodes: direct, reverse, relayed; pooled TLS connections that carry one stream at a time."""
