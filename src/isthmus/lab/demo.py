"""The story that ``isthmus lab demo`` tells: real commands in real namespaces, each held against what was promised."""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from subprocess import TimeoutExpired

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from isthmus.lab.agents import wait_ready
from isthmus.lab.cluster import Lab

STEP_DEADLINE_S = 10.0
_COMMAND_S = 8.0
_AGAIN_S = 0.2

# What a step's output must be: '' where it is as told, else what is wrong.
Check = Callable[[str], str]

MAP = """\
  cloud, public        ┌─────────── the internet ───────────┐
  ┌───────────────┬────┴──────────┬──────────┐              │
  cloud-1         cloud-2         relay-1    symmetric NAT  port-restricted NAT
  203.0.113.11    203.0.113.12    ….100      │              │
  orders-1        orders-2                   plant-1        shop-1
                                             ├ sensor-0     ├ till-0  172.17.0.2
                                             └ machine      └ desk    172.17.0.3"""


@dataclass(frozen=True)
class Step:
    """One command in one place, why it is run, and what it must show."""

    title: str
    why: str
    place: str
    command: tuple[str, ...]
    check: Check
    shown: str


def contains(*words: str) -> Check:
    """Every one of ``words`` must be there."""

    def check(output: str) -> str:
        missing = [word for word in words if word not in output]
        return f"{', '.join(missing)} is not there" if missing else ""

    return check


def line_with(*words: str) -> Check:
    """One line must hold all of ``words``."""

    def check(output: str) -> str:
        found = any(all(word in line for word in words) for line in output.splitlines())
        return "" if found else f"no line has {' and '.join(words)}"

    return check


def answered_by(*pods: str) -> Check:
    """The answer must be that of the lab's server in one of ``pods``."""

    def check(output: str) -> str:
        try:
            answer = json.loads(output)
        except ValueError:
            return "the answer is not the server's"
        return "" if answer.get("pod") in pods else f"{answer.get('pod')} answered, not {' or '.join(pods)}"

    return check


def _curl(url: str) -> tuple[str, ...]:
    return ("curl", "-sS", "-m", "5", url)


STORY = (
    Step(
        "The name",
        "A pod in the plant asks for a service that runs in the cloud. Its resolv.conf is as kubelet writes it.",
        "machine",
        ("dig", "+search", "+noall", "+answer", "+time=2", "orders.sales"),
        contains("orders.sales.svc.cluster.local.", "10.96.10.10"),
        "the agent on the pod's own node has answered, from the manifests",
    ),
    Step(
        "The answer",
        "It calls the service by that name.",
        "machine",
        _curl("http://orders.sales/"),
        answered_by("sales/orders-1", "sales/orders-2"),
        "a pod in the cloud has answered a pod behind a symmetric NAT",
    ),
    Step(
        "The interception",
        "Why that worked: the kernel of the plant's node sent the connection to its agent.",
        "plant-1",
        ("sh", "-c", "isthmus dump rules | grep -e MATCH -e tcp"),
        contains("169.254.96.16:40001"),
        "only the service range and the virtual range are taken",
    ),
    Step(
        "The kernel's record",
        "Connection tracking remembers the connection as the pod made it, and where it went.",
        "plant-1",
        ("conntrack", "-L", "-p", "tcp", "--orig-dst", "10.96.10.10"),
        contains("src=172.17.0.3 dst=10.96.10.10", "src=169.254.96.16"),
        "10.96.10.10 became 169.254.96.16:40001, the agent",
    ),
    Step(
        "The path",
        "From there it went over an encrypted link to the node of the endpoint.",
        "plant-1",
        ("isthmus", "dump", "links"),
        line_with("cloud-", "direct", "TLSv1.3"),
        "direct: the cloud's nodes can be reached",
    ),
    Step(
        "Edge to edge",
        "A pod in the shop calls a service in the plant: two NATs, neither lets anybody in.",
        "desk",
        _curl("http://sensor.field/"),
        answered_by("field/sensor-0"),
        "a pod of one private network has answered a pod of another",
    ),
    Step(
        "The relay",
        "There is no direct path between the two.",
        "shop-1",
        ("isthmus", "dump", "links"),
        line_with("plant-1", "relayed", "relay-1", "TLSv1.3"),
        "joined by the relay, which cannot read it: TLS ends at the agents",
    ),
    Step(
        "One address, two pods",
        "Both sites use 172.17.0.0/16. till-0 in the shop has 172.17.0.2, and so has sensor-0 on the plant's own node.",
        "machine",
        ("dig", "+search", "+short", "+time=2", "till-0.devices.field"),
        contains("240.96."),
        "a member of a headless service that is elsewhere gets a virtual address here",
    ),
    Step(
        "The right one",
        "The virtual address leads to the pod that was meant.",
        "machine",
        _curl("http://till-0.devices.field:8080/"),
        answered_by("field/till-0"),
        "till-0 in the shop has answered, not its neighbour with the same address",
    ),
    Step(
        "The explanation",
        "All of this in one command: what happens to the shop's call, which rule decided, and why.",
        "shop-1",
        ("isthmus", "trace", "field/desk", "sensor.field:80"),
        contains("plant-1", "relay"),
        "no packet was sent to the sensor for that",
    ),
)


class Teller:
    """Tells the story on a console."""

    def __init__(self, lab: Lab, console: Console) -> None:
        self._lab = lab
        self._console = console

    def tell(self, number: int, step: Step) -> bool:
        """Run one step until it shows what it must, or its time is over; return whether it did."""
        self._console.print(f"\n[bold cyan]{number}. {step.title}[/]  [dim]{escape(step.why)}[/]", soft_wrap=True)
        typed = f"isthmus lab exec {step.place} -- {shlex.join(step.command)}"
        self._console.print(Text(f"   $ {typed}", style="bold"), soft_wrap=True)
        end = time.monotonic() + STEP_DEADLINE_S
        while True:
            output, problem = self._attempt(step)
            if not problem or time.monotonic() > end:
                break
            time.sleep(_AGAIN_S)
        for line in output.rstrip().splitlines():
            self._console.print(Text(f"     {line.rstrip()}"), soft_wrap=True)
        if problem:
            self._console.print(f"   [red]✗ not as told:[/] {escape(problem)}", soft_wrap=True)
            return False
        self._console.print(f"   [green]✓[/] {escape(step.shown)}", soft_wrap=True)
        return True

    def compare_foreign(self) -> bool:
        """Hold every node's foreign netfilter rules against what they were before the agents came."""
        self._console.print(
            "\n[bold cyan]And the others' rules?[/]  [dim]Docker's, flannel's, kube-proxy's, libvirt's[/]"
        )
        for node in self._lab.agent_nodes():
            if changes := self._lab.foreign_changes(node):
                self._console.print(f"   [red]✗ changed on {node}:[/]\n{escape(changes)}", soft_wrap=True)
                return False
        self._console.print(
            "   [green]✓[/] the same on every node, byte for byte, in listings of legacy, nft and ipset"
        )
        return True

    def _attempt(self, step: Step) -> tuple[str, str]:
        try:
            done = self._lab.run(step.place, step.command, timeout_s=_COMMAND_S)
        except TimeoutExpired:
            return "", f"no end within {_COMMAND_S:.0f} s"
        problem = step.check(done.stdout)
        if problem and done.stderr:
            return done.stdout, f"{problem}: {done.stderr.strip()}"
        return done.stdout, problem


def run_demo(lab: Lab, console: Console) -> bool:
    """Bring ``lab`` up, tell the story, take it down again; return whether all went as told."""
    started = time.monotonic()
    console.print(Text(MAP, style="dim"), soft_wrap=True)
    try:
        with console.status("") as status:
            lab.up(lambda step: status.update(f"lab {lab.name}: {step}"))
            status.update("agents enrol and find each other")
            wait_ready(lab, lab.agent_nodes())
        nodes, pods = len(lab.agent_nodes()), len(lab.file.pods)
        console.print(
            f"\n{nodes} nodes, {pods} pods, a relay: up in {time.monotonic() - started:.1f} s, an agent on each node."
        )
        good = _tell_all(Teller(lab, console))
    finally:
        # A lab of that name that was up before is somebody's: `up` has refused, and it stays.
        if lab.made:
            with console.status("taking the lab down"):
                lab.down()
    took = time.monotonic() - started
    console.print(
        f"\n[green]All as told[/], in {took:.1f} s. Nothing is left on this machine."
        if good
        else f"\n[red]Not all went as told[/] ({took:.1f} s). `isthmus lab up` brings the same lab up to look into."
    )
    return good


def _tell_all(teller: Teller) -> bool:
    """Tell until a step fails: what comes after it rests on it."""
    return all(teller.tell(number, step) for number, step in enumerate(STORY, 1)) and teller.compare_foreign()
