"""The addresses of this node, as the kernel has them."""

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

from isthmus.kernel.netlink import attribute, route_netlink

_GLOBAL = 0  # RT_SCOPE_UNIVERSE, include/uapi/linux/rtnetlink.h


def local_addresses() -> tuple[str, ...]:
    """All addresses of this network namespace but loopback and link-local ones, in canonical text, sorted."""
    return tuple(sorted({address for address, _ in _addresses()}))


def reachable_addresses(exclude_device: str, exclude_ranges: Iterable[str]) -> tuple[str, ...]:
    """Addresses that other nodes may dial: global ones that are neither on the device nor in the ranges (of pods)."""
    networks = [ip_network(text) for text in exclude_ranges]
    return tuple(
        sorted(
            {
                address
                for address, device in _addresses()
                if device != exclude_device and not any(ip_address(address) in network for network in networks)
            }
        )
    )


def _addresses() -> list[tuple[str, str]]:
    """(address, device) of every global address that is not on loopback."""
    with route_netlink() as netlink:
        names = {link["index"]: attribute(link, "IFLA_IFNAME") for link in netlink.get_links()}
        found = []
        for message in netlink.get_addr():
            text = attribute(message, "IFA_LOCAL") or attribute(message, "IFA_ADDRESS")
            address = ip_address(text)
            if message["scope"] == _GLOBAL and not address.is_loopback and not address.is_link_local:
                found.append((str(address), names.get(message["index"], "")))
        return found
