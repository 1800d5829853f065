"""Answers a second of the DNS worker against dnsmasq: the same 10,000 names, dnsperf, 2 clients and 200.

Both serve in one network namespace that is made and removed here; their runs alternate, and the ratio of the medians is
printed. dnsmasq has the names in a hosts file, a cache as large as it allows itself, and its defaults otherwise.
``python -m bench.dns`` prints the rows; needs root, dnsmasq and dnsperf.
"""

import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.dns.worker import DnsConfig, command
from isthmus.plan.serving import PortPlan, ServiceKind, ServicePlan
from isthmus.wire import frames, worker

SERVICES = 10_000
CLIENTS = (2, 200)
ROUNDS = 5
RUN_S = 2
TARGET = 1.0
OURS, THEIRS = "127.0.0.2", "127.0.0.3"

Row = tuple[str, float, str]


def plans() -> list[ServicePlan]:
    """Services as a cluster has them: one address and one port each, a hundred namespaces."""
    return [
        ServicePlan(
            f"ns{at % 100}",
            f"svc-{at}",
            ServiceKind.CLUSTER_IP,
            cluster_ips=(f"10.96.{at // 256}.{at % 256}",),
            ports=(PortPlan(80, "http"),),
        )
        for at in range(SERVICES)
    ]


def _name(plan: ServicePlan) -> str:
    return f"{plan.name}.{plan.namespace}.svc.cluster.local"


@contextmanager
def _namespace() -> Iterator[list[str]]:
    """A namespace with loopback up; yields the words that run a command in it."""
    name = f"dns-bench-{os.getpid()}"
    inside = ["ip", "netns", "exec", name]
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
        yield inside
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@contextmanager
def _isthmus(inside: list[str]) -> Iterator[float]:
    """The worker, fed as the agent feeds it; yields the seconds from its start to its first answer being possible."""
    ours, theirs = socket.socketpair()
    config = DnsConfig(listen=(OURS,), resolv_conf="/dev/null")
    began_s = time.monotonic()
    process = subprocess.Popen(
        [*inside, *command(theirs.fileno(), config)], pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL
    )
    theirs.close()
    try:
        messages: list[worker.ToWorker] = [worker.PutService(plan) for plan in plans()]
        for message in (*messages, worker.Synced(), worker.Ask(1, "services")):
            ours.sendall(frames.encode(worker.encoder.encode(message)))
        reader = frames.FrameReader()
        ours.settimeout(30)
        while not any(b"Answer" in frame for frame in reader.feed(ours.recv(65_536))):
            pass
        yield time.monotonic() - began_s
    finally:
        ours.close()
        process.wait(10)


@contextmanager
def _dnsmasq(inside: list[str], directory: Path) -> Iterator[None]:
    hosts = directory / "hosts"
    hosts.write_text("".join(f"{plan.cluster_ips[0]} {_name(plan)}\n" for plan in plans()))
    words = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]
    words += ["--pid-file=", "--bind-interfaces", f"--listen-address={THEIRS}", f"--addn-hosts={hosts}"]
    process = subprocess.Popen([*inside, *words, "--cache-size=10000"], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def _answers_per_s(inside: list[str], server: str, questions: Path, clients: int, run_s: int = RUN_S) -> float:
    """One dnsperf run. Raises RuntimeError if an answer is lost or is not NOERROR: speed without answers is none."""
    words = ["dnsperf", "-s", server, "-d", str(questions), "-c", str(clients), "-l", str(run_s)]
    out = subprocess.run([*inside, *words], check=True, capture_output=True, text=True, timeout=60).stdout
    rate = re.search(r"Queries per second:\s+([\d.]+)", out)
    lost = re.search(r"Queries lost:\s+(\d+)", out)
    codes = re.search(r"Response codes:\s+(.*)", out)
    if not (rate and lost and codes):
        raise RuntimeError(f"dnsperf printed no result:\n{out}")
    if int(lost[1]) or not re.fullmatch(r"NOERROR \d+ \(100\.00%\)", codes[1].strip()):
        raise RuntimeError(f"{server}: {lost[1]} lost, {codes[1]}")
    return float(rate[1])


def _wait_for(inside: list[str], server: str) -> None:
    plan = plans()[-1]
    for _ in range(60):
        words = [*inside, "dig", f"@{server}", "+short", "+time=1", "+tries=1", _name(plan)]
        if subprocess.run(words, capture_output=True, text=True).stdout.strip() == plan.cluster_ips[0]:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{server} does not answer {_name(plan)}")


def version() -> str:
    """What dnsmasq calls itself."""
    return subprocess.run(["dnsmasq", "--version"], check=True, capture_output=True, text=True).stdout.split("  ")[0]


def rows(rounds: int = ROUNDS) -> list[Row]:
    """One row a number of clients: title, ours divided by dnsmasq's, the figures behind it."""
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name, _namespace() as inside:
        directory = Path(name)
        questions = directory / "questions"
        questions.write_text("".join(f"{_name(plan)} A\n" for plan in plans()))
        with _dnsmasq(inside, directory), _isthmus(inside) as start_s:
            for server in (OURS, THEIRS):
                _wait_for(inside, server)
                _answers_per_s(inside, server, questions, 2, 1)  # both warm: caches filled, names touched once
            for clients in CLIENTS:
                runs: dict[str, list[float]] = {OURS: [], THEIRS: []}
                for _ in range(rounds):
                    for server, rates in runs.items():
                        rates.append(_answers_per_s(inside, server, questions, clients))
                ours, theirs = (statistics.median(rates) for rates in runs.values())
                detail = f"{ours:,.0f}/s against {theirs:,.0f}/s of {version()}; {SERVICES:,} names, {rounds} runs each"
                found.append((f"DNS answers a second, {clients} clients (target {TARGET})", ours / theirs, detail))
            found.append(
                ("DNS cold start with 10,000 services, seconds (reported)", start_s, "process start to serving")
            )
    return found


def main() -> int:
    """Print the rows; 1 if a target was missed."""
    missed = False
    for title, ratio, detail in rows():
        print(f"{ratio:6.2f}  {title}: {detail}")
        missed |= "target" in title and ratio < TARGET
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
