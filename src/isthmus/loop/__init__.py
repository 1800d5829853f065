"""The readiness loop, and the pumps that move bytes between two sockets. Shared by proxy, link and relay.

Knows sockets, timers and buffers; knows nothing of services, peers or policies.
"""
