"""The server that nodes behind NATs meet at, and the issuer of their certificates.

Joins connections without being able to read them.
"""
