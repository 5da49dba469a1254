"""Marks on pictures: what they say, what they leave alone, and what breaks them."""

from __future__ import annotations

import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from certificates import Authority
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.errors import MooringError, Reason
from mooring_server.provenance import identity
from mooring_server.provenance.marks import Marker, Origin
from mooring_server.provenance.verify import MarkState, examine
from PIL import Image

BASE, ADAPTERS = "sha256:" + "b" * 64, ("sha256:" + "a" * 64, "sha256:" + "c" * 64)


def png(seed: int = 0, side: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def chunk(data: bytes, kind: bytes) -> slice:
    """Where the first chunk of a kind lies in a PNG file."""
    at = 8
    while data[at + 4 : at + 8] != kind:
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return slice(at, at + 12 + int.from_bytes(data[at : at + 4], "big"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("state") / identity.FOLDER
    identity.self_issued(folder)
    return folder


@pytest.fixture(scope="module")
def marker(folder) -> Marker:
    return Marker(folder / identity.CERTIFICATE, folder / identity.KEY, "1.2.3")


@pytest.fixture(scope="module")
def anchors(folder) -> str:
    return (folder / identity.AUTHORITY).read_text()


@pytest.fixture(scope="module")
def marked(marker) -> bytes:
    return marker.mark(png(), Origin(BASE, ADAPTERS))


def test_a_mark_says_what_made_the_picture_and_leaves_its_pixels_alone(marked, anchors):
    found = examine(marked, anchors)
    assert (found.state, found.trusted, found.problems) == (MarkState.VALID, True, ())
    assert (found.generator, found.source) == ("Mooring 1.2.3", "trainedAlgorithmicMedia")
    assert (found.base, found.adapters) == (BASE, ADAPTERS)
    assert "Mooring (self-issued)" in found.signer
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.time)
    assert np.array_equal(pixels_of(marked), pixels_of(png()))
    assert marked[chunk(marked, b"IDAT")] == png()[chunk(png(), b"IDAT")]


def test_a_picture_with_other_things_on_it_is_called_a_composite(marker):
    found = examine(marker.mark(png(), Origin(BASE, composite=True)))
    assert (found.source, found.adapters) == ("compositeWithTrainedAlgorithmicMedia", ())


def test_trust_is_asked_of_the_given_anchors_alone(marked):
    assert examine(marked).trusted is None
    stranger = examine(marked, Authority().pem)
    assert (stranger.state, stranger.trusted) == (MarkState.VALID, False)


@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_bit_changed_anywhere_outside_of_the_mark_is_found(marked, position, bit):
    own = chunk(marked, b"caBX")
    outside = [*range(own.start), *range(own.stop, len(marked))]
    changed = bytearray(marked)
    changed[outside[position % len(outside)]] ^= 1 << bit
    assert examine(bytes(changed)).state is not MarkState.VALID


def test_a_changed_picture_is_told_apart_from_a_mark_that_cannot_be_used(marked):
    pixels = bytearray(marked)
    pixels[chunk(marked, b"IDAT").start + 100] ^= 1
    assert examine(bytes(pixels)).state is MarkState.TAMPERED
    assert examine(marked + b"more").state is not MarkState.VALID


@pytest.mark.parametrize("claim", [b"Mooring", b"1.2.3", BASE.encode(), ADAPTERS[1].encode(), b"trainedAlg"])
def test_no_word_of_a_mark_can_be_changed(marked, claim):
    assert claim in marked
    changed = marked.replace(claim, claim[:-1] + bytes([claim[-1] ^ 1]))
    assert examine(changed).state in {MarkState.TAMPERED, MarkState.INVALID}


def test_a_mark_does_not_hold_on_another_picture(marked):
    other, own = png(seed=1), chunk(marked, b"caBX")
    after = chunk(other, b"IHDR").stop
    assert examine(other[:after] + marked[own] + other[after:]).state is MarkState.TAMPERED


def test_a_picture_saved_anew_has_no_mark(marked):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(marked)).save(buffer, "PNG")
    assert examine(buffer.getvalue()).state is MarkState.NONE
    assert examine(png()).state is MarkState.NONE


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_never_valid(data):
    found = examine(data)
    assert found.state is not MarkState.VALID
    assert not found.generator


def test_two_marks_of_one_picture_differ_and_both_hold(marker):
    one, two = (marker.mark(png(), Origin(BASE)) for _ in range(2))
    assert one != two
    assert examine(one).state is examine(two).state is MarkState.VALID


def test_threads_mark_at_once(marker, anchors):
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: (n, marker.mark(png(n), Origin(f"sha256:{n:064}"))), range(32)))
    for n, data in made:
        found = examine(data, anchors)
        assert (found.trusted, found.base) == (True, f"sha256:{n:064}")
        assert np.array_equal(pixels_of(data), pixels_of(png(n)))


def test_without_a_certificate_nothing_is_marked():
    assert Marker().mark(png(), Origin(BASE)) == png()
    assert Marker().expiry() == 0


def test_time_is_told(folder):
    seconds = []
    marker = Marker(folder / identity.CERTIFICATE, folder / identity.KEY, "1", observe=seconds.append)
    marker.mark(png(), Origin(BASE))
    assert len(seconds) == 1
    assert seconds[0] > 0


# ---------------------------------------------------------------------- keys


def test_what_a_server_issues_itself_is_private_and_stays(tmp_path):
    folder = tmp_path / "state" / "provenance"
    first = identity.self_issued(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / identity.KEY).stat().st_mode & 0o777 == 0o600
    assert identity.self_issued(folder) == first
    assert [path.name for path in folder.parent.iterdir()] == ["provenance"]
    assert {path.name for path in folder.iterdir()} == {
        identity.CERTIFICATE,
        identity.KEY,
        identity.AUTHORITY,
    }


def test_servers_that_start_at_once_take_one_identity(tmp_path):
    together = threading.Barrier(4)

    def start(_number: int) -> identity.Identity:
        together.wait()
        return identity.self_issued(tmp_path / "provenance")

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(start, range(4)))
    assert all(one == found[0] for one in found)
    assert [path.name for path in tmp_path.iterdir()] == ["provenance"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP521R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
    ],
    ids=["P-256", "P-384", "P-521", "RSA", "Ed25519"],
)
def test_an_authority_of_ones_own_vouches_for_keys_of_each_kind(tmp_path, make):
    authority = Authority()
    marker = Marker(*authority.issue(tmp_path, key=make()), "1.2.3")
    found = examine(marker.mark(png(), Origin(BASE)), authority.pem)
    assert (found.state, found.trusted) == (MarkState.VALID, True)
    assert "Harbour" in found.signer


def test_a_new_certificate_signs_without_a_restart_and_old_marks_stay_good(tmp_path):
    old, new = Authority("Old"), Authority("New")
    marker = Marker(*old.issue(tmp_path, "Old marks"), "1.2.3")
    before = marker.mark(png(), Origin(BASE))
    new.issue(tmp_path, "New marks")
    after = marker.mark(png(), Origin(BASE))
    assert (examine(before, old.pem).trusted, examine(after, old.pem).trusted) == (True, False)
    both = old.pem + new.pem
    assert examine(before, both).trusted
    assert examine(after, both).trusted
    assert "New" in examine(after).signer


def test_half_a_new_pair_is_not_used(tmp_path):
    authority = Authority()
    certificate, key = authority.issue(tmp_path / "used", "First")
    marker = Marker(certificate, key, "1.2.3")
    second = [path.read_bytes() for path in authority.issue(tmp_path / "next", "Second")]
    certificate.write_bytes(second[0])
    assert "First" in examine(marker.mark(png(), Origin(BASE))).signer
    key.write_bytes(second[1])
    assert "Second" in examine(marker.mark(png(), Origin(BASE))).signer


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a, d: (d / "tls.crt").unlink(), "No such file"),
        (lambda a, d: (d / "tls.crt").write_text("nothing"), "cannot sign images"),
        (lambda a, d: (d / "tls.key").write_text("nothing"), "cannot sign images"),
        (lambda a, d: a.issue(d / "x")[1].replace(d / "tls.key"), "not the certificate's"),
        (lambda a, d: a.issue(d, ends=-timedelta(days=1)), "not now"),
        (lambda a, d: a.issue(d, usage=False), "C2PA"),
        (lambda a, d: a.issue(d, password=b"secret"), "cannot sign images"),
        (lambda a, d: a.issue(d, key=rsa.generate_private_key(65537, 1024)), "none of"),
        (lambda a, d: a.issue(d, key=ec.generate_private_key(ec.SECP256K1())), "none of"),
    ],
    ids=["absent", "no certificate", "no key", "other key", "ended", "usage", "password", "short", "curve"],
)
def test_what_cannot_sign_is_refused_at_the_start(tmp_path, spoil, said):
    authority = Authority()
    paths = authority.issue(tmp_path)
    spoil(authority, tmp_path)
    with pytest.raises(MooringError) as refused:
        Marker(*paths, "1.2.3")
    assert refused.value.reason is Reason.INVALID_FIELD
    assert said in refused.value.message
    assert [fault.field for fault in refused.value.fields] == ["provenance_cert"]
    assert "MOORING_PROVENANCE" in refused.value.remedy
    assert "PRIVATE" not in str(refused.value)
