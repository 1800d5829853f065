"""What two of our processes say to each other: framing, streams, TLS contexts, identity, signed announcements.

Pure machines: bytes in, events out. No socket is opened here.
"""
