"""Checks of single values: names, addresses, ranges. Each returns the canonical value or raises ValueError with what
was expected."""

import re
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network

MAX_PORT = 65_535
_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?\Z")
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*\Z")
LABEL = "a DNS label: a-z, 0-9 and '-', at most 63 characters"
SUBDOMAIN = "a DNS name: labels of a-z, 0-9 and '-' joined by '.', at most 253 characters"
HOST = "a DNS name that can be an alias: labels of a-z, 0-9, '-' and '_'"
PORT = f"a number from 1 to {MAX_PORT}"
ADDRESS = "an IP address"


def label(text: str) -> str:
    """A DNS-1123 label."""
    if not _LABEL.match(text):
        raise ValueError(LABEL)
    return text


def subdomain(text: str) -> str:
    """A DNS-1123 subdomain."""
    if len(text) > 253 or not _SUBDOMAIN.match(text):
        raise ValueError(SUBDOMAIN)
    return text


def host(text: str) -> str:
    """The name an ExternalName service points to, without a final dot, in lower case."""
    name = text.removesuffix(".").lower()
    if len(name) > 253 or not re.fullmatch(r"[a-z0-9_](?:[-a-z0-9_]{0,62})(?:\.[a-z0-9_][-a-z0-9_]{0,62})*", name):
        raise ValueError(HOST)
    return name


def port(number: int) -> int:
    """A port number."""
    if not 1 <= number <= MAX_PORT:
        raise ValueError(PORT)
    return number


@lru_cache(maxsize=8_192)
def address(text: str) -> str:
    """An IP address in canonical text. A zone (``%eth0``) and an IPv4 address within IPv6 are refused."""
    try:
        found = ip_address(text)
    except ValueError:
        raise ValueError(ADDRESS) from None
    if isinstance(found, IPv6Address) and (found.scope_id or found.ipv4_mapped):
        raise ValueError(f"{ADDRESS} without a zone, and IPv4 written as IPv4")
    return str(found)


@lru_cache(maxsize=8_192)
def endpoint_address(text: str) -> str:
    """An address that something can be reached at from another machine: what Kubernetes accepts for an endpoint."""
    canonical = address(text)
    found = ip_address(canonical)
    if found.is_unspecified or found.is_loopback or found.is_link_local or found.is_multicast:
        raise ValueError("an address that is not unspecified, loopback, link-local or multicast")
    return canonical


def network(text: str) -> str:
    """A range in canonical text."""
    try:
        return str(ip_network(text))
    except ValueError:
        raise ValueError("a range like 10.1.0.0/16, with no bits set behind the prefix") from None


def family(text: str) -> str:
    """``IPv4`` or ``IPv6``, of a canonical address."""
    return "IPv6" if ":" in text else "IPv4"
