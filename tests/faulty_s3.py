"""A proxy on loopback between a server and S3 that fails, dawdles, loses and lies on command."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from servers import S3

_HOP = {"content-length", "transfer-encoding", "connection", "date", "server"}
FAULTS = ("fail", "drop", "slow", "lose", "truncate", "stale", "corrupt")


class Faults:
    """What goes wrong, as probabilities; set them while it runs.

    Attributes:
        rates: fault → share of the requests it strikes. "fail": answered 503; "drop": the connection is
            closed; "slow": answered `delay` seconds late; "lose": a write is acknowledged and thrown away;
            "truncate": half of a write is kept and acknowledged; "stale": an overwriting write is
            acknowledged, the old bytes stay; "corrupt": a read's body has a flipped bit.
        struck: fault → how often it struck.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rates: dict[str, float] = {}
        self.struck = dict.fromkeys(FAULTS, 0)
        self.delay = 0.2
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def strikes(self, fault: str) -> bool:
        """Whether this fault strikes now."""
        with self._lock:
            hit = self._random.random() < self.rates.get(fault, 0.0)
            self.struck[fault] += hit
            return hit


@contextmanager
def faulty(upstream: S3, seed: int = 0) -> Iterator[tuple[S3, Faults]]:
    """The same bucket behind the proxy; yields where, and what to set."""
    faults, target = Faults(seed), urlsplit(upstream.endpoint)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if faults.strikes("drop"):
                self.close_connection = True
                self.connection.close()
                return
            if faults.strikes("slow"):
                time.sleep(faults.delay)
            if faults.strikes("fail"):
                self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
                return
            if self.command == "PUT":
                if faults.strikes("lose"):
                    self._answer(200, {"ETag": '"0"'}, b"")
                    return
                if faults.strikes("truncate"):
                    body = body[: len(body) // 2]
                if faults.strikes("stale") and self._forward("HEAD", b"")[0] == 200:
                    self._answer(200, {"ETag": '"0"'}, b"")
                    return
            status, headers, data = self._forward(self.command, body)
            is_read = self.command == "GET" and status == 200 and data and "list-type" not in self.path
            if is_read and faults.strikes("corrupt"):
                data = bytes([data[0] ^ 1]) + data[1:]
            self._answer(status, headers, data)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle  # noqa: N815 - http.server's names

        def _forward(self, method: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
            kept = {
                k: v for k, v in self.headers.items() if k.lower() not in {"content-length", "connection"}
            }
            connection.request(
                method, self.path, body=body, headers=kept | {"Content-Length": str(len(body))}
            )
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            return answer.status, dict(answer.getheaders()), data

        def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in {
                        "content-length",
                        "transfer-encoding",
                        "connection",
                        "date",
                        "server",
                    }:
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)
            except OSError:  # the caller was killed
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield replace(upstream, endpoint=f"http://127.0.0.1:{server.server_port}"), faults
    finally:
        server.shutdown()
        server.server_close()
