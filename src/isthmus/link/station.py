"""Stations: a readiness loop with the buffers that its connections share; and the crew, stations with a thread each.

Everything of a connection happens on one station at a time, so nothing needs a lock. The main station is the worker's
own loop: idle and light connections live there and cost no thread and no hand-over. A stream that turns out to be bulk
moves to a crew station with both its sockets, and comes back when it is quiet. The main loop's thread runs at a higher
priority (Linux nice values are per thread), so that a request on it does not wait behind bulk for the processor.
Handshakes, a millisecond of arithmetic each, run on the crew too; OpenSSL works without the interpreter's lock.
"""

import os
import threading

import structlog

from isthmus.loop.loop import Loop
from isthmus.wire.stream import HEADER_BYTES

log = structlog.get_logger(__name__)

BULK_CHUNK_BYTES = 768 * 1024
LIGHT_CHUNK_BYTES = 64 * 1024
RECORD_BYTES = 16 * 1024 + 512
MAIN_NICE, CREW_NICE = -5, 0


class Station:
    """A loop and its buffers. ``chunk_bytes`` is the most that one turn of a connection moves."""

    __slots__ = ("bulk", "chunk_bytes", "cipher", "loop", "out", "out_body", "plain")

    def __init__(self, loop: Loop, *, bulk: bool) -> None:
        self.loop = loop
        self.bulk = bulk
        self.chunk_bytes = BULK_CHUNK_BYTES if bulk else LIGHT_CHUNK_BYTES
        self.cipher = memoryview(bytearray(self.chunk_bytes))
        self.plain = memoryview(bytearray(self.chunk_bytes + 2 * RECORD_BYTES))
        self.out = memoryview(bytearray(HEADER_BYTES + self.chunk_bytes + HEADER_BYTES))
        self.out_body = self.out[HEADER_BYTES:-HEADER_BYTES]  # an END may follow


class Crew:
    """A fixed number of bulk stations. Used from the main loop's thread."""

    def __init__(self, size: int) -> None:
        self.stations = [Station(Loop(), bulk=True) for _ in range(size)]
        self._threads: list[threading.Thread] = []
        self._next = 0

    def start(self) -> None:
        """From the main loop's thread, whose priority is raised."""
        set_nice(MAIN_NICE)
        for number, station in enumerate(self.stations):
            thread = threading.Thread(target=self._run, args=(station,), name=f"link-crew-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def pick(self) -> Station:
        """The next station in turn."""
        self._next = (self._next + 1) % len(self.stations)
        return self.stations[self._next]

    def stop(self) -> None:
        """End the threads; what still runs on them is left as it is, for the process ends."""
        for station in self.stations:
            station.loop.stop()
        for thread in self._threads:
            thread.join(2.0)

    @staticmethod
    def _run(station: Station) -> None:
        set_nice(CREW_NICE)
        station.loop.run()


def set_nice(value: int) -> None:
    """Of the calling thread; without the privilege it stays as it is."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), value)
    except OSError as error:
        log.info("thread priority unchanged", wanted=value, reason=str(error))
