"""`mooring health`: one question to a server's health service, answered by the exit status.

What a container's health check, a systemd unit or a script needs; no torch, no credential.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mooring_server.cli_output import fail, out

_ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - what a server listens on, not what we do


def address_to_ask(given: str) -> str:
    """The address given, else the health port's, else the server's, else the default."""
    address = (
        given
        or os.environ.get("MOORING_HEALTH_LISTEN")
        or os.environ.get("MOORING_LISTEN")
        or "127.0.0.1:50051"
    )
    host, _, port = address.rpartition(":")
    return f"{_ANY.get(host, host)}:{port}"


def health(
    *,
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="HOST:PORT", help="Default: MOORING_HEALTH_LISTEN, or else MOORING_LISTEN."
        ),
    ] = "",
    service: Annotated[
        str,
        typer.Option(
            "--service", metavar="NAME", help='"live", or a service of the contract. Default: all of them.'
        ),
    ] = "",
    seconds: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait.")] = 3.0,
) -> None:
    """Ask a server whether it serves: exit status 0 when it does, 5 when it does not.

    It asks in plain gRPC: give a server with TLS a health port of its own
    (MOORING_HEALTH_LISTEN).

    \b
    mooring health
    mooring health --target 127.0.0.1:8081 --service live
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = address_to_ask(target)
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=seconds)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise fail(f"{address} knows no service {service!r}.", code=3) from None
            raise fail(
                f"{address} does not answer: {error.code().name}.",
                "Is it the server's health port? A port with TLS cannot be asked this way.",
                code=5,
            ) from None
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    out.print(name)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(5)
