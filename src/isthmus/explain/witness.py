"""What is asked of this node itself while tracing or checking: its DNS server, over the network as a pod would ask."""

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rdatatype

from isthmus.model.settings import DNS_PORT

TIMEOUT_S = 1.0
TRIES = 2


class DnsServer:
    """Asks one DNS server. Answers are remembered, for a trace asks the same name more than once."""

    def __init__(self, address: str, port: int = DNS_PORT, timeout_s: float = TIMEOUT_S) -> None:
        self.address = address
        self._port = port
        self._timeout_s = timeout_s
        self._known: dict[tuple[str, str], frozenset[str] | None] = {}
        self._silent = False

    def resolve(self, name: str, record_type: str) -> frozenset[str] | None:
        """The data of that type in the answer; None where the server does not answer, or fails.

        A server that was silent once is not asked again: each further question would cost the whole time limit.
        """
        key = (name, record_type)
        if key not in self._known:
            self._known[key] = None if self._silent else self._ask(name, record_type)
        return self._known[key]

    def _ask(self, name: str, record_type: str) -> frozenset[str] | None:
        if not self.address:
            return None
        query = dns.message.make_query(f"{name}.", record_type)
        try:
            response, _ = dns.query.udp_with_fallback(query, self.address, self._timeout_s, self._port)
        except (dns.exception.Timeout, OSError):
            self._silent = True
            return None
        except dns.exception.DNSException:
            return None
        if response.rcode() not in (0, 3):  # NOERROR, NXDOMAIN
            return None
        wanted = dns.rdatatype.from_text(record_type)
        return frozenset(str(item) for rrset in response.answer if rrset.rdtype == wanted for item in rrset)
