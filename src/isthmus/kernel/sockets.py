"""Sockets for addresses that are not the node's: transparent ones, and the options that Python does not name.

Numbers from include/uapi/linux/in.h, in6.h and asm-generic/socket.h. Addresses are canonical text, ports host order.
"""

import socket
import struct
from typing import Any

from isthmus.model.marks import OWN

SO_MARK = 36
IP_TRANSPARENT = 19
IP_ORIGDSTADDR = IP_RECVORIGDSTADDR = 20
IP_BIND_ADDRESS_NO_PORT = 24
IPV6_ORIGDSTADDR = IPV6_RECVORIGDSTADDR = 74
IPV6_TRANSPARENT = 75

# Room for one IP_ORIGDSTADDR or IPV6_ORIGDSTADDR message beside others that a caller may have asked for.
ORIGINAL_DESTINATION_SPACE = socket.CMSG_SPACE(28) + socket.CMSG_SPACE(64)

Address = tuple[str, int]

_IN = struct.Struct("!2xH4s")
_IN6 = struct.Struct("!2xH4x16s")


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET6 for text with a colon, else AF_INET; the address itself is not checked."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def parse_sockaddr(raw: bytes) -> Address:
    """(address, port) of a ``struct sockaddr_in`` (16 bytes) or ``sockaddr_in6`` (28 bytes).

    Told apart by length, for the family field is in host order. ValueError for any other length.
    """
    if len(raw) == 16:
        port, packed = _IN.unpack_from(raw)
        return socket.inet_ntoa(packed), port
    if len(raw) == 28:
        port, packed = _IN6.unpack_from(raw)
        return socket.inet_ntop(socket.AF_INET6, packed), port
    raise ValueError(f"a socket address of {len(raw)} bytes is neither IPv4 nor IPv6")


def mark_own(sock: socket.socket, mark: int = OWN) -> None:
    """Mark what the socket sends as ours: interception lets it pass. Needs CAP_NET_ADMIN."""
    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)


def set_transparent(sock: socket.socket) -> None:
    """Allow the socket to bind to, and accept for, addresses that this node does not hold. Needs CAP_NET_ADMIN."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)


def defer_port(sock: socket.socket) -> None:
    """Choose the local port at connect(), by the whole four-tuple: one source address is then good for many peers.

    The option is named for IPv4 and serves IPv6 sockets too.
    """
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)


def transparent_listener(address: str, port: int, *, backlog: int = 4096, reuse_port: bool = False) -> socket.socket:
    """A non-blocking TCP listener that also accepts what TPROXY hands it; works unchanged for DNAT.

    An accepted socket's own name is the original destination if the packet came through TPROXY, and the
    listener's address if it came through DNAT. What accepted sockets send carries our mark.
    """
    sock = _bound(address, port, socket.SOCK_STREAM, reuse_port=reuse_port)
    sock.listen(backlog)
    return sock


def transparent_datagrams(address: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A non-blocking UDP socket that reports each datagram's destination (``received_destination``)."""
    sock = _bound(address, port, socket.SOCK_DGRAM, reuse_port=reuse_port)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVORIGDSTADDR, 1)
    return sock


def reply_socket(source: Address) -> socket.socket:
    """A non-blocking UDP socket that sends from ``source``, the address a client believes it talks to.

    Several may hold the same source (the listening socket's address included); such a socket is for sending only.
    """
    return _bound(source[0], source[1], socket.SOCK_DGRAM, reuse_address=True)


def client_socket(client: Address) -> socket.socket:
    """A non-blocking TCP socket that will connect from the client's own address and port.

    Where that pair is taken on this node already, bind to port 0 of the same address instead: EADDRINUSE says so.
    """
    return _bound(client[0], client[1], socket.SOCK_STREAM, reuse_address=True)


def received_destination(ancillary: list[tuple[int, int, bytes]]) -> Address | None:
    """Where a datagram was sent to, out of ``recvmsg``'s ancillary data; None where the kernel did not say."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == IP_ORIGDSTADDR:
            return parse_sockaddr(data[:16])
        if level == socket.IPPROTO_IPV6 and kind == IPV6_ORIGDSTADDR:
            return parse_sockaddr(data[:28])
    return None


def peer_of(name: tuple[Any, ...]) -> Address:
    """(address, port) of what ``recvmsg``, ``accept`` and ``getpeername`` return for either family."""
    return name[0], name[1]


def _bound(
    address: str, port: int, kind: socket.SocketKind, *, reuse_port: bool = False, reuse_address: bool = False
) -> socket.socket:
    sock = socket.socket(family_of(address), kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if reuse_address or kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        set_transparent(sock)
        mark_own(sock)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock
