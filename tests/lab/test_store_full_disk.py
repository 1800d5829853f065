"""The offline copy on a disk that is really full: a small tmpfs in a mount namespace of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIO = """
import asyncio, sys
from pathlib import Path
from isthmus.model.findings import Code
from isthmus.store.directory import DirectoryStore

async def main(store, state):
    stop = asyncio.Event()
    async for change in DirectoryStore(store, state / "store.copy").changes(stop):
        unsaved = [finding for finding in change.findings if finding.code is Code.OFFLINE_UNSAVED]
        if unsaved:
            print(len(change.put) or change.counters.objects, unsaved[0].text)
            stop.set()

asyncio.run(asyncio.wait_for(main(Path(sys.argv[1]), Path(sys.argv[2])), 20))
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_a_full_disk_is_reported_and_the_store_goes_on(tmp_path: Path) -> None:
    store, state = tmp_path / "store", tmp_path / "state"
    store.mkdir()
    state.mkdir()
    for i in range(400):
        (store / f"s{i}.yaml").write_text(
            f"apiVersion: v1\nkind: Service\nmetadata: {{name: s{i}}}\n"
            f"spec: {{clusterIP: 10.96.{i // 250}.{i % 250 + 1}, ports: [{{port: 80}}]}}\n"
        )
    # The interpreter's path may hold spaces: it goes to the shell as an argument, not as text.
    script = 'mount -t tmpfs -o size=16k tmpfs "$4" && exec "$1" -c "$2" "$3" "$4"'
    arguments = ["sh", sys.executable, SCENARIO, str(store), str(state)]
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "400 cannot save the offline copy" in done.stdout
    assert "No space left" in done.stdout
    assert not list(state.iterdir())
