"""Route netlink through pyroute2, its refusals as our typed errors."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from isthmus.model.errors import KernelError, NotPermitted, NotSupported

_NOT_PERMITTED = (errno.EPERM, errno.EACCES)
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT)


@contextmanager
def route_netlink() -> Iterator[Any]:
    """A route netlink socket in the network namespace of this thread."""
    with IPRoute() as netlink:
        yield netlink


def refused(what: str, error: NetlinkError) -> KernelError:
    """The typed error for a refusal; a missing privilege never reads as a missing feature."""
    text = f"{what}: {error.args[1] if len(error.args) > 1 else error}"
    if error.code in _NOT_PERMITTED:
        return NotPermitted(text, hint="the agent needs CAP_NET_ADMIN in its network namespace")
    if error.code in _NOT_SUPPORTED:
        return NotSupported(text)
    return KernelError(text)


def attribute(message: Any, name: str) -> Any:
    """A netlink attribute of a message, None where it has none."""
    return message.get_attr(name)
