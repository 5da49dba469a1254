"""Both clients and the real server over TLS with an API key; it is killed in mid-stream."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mooring
import numpy as np
import pytest
from credentials import certify
from mooring import errors
from mooring._channel import is_loopback
from PIL import Image

PATIENCE = 240.0
TESTS = Path(__file__).resolve().parents[1]


class ServerProcess:
    """`tests/serve_tiny.py` with a certificate; can be killed and started again on its port and state."""

    def __init__(self, folder: Path) -> None:
        authority = certify("test authority")
        self.authority, _ = authority.write(folder, "authority")
        self.certificate = certify("server", by=authority, dns=("localhost",)).write(folder, "server")
        self.folder = folder
        self.target, self.key = "localhost:0", ""
        self.start()

    def start(self) -> None:
        cert, key = map(str, self.certificate)
        environment = {
            **os.environ,
            "MOORING_AUTH": "api_key",
            "MOORING_TLS_CERT": cert,
            "MOORING_TLS_KEY": key,
            "MOORING_LEASE_SECONDS": "3",
            "MOORING_DRAIN_SECONDS": "1",
        }
        command = [sys.executable, TESTS / "serve_tiny.py", self.folder, self.target]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        ready = json.loads(self.process.stdout.readline())
        self.target, self.key = ready["target"], self.key or ready["key"]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def arguments(self) -> dict[str, Any]:
        """How to connect to it."""
        return {"api_key": self.key, "root_certificates": self.authority, "timeout": PATIENCE}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = ServerProcess(tmp_path_factory.mktemp("served"))
    yield running
    running.process.communicate()  # closes its standard input, which stops it


def test_the_credential_travels_with_every_call(server: ServerProcess) -> None:
    with mooring.Client(server.target, **server.arguments()) as client:
        assert client.server_info().tenant == "tenants/tests"
    given: list[str] = []

    def token() -> str:
        given.append(server.key)
        return server.key

    pem = server.authority.read_bytes()
    with mooring.Client(server.target, token=token, root_certificates=pem, timeout=PATIENCE) as client:
        client.server_info()
        client.server_info()
    assert len(given) == 2


async def test_the_credential_travels_with_every_asyncio_call(server: ServerProcess) -> None:
    async with mooring.aio.Client(server.target, **server.arguments()) as client:
        assert (await client.server_info()).tenant == "tenants/tests"


def test_a_wrong_key_and_no_key_are_typed_errors(server: ServerProcess) -> None:
    for arguments in ({"api_key": server.key[:-1] + "x"}, {}):
        with (
            mooring.Client(server.target, root_certificates=server.authority, **arguments) as client,
            pytest.raises(errors.UnauthenticatedError) as caught,
        ):
            client.server_info()
        assert caught.value.reason == "NOT_AUTHENTICATED"


def test_a_server_of_an_unknown_authority_is_not_trusted(server: ServerProcess) -> None:
    other = certify("another authority").cert_pem
    with (
        mooring.Client(server.target, root_certificates=other, timeout=PATIENCE) as client,
        pytest.raises(errors.UnavailableError),
    ):
        client.server_info()


async def test_a_server_is_killed_in_mid_stream(server: ServerProcess) -> None:
    """A watch of each client goes on after the restart; a generation that had begun is a typed error."""
    training = threading.Event()

    def note(event: mooring.JobEvent) -> int:
        if event.phase == "training" and event.step >= 10:
            training.set()
        return event.sequence

    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    with mooring.Client(server.target, **server.arguments()) as client:
        client.create_subject("rex", class_noun="dog", rights="owned", photos=[Image.fromarray(pixels)])
        job = client.train("rex", method="none", steps=80, checkpoint_every=5, preview_every=0)

        async def watch_with_asyncio() -> list[int]:
            async with mooring.aio.Client(server.target, **server.arguments()) as watching:
                return [note(event) async for event in watching.watch(job, patience=PATIENCE)]

        def generate_until_killed() -> None:
            assert training.wait(PATIENCE)
            for event in client.generate("a dog", steps=150, count=8):
                if isinstance(event, mooring.Progress) and server.process.poll() is None:
                    server.kill()

        def kill_and_start() -> None:
            with pytest.raises(errors.UnavailableError):
                generate_until_killed()
            assert server.process.poll() is not None
            server.start()

        watches = [
            asyncio.create_task(watch_with_asyncio()),
            asyncio.create_task(
                asyncio.to_thread(lambda: [note(event) for event in client.watch(job, patience=PATIENCE)])
            ),
        ]
        await asyncio.to_thread(kill_and_start)
        for sequences in await asyncio.gather(*watches):
            assert sequences[:-1] == list(range(1, len(sequences))), "a gap, or something twice"
            assert sequences[-1] in {len(sequences) - 1, len(sequences)}, "the end may repeat its number"
        assert client.wait(job).adapter.startswith("tenants/tests/adapters/rex@")
        assert len(client.images("a <rex> dog", adapter="rex")) == 1


@pytest.mark.parametrize("arguments", [{"api_key": "moor_1"}, {"token": lambda: "t"}])
def test_a_credential_is_not_sent_in_the_clear(arguments: dict[str, Any]) -> None:
    for kind in (mooring.Client, mooring.aio.Client):
        with pytest.raises(ValueError, match="in the clear"):
            kind("127.0.0.1:50051", **arguments)


def test_plain_text_is_for_loopback_only() -> None:
    for target in (
        "127.0.0.1:1",
        "[::1]:1",
        "localhost:1",
        "dns:///localhost:1",
        "ipv4:127.0.0.1:1",
        "unix:/x",
    ):
        assert is_loopback(target), target
    for target in ("10.0.0.1:1", "mooring.example:443", "127.0.0.1.example:1", "[2001:db8::1]:1", "example"):
        assert not is_loopback(target), target
