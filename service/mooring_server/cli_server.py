"""Which server a command talks to: the one named, the one running on the state directory, or one of its own.

A server writes `server.json` into its state directory while it runs. A command without `--server` looks there
first; finding none it starts a server as a subprocess and stops it when the last command that uses it is
done. Who uses it is known by shared file locks, which the system drops with their process, so that no command
stops a server that another one needs. A command that was killed stops nothing: then its server sees that
nobody holds a lock any more, and stops by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mooring_server.cli_output import err, fail

if TYPE_CHECKING:
    import mooring

    from mooring_server.config import Settings

_GUARDS = ("MOORING_AUTH", "MOORING_TLS_", "MOORING_HEALTH_LISTEN")
START_SECONDS = 180.0
"""Importing torch and loading a base takes 5 to 15 s here; a large base on a slow disk much longer."""


@dataclass(frozen=True)
class RunningServer:
    """What `server.json` says.

    Attributes:
        pid: process of the server.
        target: "127.0.0.1:PORT" of its gRPC port.
        embedded: whether a command started it for itself.
        base: the `--base` it was started with, "" for the packaged one.
        secure: whether it asks for TLS or credentials.
    """

    pid: int
    target: str
    embedded: bool
    base: str
    secure: bool = False


def record_path(state_dir: Path) -> Path:
    """Where a running server is recorded."""
    return state_dir / "server.json"


@contextmanager
def announced(state_dir: Path) -> Iterator[Callable[[RunningServer], None]]:
    """Hold the state directory for a server; yields what records the server once it is ready.

    The lock is what says that the server lives: process ids are given again, locks end with their process.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "server.lock").open("ab") as lock:
        for patience in range(
            20, -1, -1
        ):  # a command that looks whether a server lives holds it for an instant
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not patience:
                    running = read_record(state_dir)
                    where = f" at {running.target}" if running else ""
                    raise fail(
                        f"A server is already running on {state_dir}{where}.",
                        "Use it with --server, stop it, or give another --state-dir.",
                        code=4,
                    ) from None
                time.sleep(0.05)

        def announce(server: RunningServer) -> None:
            temporary = state_dir / f".server.json.{os.getpid()}"
            temporary.write_text(json.dumps(asdict(server)), encoding="utf-8")
            temporary.replace(record_path(state_dir))

        try:
            yield announce
        finally:
            record_path(state_dir).unlink(missing_ok=True)


def read_record(state_dir: Path) -> RunningServer | None:
    """The recorded server if it lives; a record that a killed server left behind counts as none."""
    try:
        with (state_dir / "server.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return RunningServer(**json.loads(record_path(state_dir).read_text(encoding="utf-8")))
    except OSError:  # no such directory yet
        pass
    return None


@contextmanager
def _lock(path: Path, mode: int) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        fcntl.flock(handle, mode)
        yield handle


@contextmanager
def connect(server: str, state_dir: Path | None, *, base: str = "") -> Iterator[mooring.Client]:
    """A client of the named server, or of the one on the state directory, started if there is none.

    Args:
        server: "host:port", or "" for an embedded server.
        state_dir: its state directory, None for the default.
        base: base model of a server that has to be started.
    """
    if server:
        with _client(server, secure=True) as client:
            yield client
        return
    folder = resolve_state_dir(state_dir)
    with _lock(folder / "server.users", fcntl.LOCK_SH) as users:
        running = _find_or_start(folder, base)
        try:
            with _client(running.target, secure=running.secure) as client:
                yield client
        finally:
            if running.embedded:
                _stop_if_last(running, users)


def _client(target: str, *, secure: bool) -> mooring.Client:
    """A client with the credentials of the environment, for a server that asks for any.

    Raises:
        typer.Exit: they cannot be used with this target.
    """
    import mooring

    try:
        return mooring.Client(target, **(mooring.from_environment() if secure else {}))
    except (ValueError, OSError) as error:
        raise fail(
            str(error),
            "For TLS set MOORING_ROOT_CERTIFICATES; docs/security.md lists what else clients read.",
            code=2,
        ) from None


def resolve_state_dir(state_dir: Path | None) -> Path:
    """The state directory: the one given, `MOORING_STATE_DIR`, or the user's default."""
    from mooring_server.config import default_state_dir

    return state_dir or Path(os.environ.get("MOORING_STATE_DIR") or default_state_dir())


def read_settings(**options: object) -> Settings:
    """Settings from the options that were given, over `MOORING_*` variables, over defaults.

    Raises:
        typer.Exit: one of them is wrong.
    """
    from pydantic import ValidationError

    from mooring_server.config import Settings

    try:
        return Settings(**{name: value for name, value in options.items() if value})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        field = "_".join(str(part) for part in first["loc"])
        raise fail(
            f"{field}: {first['msg'].removeprefix('Value error, ')}",
            f"Change --{field.replace('_', '-')} or MOORING_{field.upper()}.",
            code=2,
        ) from None


def _find_or_start(folder: Path, base: str) -> RunningServer:
    with _lock(folder / "server.start", fcntl.LOCK_EX):
        running = read_record(folder)
        if running is None:
            return _start(folder, base)
    if base and base != running.base:
        raise fail(
            f"A server with base {running.base or 'dinghy'!r} is running on {folder}.",
            "Stop it, or give another --state-dir for the other base.",
            code=4,
        )
    return running


def server_command(folder: Path, base: str) -> list[str]:
    """The command line of an embedded server."""
    command = [sys.executable, "-m", "mooring_server", "serve", "--embedded", "--state-dir", str(folder)]
    return [*command, "--base", base] if base else command


def _start(folder: Path, base: str) -> RunningServer:
    log_path = folder / "server.log"
    command = server_command(folder, base)
    # its own state on loopback alone, for this user's commands: what protects a shared server is left out
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_GUARDS)}
    variables = {**kept, "MOORING_LISTEN": "127.0.0.1:0", "MOORING_METRICS_LISTEN": ""}
    with log_path.open("ab") as log:
        offset = log.tell()
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=variables,
            start_new_session=True,  # Ctrl-C stops the command, which then stops the server in order
        )
    status = err.status("starting a server (torch and the base model take some seconds) …")
    with status if err.is_terminal else contextlib.nullcontext():
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            running = read_record(folder)
            if running is not None and running.pid == process.pid:
                return running
            if process.poll() is not None:
                raise fail("The server did not start.", _last_words(log_path, offset), code=5)
            time.sleep(0.05)
    process.terminate()
    raise fail(f"The server was not ready after {START_SECONDS:.0f} s.", f"See {log_path}.", code=5)


def _last_words(log_path: Path, offset: int) -> str:
    """What the server said before it gave up."""
    with log_path.open("rb") as log:
        log.seek(offset)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
    return f"{said.removeprefix('error: ')}  (log: {log_path})".strip()


def _stop_if_last(running: RunningServer, users: IO[bytes]) -> None:
    """Stop an embedded server unless another command uses it; it finishes calls and checkpoints its job."""
    try:
        # our own shared lock becomes an exclusive one only when nobody else holds one
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pid, signal.SIGTERM)
        _wait_for_exit(running.pid, 60.0)


def stop_when_abandoned(state_dir: Path, every: float = 2.0) -> None:
    """End this process as SIGTERM does once no command uses its state directory; returns at once.

    The lock that shows it is kept: a command that begins meanwhile waits for this server's end and starts
    another.

    Args:
        state_dir: of this embedded server.
        every: seconds between two looks.
    """
    users = (state_dir / "server.users").open("ab")

    def watch() -> None:
        while True:
            time.sleep(every)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=watch, name="mooring-abandoned", daemon=True).start()


def _wait_for_exit(pid: int, seconds: float) -> None:
    """Wait until a process is gone, whether or not it is our child."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
