"""What a link may use. Every bound here is counted or reported where it is hit."""

import os

import msgspec


class LinkLimits(msgspec.Struct, frozen=True):
    """Times in seconds, sizes in bytes, the rest in connections unless named."""

    head_start_s: float = 0.15  # of direct paths before a relay is asked as well
    stagger_s: float = 0.25  # between two addresses of a peer
    connect_s: float = 5.0  # TCP, ticket, handshake and READY together
    open_s: float = 10.0  # from OPEN to OPENED or REFUSED: the endpoint's own time limit is shorter
    wait_s: float = 8.0  # of a stream for a connection
    unanswered_s: float = 1.0  # an OPEN that the peer's kernel has not acknowledged by then was sent into the void
    retry_first_s: float = 1.0  # a failed path rests this long, doubled each time
    retry_most_s: float = 60.0
    idle_s: float = 60.0  # an unused pooled connection is closed
    age_s: float = 3600.0  # an older connection is not used again: certificates are renewed meanwhile
    reuse_bytes: int = 64 << 30  # nor one that carried this much: well below what one AES-GCM key may (RFC 8446 5.5)
    warm: int = 2  # idle connections kept ready to a peer that is in use
    idle_most: int = 256  # idle connections kept to one peer
    per_peer: int = 8192
    dialling_most: int = 16  # connections being made to one peer
    waiting_most: int = 16_384  # streams waiting for a connection to one peer
    handshakes: int = 128  # accepted connections that have not finished their handshake
    handshake_s: float = 5.0
    datagram_queue_bytes: int = 512 * 1024  # of one datagram connection; beyond it datagrams are dropped
    sessions: int = 16_384  # datagram sessions of one connection
    crew: int = max(1, min(4, (os.cpu_count() or 1) - 1))  # threads that move bulk
