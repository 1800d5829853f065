"""The data worker is told of a peer when its ways change, and of nothing else; a node that is gone has none."""

from isthmus.agent.answers import with_connections
from isthmus.agent.peers import Peers
from isthmus.link.control_channel import RelayState
from isthmus.model.settings import AgentSettings
from isthmus.plan.nodes import Me, NodeFacts
from isthmus.wire.announcement import Announcement
from isthmus.wire.local import PeerStatus
from isthmus.wire.worker import DropPeer, PathReport, PutPeer

ME = Me("n1", "east")
FAR = NodeFacts("west", (), ("198.51.100.7",))


class World:
    def __init__(self) -> None:
        self.sent: list[PutPeer | DropPeer] = []
        self.relays: list[RelayState] = []
        self.now_s = 1_000.0
        self.peers = Peers(AgentSettings(node="n1"), self.sent.append, lambda: self.relays, lambda: self.now_s)

    def rank(self) -> list[str]:
        self.peers.rank("n2", ME)
        last = self.sent[-1]
        assert isinstance(last, PutPeer)
        return [f"{path.kind} {path.address}".strip() for path in last.paths]


def test_addresses_of_the_store_get_the_usual_port_unless_the_node_announced_another() -> None:
    world = World()
    world.peers.put_facts("n2", FAR)
    assert world.rank() == ["direct 198.51.100.7:20006"]
    world.peers.announced(Announcement("n2", 1, 0.0, "west", ("198.51.100.7:30006",)))
    assert world.rank() == ["direct 198.51.100.7:30006"]


def test_a_relay_that_holds_both_becomes_a_way_and_goes_again_with_it() -> None:
    world = World()
    world.peers.put_facts("n2", FAR)
    world.relays = [RelayState("r", "203.0.113.1:20004", connected=True, present=frozenset({"n2"}))]
    assert world.rank() == ["direct 198.51.100.7:20006", "relayed 203.0.113.1:20004"]
    world.relays = [RelayState("r", "203.0.113.1:20004", connected=True)]
    assert world.rank() == ["direct 198.51.100.7:20006"]


def test_a_ranking_that_stays_is_sent_once() -> None:
    world = World()
    world.peers.put_facts("n2", FAR)
    world.rank()
    world.peers.rank("n2", ME)
    assert len(world.sent) == 1


def test_a_report_matters_when_it_changes_whether_a_way_works() -> None:
    world = World()
    world.peers.put_facts("n2", FAR)
    good = PathReport("n2", "direct", "198.51.100.7:20006", rtt_ms=3.0)
    assert world.peers.report(good)
    assert not world.peers.report(good)
    world.now_s += 1
    assert world.peers.report(PathReport("n2", "direct", "198.51.100.7:20006", error="refused"))
    assert not world.peers.report(PathReport("stranger", "direct", "198.51.100.9:1"))


def test_a_revoked_node_has_no_ways_until_it_announces_itself_again() -> None:
    world = World()
    world.peers.put_facts("n2", FAR)
    world.rank()
    world.peers.gone("n2", "revoked")
    assert world.sent[-1] == DropPeer("n2", "revoked")
    world.peers.put_facts("n2", FAR)
    world.peers.rank("n2", ME)
    assert world.sent[-1] == DropPeer("n2", "revoked")
    assert list(world.peers.everything()) == [DropPeer("n2", "revoked")]
    world.peers.announced(Announcement("n2", 2, 0.0, "west", ("198.51.100.7:20006",)))
    assert world.rank() == ["direct 198.51.100.7:20006"]


def test_status_names_the_way_in_use_first() -> None:
    peer = PeerStatus(
        "n2", "west", "store", ["direct 192.168.1.21:20006 (not tried)", "relayed 203.0.113.1:20004 by r"]
    )
    relayed = {"peer": "n2", "kind": "relayed", "address": "203.0.113.1:20004"}
    (shown,) = with_connections([peer], [relayed, relayed])
    assert shown.paths[0].startswith("relayed")
    assert shown.connections == 2
    assert with_connections([peer], [])[0].paths == peer.paths
