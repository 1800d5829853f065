"""Intercepted connections: original destination, endpoint choice applied, bytes carried.

Reaches endpoints of this node itself, those of other nodes through the carrier that agent/ injects.
"""
