"""The embedded server: found, shared, started once, stopped by its last user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from mooring_server import cli_server
from mooring_server.cli_server import RunningServer, connect, read_record, record_path

PATIENCE = 240.0
"""Seconds after which something will not happen any more, on a machine that is busy with other work."""

FAKE_SERVER = """
import os, signal, sys, time
from pathlib import Path
from mooring_server.cli_server import RunningServer, announced
folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if "--fail" in sys.argv:
    print("error: The base model cannot be used.", file=sys.stderr)
    sys.exit(4)
with announced(folder) as announce:
    (folder / "starts").open("a").write("x")
    time.sleep(0.2)
    announce(RunningServer(pid=os.getpid(), target="127.0.0.1:1", embedded=True, base=""))
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def fake_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cli_server, "server_command", lambda folder, _: [sys.executable, "-c", FAKE_SERVER, str(folder)]
    )


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that somebody started by hand."""
    code = FAKE_SERVER.replace("embedded=True", "embedded=False")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    wait_for(lambda: read_record(tmp_path) is not None)
    yield process
    process.terminate()
    process.wait(PATIENCE)


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


def test_a_server_is_started_and_stopped(tmp_path: Path) -> None:
    with connect("", tmp_path) as client:
        running = read_record(tmp_path)
        assert running is not None
        assert client.target == running.target
    assert read_record(tmp_path) is None
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, 0)


def test_a_running_server_is_used_and_left_alone(tmp_path: Path, serving: subprocess.Popen[bytes]) -> None:
    with connect("", tmp_path):
        pass
    assert serving.poll() is None
    assert starts(tmp_path) == 1


def test_two_commands_share_one_server_and_the_last_one_stops_it(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom mooring_server import cli_server\n"
        f"cli_server.server_command = lambda f, _: [sys.executable, '-c', {FAKE_SERVER!r}, str(f)]\n"
        "with cli_server.connect('', Path(sys.argv[1])):\n"
        "    print('in', flush=True)\n    sys.stdin.readline()\n"
    )
    users = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for user in users:
        assert user.stdout is not None
        assert user.stdout.readline() == b"in\n"
    users[0].communicate(b"\n", timeout=PATIENCE)
    assert users[0].returncode == 0
    assert users[1].poll() is None
    assert read_record(tmp_path) is not None, "the first to finish must not stop the other's server"
    users[1].communicate(b"\n", timeout=PATIENCE)
    assert users[1].returncode == 0
    assert read_record(tmp_path) is None
    assert starts(tmp_path) == 1


def test_a_server_whose_command_was_killed_stops_by_itself(tmp_path: Path) -> None:
    watching = FAKE_SERVER.replace(
        "with announced", "cli_server.stop_when_abandoned(folder, 0.05)\nwith announced"
    ).replace("import os,", "from mooring_server import cli_server\nimport os,")
    script = (
        "import sys\nfrom pathlib import Path\nfrom mooring_server import cli_server\n"
        f"cli_server.server_command = lambda f, _: [sys.executable, '-c', {watching!r}, str(f)]\n"
        "with cli_server.connect('', Path(sys.argv[1])):\n"
        "    print('in', flush=True)\n    sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == b"in\n"
        time.sleep(0.3)  # several looks while the command lives
        assert read_record(tmp_path) is not None
        user.kill()
    wait_for(lambda: read_record(tmp_path) is None)
    assert not record_path(tmp_path).exists(), "it drained as on SIGTERM"
    with connect("", tmp_path):
        assert starts(tmp_path) == 2


def test_the_record_of_a_killed_server_counts_as_none(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", FAKE_SERVER, str(tmp_path)])
    wait_for(lambda: read_record(tmp_path) is not None)
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    assert record_path(tmp_path).exists()
    assert read_record(tmp_path) is None
    with connect("", tmp_path):
        assert starts(tmp_path) == 2


def test_a_record_with_a_foreign_process_is_never_signalled(tmp_path: Path) -> None:
    """Process ids are given again: a stale record that names this very test must not get it terminated."""
    stale = RunningServer(pid=os.getpid(), target="127.0.0.1:2", embedded=True, base="")
    tmp_path.mkdir(exist_ok=True)
    record_path(tmp_path).write_text(json.dumps(stale.__dict__))
    with connect("", tmp_path) as client:
        assert client.target == "127.0.0.1:1"


def test_a_server_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        cli_server, "server_command", lambda f, _: [sys.executable, "-c", FAKE_SERVER, str(f), "--fail"]
    )
    with pytest.raises(typer.Exit) as caught, connect("", tmp_path):
        pass
    assert caught.value.exit_code == 5
    said = capsys.readouterr().err
    assert "The server did not start." in said
    assert "The base model cannot be used." in said


def test_another_base_than_the_running_one_is_refused(
    tmp_path: Path, serving: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, connect("", tmp_path, base="other"):
        pass
    assert caught.value.exit_code == 4
    assert "base 'dinghy' is running" in capsys.readouterr().err


def test_one_state_directory_takes_one_server(tmp_path: Path, serving: subprocess.Popen[bytes]) -> None:
    again = subprocess.run(
        [sys.executable, "-c", FAKE_SERVER, str(tmp_path)], capture_output=True, check=False, timeout=PATIENCE
    )
    assert again.returncode != 0
    assert serving.poll() is None


def test_commands_that_begin_together_start_one_server(tmp_path: Path) -> None:
    inside = threading.Barrier(3, timeout=PATIENCE)

    def use() -> None:
        with connect("", tmp_path):
            inside.wait()

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert starts(tmp_path) == 1
    assert read_record(tmp_path) is None
