"""Bytes that are no message are the caller's error, on every shape of call."""

from __future__ import annotations

import grpc
import pytest
from rpc_calls import DEADLINE, read_failure

GARBAGE = b"\x0a\xff\xff\xff\xff\xff\x0f"
NO_UTF8 = b"\x0a\x02\xff\xfe"  # field 1, a string
METHODS = {
    "unary_unary": "SubjectService/GetSubject",
    "unary_stream": "PersonalizationService/Generate",
    "stream_unary": "SubjectService/UploadPhotos",
    "stream_stream": "PersonalizationService/GenerateBatch",
}


@pytest.mark.parametrize("shape", METHODS)
@pytest.mark.parametrize("data", [GARBAGE, NO_UTF8])
def test_undecodable_requests_are_refused_with_a_reason(stubs, shape, data):
    stub = getattr(stubs.channel, shape)(f"/mooring.v1.{METHODS[shape]}")

    def call():
        answer = stub(iter([data]) if shape.startswith("stream") else data, timeout=DEADLINE)
        return list(answer) if shape.endswith("stream") else answer

    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    failure = read_failure(error.code(), error.details(), error.trailing_metadata())
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert "mooring.v1." in failure.message
