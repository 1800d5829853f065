"""Making it so: one adapter a subsystem, each with read() and apply(); probe.py says what this kernel can do.

Everything made here carries our tag; nothing else is ever changed, and nothing is flushed. Decides nothing.
"""
