"""Running the tools that speak to netfilter: text in, text out, refusals told apart.

A refusal says "not supported" only in words that the kernel or the tool use for that and nothing else; everything else
is an error, for permission that is missing never means that a feature is absent.
"""

import os
import subprocess
from collections.abc import Sequence

from isthmus.model.errors import KernelError, NotPermitted, NotSupported

TIMEOUT_S = 60.0

_NOT_PERMITTED = ("operation not permitted", "permission denied", "you must be root")
_NOT_SUPPORTED = (
    "operation not supported",
    "protocol not supported",
    "protocol not available",
    "no chain/target/match by that name",
    "table does not exist",
    "cannot open session to kernel",
    "kernel error received: invalid argument",
    "unknown device type",
    "failed to initialize nft: protocol not supported",
    "invalid module name",
    "couldn't load match",
    "couldn't load target",
    "extension",
)
_ENVIRONMENT = {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C"}


def run(command: Sequence[str], text: str = "") -> str:
    """Standard output of the command. NotSupported where tool or feature is missing, NotPermitted, KernelError."""
    what = " ".join(command)
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, env=_ENVIRONMENT, check=False
        )
    except FileNotFoundError as error:
        raise NotSupported(f"{what}: {command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{what}: no answer within {TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise refusal(what, done.stderr.strip() or f"exit status {done.returncode}")
    return done.stdout


def refusal(what: str, said: str) -> KernelError:
    """The typed error for what a tool said: the privilege counts first, so that it never reads as a missing feature."""
    first = next((line.strip() for line in said.splitlines() if line.strip()), said)
    lowered = said.lower()
    text = f"{what}: {first[:300]}"
    if any(words in lowered for words in _NOT_PERMITTED):
        return NotPermitted(text, hint="the agent needs CAP_NET_ADMIN in its network namespace")
    if any(words in lowered for words in _NOT_SUPPORTED):
        return NotSupported(text)
    return KernelError(text)
