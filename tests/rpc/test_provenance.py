"""Images that leave a real server say where they come from, and nothing about whom they are for."""

from __future__ import annotations

import io

import mooring
import numpy as np
import pytest
from mooring.v1 import personalization_pb2 as pb
from mooring_server.config import Role
from mooring_server.errors import MooringError, Reason
from mooring_server.provenance import identity
from mooring_server.provenance.verify import MarkState, examine
from mooring_server.server import EmbeddedServer
from PIL import Image
from rpc_calls import Stubs, publish, settings_for

PROMPT = "a photo of a <rex> dog in the snow"


@pytest.fixture(scope="module")
def client(server):
    with mooring.Client(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def anchors(runtime):
    return (runtime.settings.state_dir / identity.FOLDER / identity.AUTHORITY).read_text()


@pytest.fixture(scope="module")
def adapter(runtime):
    return publish(runtime, "signed")


def test_generate_sends_images_with_a_mark(client, runtime, adapter, anchors):
    images = client.images(PROMPT, adapter="signed", steps=2, count=2)
    assert len(images) == 2
    for image in images:
        mark = examine(image.data, anchors)
        assert (mark.state, mark.trusted) == (MarkState.VALID, True)
        assert mark.generator == f"Mooring {runtime.version}"
        assert (mark.base, mark.adapters) == (runtime.base.digest, (adapter.digest,))


def test_the_base_alone_names_no_adapter_and_several_are_all_named(client, runtime, adapter, anchors):
    (plain,) = client.images("a photo of a dog", steps=1)
    assert examine(plain.data, anchors).adapters == ()
    other = publish(runtime, "signed-too", seed=1, placeholder="<cup>")
    (mixed,) = client.images(PROMPT, adapter="signed", more_adapters={"signed-too": 0.5}, steps=1)
    assert examine(mixed.data, anchors).adapters == (adapter.digest, other.digest)


def test_generate_batch_sends_images_with_a_mark(client, runtime, anchors):
    requests = [(str(n), {"prompt": "a photo of a dog", "steps": 1, "seed": n}) for n in range(3)]
    events = client.generate_batch(requests)
    images = [event.image for event in events if isinstance(event, mooring.BatchImage)]
    assert len(images) == 3
    for image in images:
        assert (examine(image.data, anchors).trusted, examine(image.data).base) == (True, runtime.base.digest)


def test_the_pixels_are_those_of_a_server_that_marks_nothing(client, worded_base, tmp_path):
    with (
        EmbeddedServer(settings_for(worded_base, tmp_path, provenance=False)) as bare,
        mooring.Client(bare.target) as unmarked,
    ):
        (plain,) = unmarked.images("a photo of a dog", steps=3, seed=8)
        assert not (tmp_path / identity.FOLDER).exists()
    (marked,) = client.images("a photo of a dog", steps=3, seed=8)
    assert examine(plain.data).state is MarkState.NONE
    assert examine(marked.data).state is MarkState.VALID
    pixels = [np.asarray(Image.open(io.BytesIO(image.data))) for image in (plain, marked)]
    assert np.array_equal(*pixels)


def test_an_image_says_nothing_of_tenant_prompt_or_names(guarded, keys):
    runtime = guarded.server.runtime
    for tenant in ("acme", "other"):
        publish(runtime, f"harbour-{tenant}", tenant=tenant)
        stubs = Stubs(guarded.target, keys[tenant, Role.USER])
        request = {"prompt": PROMPT, "adapter": f"tenants/-/adapters/harbour-{tenant}", "steps": 1}
        chunks = [
            message.image.data
            for message in stubs.personalization.Generate(pb.GenerateRequest(**request))
            if message.HasField("image")
        ]
        data = b"".join(chunks)
        assert examine(data).state is MarkState.VALID
        for word in ("acme", "other", "harbour", "<rex>", "dog", "snow", "photo", "prompt", "tenant"):
            assert word.encode() not in data, word


def test_previews_are_sent_as_they_are(client):
    previews = []
    for event in client.generate("a photo of a dog", steps=2, preview_interval=1):
        if isinstance(event, mooring.Progress):
            previews += event.previews
    assert previews
    assert all(examine(preview.data).state is MarkState.NONE for preview in previews)


def test_a_server_does_not_start_with_a_key_that_cannot_sign(worded_base, tmp_path):
    identity.self_issued(tmp_path / "one")
    identity.self_issued(tmp_path / "two")
    settings = settings_for(
        worded_base,
        tmp_path / "state",
        provenance_cert=tmp_path / "one" / identity.CERTIFICATE,
        provenance_key=tmp_path / "two" / identity.KEY,
    )
    with pytest.raises(MooringError) as refused, EmbeddedServer(settings):
        pass
    assert refused.value.reason is Reason.INVALID_FIELD
    assert [fault.field for fault in refused.value.fields] == ["provenance_cert"]


def test_the_two_files_belong_together(worded_base, tmp_path):
    with pytest.raises(ValueError, match="provenance_cert and provenance_key belong together"):
        settings_for(worded_base, tmp_path, provenance_key=tmp_path / "key.pem")


def test_marks_are_counted(client, runtime):
    def count() -> float:
        return runtime.metrics.registry.get_sample_value("mooring_mark_seconds_count") or 0.0

    before = count()
    client.images("a photo of a dog", steps=1, count=2)
    assert count() == before + 2
