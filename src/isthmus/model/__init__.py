"""What a cluster is: services, endpoints, nodes, pods, settings, and the errors that all rooms share.

Parses and validates; pure. Never reads a file, a clock, a socket or a random number.
"""
