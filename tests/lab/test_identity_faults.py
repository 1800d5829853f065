"""Identity when things go wrong for real: no space on the disk, the issuer away for longer than a certificate lives."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from labkit import eventually
from relay_net import Net, net

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and mounts need root")

FULL = """
import os, sys
from pathlib import Path
from isthmus.files import StateNotWritten, write_private
where = Path(sys.argv[1])
write_private(where / "kept", b"old")
try:
    write_private(where / "kept", b"n" * 200_000)
except StateNotWritten as error:
    print(error)
print((where / "kept").read_bytes(), sorted(path.name for path in where.iterdir()))
"""


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Net]:
    with net(tmp_path) as made:
        yield made


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    # The interpreter's path may hold spaces: it goes to the shell as an argument, not as text.
    script = ["sh", "-c", 'mount -t tmpfs -o size=64k none "$2" && exec "$1" - "$2"', "sh", sys.executable, str(small)]
    done = subprocess.run(["unshare", "--mount", *script], input=FULL, capture_output=True, text=True, check=True)
    said, left = done.stdout.splitlines()
    assert "No space left on device" in said and "the old file is as it was" in said
    assert left == "b'old' ['kept']"


def test_a_certificate_that_expired_while_the_issuer_was_down_is_renewed(here: Net) -> None:
    """And a channel that was open then is not ended by the expiry itself."""
    here.start_relay(hours=4 / 3600)
    here.token("a")
    node = here.nodes["a"]
    node.start()
    eventually(lambda: node.told("credentials"), 10)
    first = node.told("credentials")[0]["serial"]
    here.stop_relay(signal.SIGKILL)
    time.sleep(6.0)  # past the certificate's end
    assert [one["serial"] for one in node.told("credentials")][-1] != "" and node.process is not None
    assert node.process.poll() is None
    back_s = time.time()
    here.start_relay(hours=4 / 3600)
    eventually(lambda: node.told("credentials", back_s), 12)
    assert node.told("credentials", back_s)[0]["serial"] != first
    eventually(lambda: node.told("relays", back_s, connected=["r1"]), 12)
    assert "Traceback" not in (here.directory / "a.log").read_text()


def test_short_lived_certificates_are_renewed_again_and_again_on_one_channel(here: Net) -> None:
    here.start_relay(hours=3 / 3600)
    here.token("a")
    node = here.nodes["a"]
    node.start()
    eventually(lambda: len(node.told("credentials")) >= 4, 20)
    report = here.relay_report()
    assert report["counters"]["channels"] == 1
    assert report["counters"]["renewed"] >= 3
    assert report["nodes"][0]["serial"] in {one["serial"] for one in node.told("credentials")[-2:]}
