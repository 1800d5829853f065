"""Names: answers a second of the DNS worker against dnsmasq serving the same 10,000 names, by dnsperf.

Both serve in one network namespace that is made and removed here; their runs alternate. dnsperf has the first
processor, the two servers the second. dnsmasq has the names in a hosts file, a cache of 10,000, its defaults otherwise.
``python -m bench dns``; needs root, dnsmasq, dnsperf and dig.
"""

import os
import re
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.harness import Row, interleave, medians, show, version
from isthmus.dns.worker import DnsConfig, command
from isthmus.plan.serving import PortPlan, ServiceKind, ServicePlan
from isthmus.wire import worker

SERVICES = 10_000
CLIENTS = (2, 200)
ROUNDS = 9
RUN_S = 1
TARGET = 1.0
OURS, THEIRS = "127.0.0.2", "127.0.0.3"
CLIENT_CPU = os.environ.get("BENCH_CLIENT_CPU", "0")
SERVER_CPU = os.environ.get("BENCH_SERVER_CPU", "1")
ON_CLIENT_CPU = ["taskset", "-c", CLIENT_CPU]
ON_SERVER_CPU = ["taskset", "-c", SERVER_CPU]


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
def _isthmus(inside: list[str]) -> Iterator[tuple[int, float]]:
    """The worker, fed as the agent feeds it; yields its process and the seconds from its start until it serves all."""
    ours, theirs = socket.socketpair()
    config = DnsConfig(listen=(OURS,), resolv_conf="/dev/null")
    began_s = time.monotonic()
    process = subprocess.Popen(
        [*inside, *ON_SERVER_CPU, *command(theirs.fileno(), config)],
        pass_fds=[theirs.fileno()],
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    try:
        messages: list[worker.ToWorker] = [worker.PutService(plan) for plan in plans()]
        for message in (*messages, worker.Synced(), worker.Ask(1, "services")):
            ours.sendall(worker.pack(message))
        reader = worker.FromWorkerReader()
        ours.settimeout(30)
        while not any(isinstance(message, worker.Answer) for message in reader.feed(ours.recv(65_536))):
            pass
        yield process.pid, time.monotonic() - began_s
    finally:
        ours.close()
        process.wait(10)


@contextmanager
def _dnsmasq(inside: list[str], directory: Path) -> Iterator[int]:
    hosts = directory / "hosts"
    hosts.write_text("".join(f"{plan.cluster_ips[0]} {_name(plan)}\n" for plan in plans()))
    words = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]
    words += ["--pid-file=", "--bind-interfaces", f"--listen-address={THEIRS}", f"--addn-hosts={hosts}"]
    process = subprocess.Popen([*inside, *ON_SERVER_CPU, *words, "--cache-size=10000"], stderr=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


def _answers_per_s(inside: list[str], server: str, questions: Path, clients: int, run_s: int = RUN_S) -> float:
    """One dnsperf run. Raises RuntimeError if an answer is lost or is not NOERROR: speed without answers is none."""
    words = ["dnsperf", "-s", server, "-d", str(questions), "-c", str(clients), "-l", str(run_s)]
    out = subprocess.run(
        [*inside, *ON_CLIENT_CPU, *words], check=True, capture_output=True, text=True, timeout=60
    ).stdout
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


class _Costs:
    """Processor time of the servers an answer: what a busy machine does to the rates, it does less to this."""

    def __init__(self) -> None:
        self._ticks: Counter[int] = Counter()
        self._answers: Counter[int] = Counter()

    def of(self, pid: int, run: Callable[[], float]) -> float:
        """Make a run, book what it cost the server ``pid``, return its rate."""
        before = _ticks(pid)
        rate = run()
        self._ticks[pid] += _ticks(pid) - before
        self._answers[pid] += round(rate * RUN_S)
        return rate

    def us(self, pid: int) -> float:
        """Microseconds an answer."""
        return self._ticks[pid] / os.sysconf("SC_CLK_TCK") / self._answers[pid] * 1e6


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def rows(rounds: int = ROUNDS) -> list[Row]:
    """One row a number of clients: ours divided by dnsmasq's."""
    found: list[Row] = []
    peer = version("dnsmasq", "--version").split("  ")[0]
    with tempfile.TemporaryDirectory() as name, _namespace() as inside:
        directory = Path(name)
        questions = directory / "questions"
        questions.write_text("".join(f"{_name(plan)} A\n" for plan in plans()))
        with _dnsmasq(inside, directory) as their_pid, _isthmus(inside) as (our_pid, start_s):
            pids, costs = {OURS: our_pid, THEIRS: their_pid}, _Costs()
            for server in (OURS, THEIRS):
                _wait_for(inside, server)
                _answers_per_s(inside, server, questions, 2, 1)  # both warm: caches filled, names touched once
            for clients in CLIENTS:
                ways = {
                    server: partial(costs.of, pid, partial(_answers_per_s, inside, server, questions, clients))
                    for server, pid in pids.items()
                }
                middle = medians(interleave(ways, rounds))
                detail = f"{middle[OURS]:,.0f}/s; {peer}: {middle[THEIRS]:,.0f}/s; {rounds} runs each"
                found.append(Row(f"answers a second, {clients} clients", middle[OURS] / middle[THEIRS], detail, TARGET))
            ours_us, theirs_us = costs.us(our_pid), costs.us(their_pid)
            detail = f"{ours_us:.1f} µs; {peer}: {theirs_us:.1f} µs, kernel included"
            found.append(Row("processor time an answer", ours_us / theirs_us, detail, at_most=True))
            found.append(Row("cold start, seconds", start_s, f"process start until {SERVICES:,} services are served"))
    return found


if __name__ == "__main__":
    raise SystemExit(not show("dns", rows()))
