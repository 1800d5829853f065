"""What to do about each trouble that ``status`` may show, by its stable code. docs/errors.md lists what they mean.

A code that is not here is shown with its text alone.
"""

_MANIFEST = "correct the named file; until then the last good state of the object is served"

ADVICE = {
    "agent.announcement": "see that the state directory can be written; it is tried again by itself",
    "agent.interception": "see `isthmus doctor`; it is tried again by itself",
    "agent.peer": "look at the agent's log; it is tried again by itself",
    "agent.virtual": "see that the state directory can be written; it is tried again by itself",
    "data.listen": "find who holds the address: `ss -ltnup`; it is tried again by itself",
    "dns.bind": "find who holds port 53 of the address: `ss -lnup 'sport = 53'`; it is tried again by itself",
    "dns.no-upstreams": "set dns.upstreams, or names outside the cluster get SERVFAIL",
    "dns.upstream": "correct dns.upstreams in the agent's settings",
    "dns.upstream-loop": "take the server that asks this node again out of dns.upstreams or /etc/resolv.conf",
    "dns.upstreams-dead": "see that the servers run and can be reached from this node",
    "identity.clock": "set the clock of the one that is wrong, and let chrony or systemd-timesyncd keep it",
    "identity.enrolling": "see that the issuer runs and can be reached; it is tried again by itself",
    "identity.expired": "see that the issuer runs and can be reached; without one, enrol again with a new token",
    "identity.none": "create a token on the issuer with `isthmus token create --node NAME`",
    "identity.renewal": "see that the issuer runs and can be reached before the certificate ends",
    "identity.revoked": "if this node shall come back, enrol it again with a new token",
    "interception.failed": "see `isthmus doctor`; it is tried again by itself",
    "link.credentials": "see that the files of the identity are there and belong together; enrol again if not",
    "manifest.bad-value": _MANIFEST,
    "manifest.duplicate-key": _MANIFEST,
    "manifest.duplicate-object": "keep one of the two; until then the first by file name is served",
    "manifest.encoding": "save the file as UTF-8; until then its last good state is served",
    "manifest.endpoint-without-node": "give the endpoint a nodeName: addresses of sites may overlap",
    "manifest.field": _MANIFEST,
    "manifest.slice-without-service": "give the slice the label kubernetes.io/service-name",
    "manifest.syntax": _MANIFEST,
    "manifest.too-large": "split the file; until then its last good state is served",
    "manifest.unreadable": "make the file readable for the agent; until then its last good state is served",
    "store.missing": "make the directory, or correct “store” in the agent's settings",
    "store.offline-copy": "see that the store's directory is there and readable; until then no change is seen",
    "store.offline-unreadable": "nothing to mend: it is written anew from the store",
    "store.offline-unsaved": "make room on the disk of the state directory",
    "store.unwatched": "raise fs.inotify.max_user_watches; until then changes are seen later",
    "virtual.exhausted": "set a larger range in virtual-cidrs",
    "service.not-in-range": "add its range to intercept.service-cidrs",
    "virtual.unreadable": "nothing to mend: addresses are given anew, and clients that kept one ask again",
    "worker.data": "look at the agent's log for why it ended; it is started again by itself",
    "worker.dns": "look at the agent's log for why it ended; it is started again by itself",
}


def advice_for(code: str) -> str:
    """What to do about the trouble ``code``, or '' where nothing more can be said than its text."""
    return ADVICE.get(code, "")
