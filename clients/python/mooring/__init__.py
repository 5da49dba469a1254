"""Client of the Mooring personalisation service: gRPC and protobuf, no tensor library.

    import mooring

    with mooring.Client("127.0.0.1:50051") as client:
        client.create_subject("rex", class_noun="dog", rights="owned", photos=["rex1.jpg", "rex2.jpg"])
        job = client.wait(client.train("rex"), on_event=print)
        client.images("a photo of <rex> on the beach", adapter=job.adapter)[0].save("rex.png")

`mooring.aio.Client` is the same for asyncio; `mooring.errors` are what a call can fail with; `mooring.v1` are
the generated protobuf messages and stubs.
"""

from mooring import aio, errors
from mooring._channel import from_environment
from mooring.client import DEFAULT_TARGET, Client
from mooring.types import (
    BatchDone,
    BatchError,
    BatchImage,
    BatchRow,
    Done,
    Image,
    JobEvent,
    Progress,
    Queued,
)

__all__ = [
    "DEFAULT_TARGET",
    "BatchDone",
    "BatchError",
    "BatchImage",
    "BatchRow",
    "Client",
    "Done",
    "Image",
    "JobEvent",
    "Progress",
    "Queued",
    "aio",
    "errors",
    "from_environment",
]
