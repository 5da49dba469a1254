"""A storm that is ended early leaves nothing behind, and one that is killed leaves no process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # accelerate brings it
import pytest

from .processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the storm puts its folders: open to the account that PostgreSQL runs as, as pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="mooring-ending-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def members(session: int) -> list[str]:
    """Command lines of the processes of a session, but for those that have ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("scenario", "how"),
    [
        pytest.param("kill-local-upload", signal.SIGTERM),
        pytest.param("kill-local-upload", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("kill-local-upload", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("s3-failing", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("real-server", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_storm_that_is_ended_leaves_no_process(
    temporary: Path, tmp_path: Path, scenario: str, how: signal.Signals
) -> None:
    said = tmp_path / "said"
    command = [sys.executable, "-m", "tests.chaos", "20", "--only", scenario]
    with said.open("wb") as out:
        storm = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        # under way: a worker has asked for something, or a server has written its first rows
        while not [*temporary.glob("mooring-chaos-*/notes"), *temporary.glob("mooring-chaos-*/state/*.db")]:
            assert storm.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # the storm, its fork server and a worker at least
        assert len(members(storm.pid)) > 2
        storm.send_signal(how)
        code = storm.wait(PATIENCE)
        if how is signal.SIGKILL:
            assert code == -how
        else:
            assert code == 128 + how, said.read_text()
            assert "Traceback" not in said.read_text()
            assert list(temporary.glob("mooring-*")) == []  # torch keeps a cache of its own there
        while left := members(storm.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(storm.pid, signal.SIGKILL)
        storm.wait()
