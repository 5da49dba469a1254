"""The health port: what probes learn at every stage of a server's life; nothing else answers there."""

from __future__ import annotations

import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mooring.v1 import personalization_pb2, personalization_pb2_grpc
from mooring_server import server as server_module
from mooring_server.cli import app
from mooring_server.cli_health import address_to_ask
from mooring_server.config import Settings
from mooring_server.errors import MooringError, Reason
from mooring_server.rpc.probes import LIVE
from mooring_server.server import EmbeddedServer
from pydantic import ValidationError
from rpc_calls import DEADLINE, settings_for
from typer.testing import CliRunner

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "mooring.v1.PersonalizationService"


def asked(target: str, service: str) -> int:
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE).status


@pytest.fixture
def starting(tiny_sd15, tmp_path, monkeypatch):
    """A server that loads its base only once it is let."""
    loading, go_on = threading.Event(), threading.Event()
    load = server_module.load_base

    def held(*arguments, **options):
        loading.set()
        go_on.wait(DEADLINE)
        return load(*arguments, **options)

    monkeypatch.setattr(server_module, "load_base", held)
    running = EmbeddedServer(settings_for(tiny_sd15, tmp_path, health_listen="127.0.0.1:0", drain_seconds=60))
    thread = threading.Thread(target=running.__enter__)
    thread.start()
    assert loading.wait(DEADLINE)
    yield running, go_on, thread
    go_on.set()
    thread.join()
    running.__exit__(None, None, None)


def test_probes_tell_loading_from_serving_from_draining_and_live_from_all(starting):
    running, go_on, thread = starting
    probes = running.server.health_target
    assert probes != running.target
    assert (asked(probes, ""), asked(probes, SERVICE), asked(probes, LIVE)) == (
        NOT_SERVING,
        NOT_SERVING,
        SERVING,
    )
    go_on.set()
    thread.join()
    assert (asked(probes, ""), asked(probes, SERVICE), asked(probes, LIVE)) == (SERVING, SERVING, SERVING)
    with pytest.raises(grpc.RpcError) as caught:
        asked(probes, "mooring.v1.Nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    # a running call holds the drain open
    with grpc.insecure_channel(running.target) as channel:
        stub = personalization_pb2_grpc.PersonalizationServiceStub(channel)
        call = stub.Generate(personalization_pb2.GenerateRequest(prompt="a dog", steps=150, count=16))
        next(call)
        stopping = threading.Thread(target=running.__exit__, args=(None, None, None))
        stopping.start()
        with grpc.insecure_channel(probes) as watching:
            watch = health_pb2_grpc.HealthStub(watching).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert next(answer.status for answer in watch if answer.status != SERVING) == NOT_SERVING
            assert asked(probes, LIVE) == SERVING
        call.cancel()
        stopping.join()
    with pytest.raises(grpc.RpcError):
        asked(probes, LIVE)


def test_nothing_but_health_answers_on_the_health_port(tiny_sd15, tmp_path):
    settings = settings_for(tiny_sd15, tmp_path, health_listen="127.0.0.1:0")
    with EmbeddedServer(settings) as running, grpc.insecure_channel(running.server.health_target) as channel:
        stub = personalization_pb2_grpc.PersonalizationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetServerInfo(personalization_pb2.GetServerInfoRequest(), timeout=DEADLINE)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=LIVE))
        assert [answer.status for answer in watch] == [SERVING]

        # the command asks it, and an address in use is said
        def command(*arguments: str):
            return CliRunner().invoke(app, ["health", "--target", running.server.health_target, *arguments])

        assert (command().exit_code, command("--service", LIVE).output) == (0, "SERVING\n")
        assert command("--service", "mooring.v1.Nothing").exit_code == 3
        taken = settings_for(tiny_sd15, tmp_path / "b", health_listen=running.server.health_target)
        with pytest.raises(MooringError) as in_use, EmbeddedServer(taken):
            pass
        assert in_use.value.reason is Reason.INVALID_FIELD
        assert "MOORING_HEALTH_LISTEN" in str(in_use.value)
    gone = command()
    assert gone.exit_code == 5
    assert "does not answer" in gone.output


def test_the_command_asks_the_health_port_where_there_is_one(monkeypatch):
    for name in ("MOORING_LISTEN", "MOORING_HEALTH_LISTEN"):
        monkeypatch.delenv(name, raising=False)
    assert address_to_ask("") == "127.0.0.1:50051"
    monkeypatch.setenv("MOORING_LISTEN", "[::]:6000")
    assert address_to_ask("") == "[::1]:6000"
    monkeypatch.setenv("MOORING_HEALTH_LISTEN", "0.0.0.0:8081")
    assert address_to_ask("") == "127.0.0.1:8081"
    assert address_to_ask("host:1") == "host:1"


@pytest.mark.parametrize("wrong", ["8081", "0.0.0.0:", "0.0.0.0:x", "unix:/run/x", "::1:8081", ":8081"])
def test_what_is_no_health_address_is_refused(wrong):
    with pytest.raises(ValidationError, match="not host:port"):
        Settings(health_listen=wrong)


def test_the_health_port_may_be_reached_from_outside_though_the_server_may_not():
    assert Settings(health_listen="0.0.0.0:8081").health_listen == "0.0.0.0:8081"
    assert Settings(health_listen="[::]:8081").health_listen == "[::]:8081"
