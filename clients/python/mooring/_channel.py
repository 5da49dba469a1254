"""How the client's channels are configured: retries, keepalive, message sizes.

Retries are gRPC's own, by service config, so that they respect deadlines and the server's push-back
(`grpc-retry-pushback-ms`). Only UNAVAILABLE is retried: every creating call carries a `request_id`, so that a
retried one is the same one. A stream is retried until its first message; afterwards `watch` resumes by
sequence.
"""

from __future__ import annotations

import json

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""gRPC's default limit, kept on both sides: whatever is larger travels in chunks."""

SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],  # every method
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}


def channel_options() -> list[tuple[str, object]]:
    """Options of `grpc.insecure_channel` and its relatives, sync and asyncio."""
    return [
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        # an upload of photos is kept for a retry; 256 KiB, the default, would give it up
        ("grpc.per_rpc_retry_buffer_size", 16 * 1024 * 1024),
        # an open call without data is probed every 30 s; the server allows 10 s
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.primary_user_agent", "mooring-python"),
        # a client that outlives a server restart finds the new one within seconds, not minutes
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
