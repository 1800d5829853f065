"""The device that carries the interception addresses: a dummy; where the kernel has none, a bridge without ports.

It is recognised by its hardware address, which the kernel sets in the same step in which it makes the device: so not
even a kill in the middle leaves a device that nobody claims. Addresses need no carrier and no duplicate detection.
"""

import errno
from typing import Any

import msgspec
from pyroute2.netlink.exceptions import NetlinkError

from isthmus.kernel.netlink import attribute, refused, route_netlink
from isthmus.model.errors import KernelError, NotSupported

TAG_ADDRESS = "02:69:73:74:68:6d"
"""Locally administered; the rest spells "isthm"."""
ALIAS = "isthmus: holds the interception addresses"

KINDS = ("dummy", "bridge", "ifb")
"""In the order in which they are tried; each holds an address without any peer."""

_NO_DAD = 0x02  # IFA_F_NODAD
_UP = 0x1


class Device(msgspec.Struct, frozen=True):
    """What is there under the device's name."""

    index: int
    kind: str
    up: bool
    ours: bool
    addresses: frozenset[str]


class Devices:
    """Reads, makes and removes the device called ``name``."""

    def __init__(self, name: str, kinds: tuple[str, ...] = KINDS) -> None:
        self._name = name
        self._kinds = kinds

    def read(self) -> Device | None:
        """None where there is no such device. Link-local addresses, which the kernel gives, are not listed."""
        with route_netlink() as netlink:
            return self._read(netlink)

    def apply(self, addresses: frozenset[str]) -> tuple[str, ...]:
        """Have the device up with exactly ``addresses``; what was changed, in words.

        KernelError where a device of that name is not ours; NotSupported where no kind can be made.
        """
        done = [f"device {name} deleted, its name has changed" for name in self.remove(keep=self._name)]
        with route_netlink() as netlink:
            device = self._read(netlink)
            if device is None:
                kind = self._make(netlink)
                done.append(f"device {self._name} made ({kind})")
                device = self._read(netlink)
            if device is None or not device.ours:
                raise KernelError(
                    f"taking device {self._name}: it exists and is not ours",
                    hint="set intercept.device to a name that is free",
                )
            if not device.up:
                netlink.link("set", index=device.index, state="up")
                done.append(f"device {self._name} up")
            done += self._set_addresses(netlink, device, addresses)
        return tuple(done)

    def remove(self, keep: str = "") -> tuple[str, ...]:
        """Delete every device that carries our tag, under whatever name, except ``keep``; their names."""
        done: list[str] = []
        with route_netlink() as netlink:
            for link in netlink.get_links():
                name = str(attribute(link, "IFLA_IFNAME"))
                if name == keep or not _is_ours(link):
                    continue
                try:
                    netlink.link("del", index=link["index"])
                    done.append(name)
                except NetlinkError as error:
                    if error.code != errno.ENODEV:
                        raise refused(f"deleting device {name}", error) from error
        return tuple(done)

    def _read(self, netlink: Any) -> Device | None:
        try:
            links = list(netlink.link("get", ifname=self._name))
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise refused(f"reading device {self._name}", error) from error
        link = links[0]
        addresses = frozenset(
            str(attribute(message, "IFA_LOCAL") or attribute(message, "IFA_ADDRESS"))
            for message in netlink.addr("dump", index=link["index"])
            if message["scope"] != 253  # RT_SCOPE_LINK
            or message["family"] == 2
        )
        return Device(link["index"], _kind(link), bool(link["flags"] & _UP), _is_ours(link), addresses)

    def _make(self, netlink: Any) -> str:
        missing: list[str] = []
        for kind in self._kinds:
            try:
                netlink.link("add", ifname=self._name, kind=kind, address=TAG_ADDRESS)
            except NetlinkError as error:
                problem = refused(f"making device {self._name} as {kind}", error)
                if error.code == errno.EEXIST:
                    return "it had appeared"
                if not isinstance(problem, NotSupported):
                    raise problem from error
                missing.append(kind)
                continue
            index = netlink.link_lookup(ifname=self._name)[0]
            netlink.link("set", index=index, ifalias=ALIAS)
            return kind
        raise NotSupported(
            f"making device {self._name}: the kernel has none of {', '.join(missing)}",
            hint="load one of these modules",
        )

    def _set_addresses(self, netlink: Any, device: Device, wanted: frozenset[str]) -> list[str]:
        done: list[str] = []
        for address in sorted(wanted - device.addresses):
            self._address(netlink, "add", device, address)
            done.append(f"address {address} added to {self._name}")
        for address in sorted(device.addresses - wanted):
            self._address(netlink, "del", device, address)
            done.append(f"address {address} taken from {self._name}")
        return done

    def _address(self, netlink: Any, verb: str, device: Device, address: str) -> None:
        fields: dict[str, Any] = {"index": device.index, "address": address, "prefixlen": 128 if ":" in address else 32}
        if ":" in address and verb == "add":
            fields["flags"] = _NO_DAD
        try:
            netlink.addr(verb, **fields)
        except NetlinkError as error:
            if error.code not in (errno.EEXIST, errno.EADDRNOTAVAIL):
                raise refused(f"address {address} on {self._name}", error) from error


def _kind(link: Any) -> str:
    info = attribute(link, "IFLA_LINKINFO")
    return str(attribute(info, "IFLA_INFO_KIND") or "") if info is not None else ""


def _is_ours(link: Any) -> bool:
    return str(attribute(link, "IFLA_ADDRESS")).lower() == TAG_ADDRESS and _kind(link) in KINDS
