from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooring_server.errors import MooringError, Reason
from mooring_server.jobs import photos
from mooring_server.jobs.photos import MAX_PHOTO_BYTES, MAX_SIDE, decode_photo, encode_png, safe_filename
from pictures import corners, encode, jpeg, png, quarters
from PIL import Image
from PIL.PngImagePlugin import PngInfo

UPRIGHT = ["red", "green", "blue", "white"]


def refused(data: bytes, name: str = "cat.jpg") -> MooringError:
    with pytest.raises(MooringError) as caught:
        decode_photo(data, name)
    assert name in caught.value.message
    assert caught.value.remedy
    assert caught.value.fields
    return caught.value


def png_of(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that claims a size, with whatever pixel data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_the_three_formats_are_read(file_format: str) -> None:
    data = encode(quarters(), file_format)
    photo = decode_photo(data, "duck")
    assert (photo.image.mode, photo.image.size) == ("RGB", (64, 48))
    assert corners(photo.image) == UPRIGHT
    assert (photo.sha256, photo.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation: int) -> None:
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = quarters() if turn is None else quarters().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = decode_photo(jpeg(stored, exif=exif), "duck.jpg")
    assert photo.image.size == (64, 48)
    assert corners(photo.image) == UPRIGHT


def test_transparent_parts_become_white() -> None:
    image = quarters().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    pixels = np.asarray(decode_photo(png(image), "x.png").image)
    assert (pixels[0] > 250).all()
    assert (np.abs(pixels[-1, :32].astype(int) - (20, 20, 220)) < 12).all()
    palette = quarters().quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert corners(decode_photo(png(palette), "x.png").image) == ["white", "green", "blue", "white"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_pixel_layout_is_read(mode: str) -> None:
    grey = mode in {"1", "L", "LA", "I;16"}
    image = Image.linear_gradient("L").resize((64, 64)) if grey else quarters()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    data = encode(image, "JPEG" if mode in {"CMYK", "YCbCr"} else "PNG")
    photo = decode_photo(data, "x").image
    if not grey:
        assert corners(photo) == UPRIGHT
        return
    rows = np.asarray(photo)[:, :, 0].astype(int).mean(axis=1)
    assert rows[0] < 20
    assert rows[-1] > 235
    if mode != "1":  # dithered
        assert abs(rows[32] - 128) < 8


def test_large_photos_are_reduced_and_keep_their_shape() -> None:
    for data in (jpeg(quarters(4000, 3000)), png(quarters(4000, 3000))):
        photo = decode_photo(data, "big")
        assert photo.image.size == (MAX_SIDE, 768)
        assert corners(photo.image) == UPRIGHT


def test_nothing_of_the_file_but_pixels_is_kept() -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "SecretCamera", "SecretModel"
    data = jpeg(exif=exif, comment=b"SecretComment", icc_profile=b"SecretProfile" * 20, dpi=(301, 301))
    stored = encode_png(decode_photo(data, "x.jpg").image)
    assert b"Secret" in data
    assert b"Secret" not in stored
    with Image.open(io.BytesIO(stored)) as image:
        assert image.info == {}


def test_the_same_file_gives_the_same_stored_bytes() -> None:
    data = jpeg(quarters(1500, 900))
    assert encode_png(decode_photo(data, "a").image) == encode_png(decode_photo(data, "b").image)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"hello world, this is no picture", "is not a picture"),
        (encode(quarters(), "GIF"), "is a GIF"),
        (encode(quarters(), "BMP"), "is a BMP"),
        (encode(quarters(), "TIFF"), "is a TIFF"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "is a HEIC"),
        (b"%PDF-1.7", "is a PDF"),
        (b"<svg xmlns='x'/>", "is an SVG"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "is not a picture"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
        (b"\xff\xd8\xff", "cannot be decoded"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "cannot be decoded"),
    ],
)
def test_other_files_are_refused_by_name(data: bytes, words: str) -> None:
    error = refused(data)
    assert error.reason is Reason.BAD_IMAGE
    assert words in error.message


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(file_format: str, share: float) -> None:
    noise = Image.effect_noise((96, 96), 80).convert("RGB")
    data = encode(noise, file_format)
    error = refused(data[: int(len(data) * share)])
    assert (error.reason, "damaged or cut off" in error.message) == (Reason.BAD_IMAGE, True)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_animations_are_refused(file_format: str) -> None:
    frames = [quarters(), quarters().rotate(90), quarters().rotate(180)]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100)
    assert "is animated" in refused(data).message


def test_a_phones_multi_picture_jpeg_gives_its_first_picture() -> None:
    data = encode(quarters(), "MPO", save_all=True, append_images=[quarters().rotate(180)])
    assert corners(decode_photo(data, "x.jpg").image) == UPRIGHT


def test_a_file_over_the_byte_cap_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", None)
    error = refused(jpeg() + bytes(MAX_PHOTO_BYTES))
    assert error.reason is Reason.IMAGE_TOO_LARGE
    assert "20.0 MiB" in error.message


@pytest.mark.parametrize("size", [(7100, 7100), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (50_000_001, 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = refused(png_of(*size, zlib.compress(bytes(100_000))))
    assert error.reason is Reason.IMAGE_TOO_LARGE


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L", b"VP8 "])
def test_a_webp_canvas_is_measured_before_libwebp_allocates_it(
    kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", None)
    most = 0x3FFF
    body = {
        b"VP8X": bytes(4) + (most - 1).to_bytes(3, "little") * 2,
        b"VP8L": b"\x2f" + (most - 1 | (most - 1) << 14).to_bytes(4, "little") + bytes(5),
        b"VP8 ": b"\0\0\0\x9d\x01\x2a" + most.to_bytes(2, "little") * 2,
    }[kind]
    data = b"WEBP" + kind + len(body).to_bytes(4, "little") + body
    error = refused(b"RIFF" + len(data).to_bytes(4, "little") + data)
    assert error.reason is Reason.IMAGE_TOO_LARGE
    assert f"{most} × {most} px" in error.message


@pytest.mark.parametrize(("lossless", "alpha"), [(False, False), (True, False), (True, True), (False, True)])
def test_webp_headers_are_read_as_pillow_reads_them(lossless: bool, alpha: bool) -> None:
    image = quarters(80, 50).convert("RGBA" if alpha else "RGB")
    if alpha:
        image.putpixel((0, 0), (0, 0, 0, 0))
    assert photos._webp_size(encode(image, "WEBP", lossless=lossless)) == (80, 50)


def test_a_bomb_of_one_colour_is_read_when_it_is_within_the_cap() -> None:
    assert decode_photo(png(Image.new("1", (5000, 5000))), "flat.png").image.size == (MAX_SIDE, MAX_SIDE)


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (20, 4000)])
def test_specks_and_slivers_are_refused(size: tuple[int, int]) -> None:
    assert "too small or too narrow" in refused(png(Image.new("RGB", size))).message


DMI = b"http://ns.useplus.org/ldf/vocab/DMI-"


def with_xmp(xmp: bytes) -> list[bytes]:
    """A file of each format with an XMP packet."""
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "surrogateescape"), zip=True)
    return [jpeg(xmp=xmp), encode(quarters(), "WEBP", xmp=xmp), png(pnginfo=texts)]


@pytest.mark.parametrize(
    "declaration",
    [
        b"<plus:DataMining>" + DMI + b"PROHIBITED</plus:DataMining>",
        b"<plus:DataMining>" + DMI + b"PROHIBITED-AIMLTRAINING</plus:DataMining>",
        b'<rdf:Description plus:DataMining="' + DMI + b'PROHIBITED-SEECONSTRAINT"/>',
        b'<rdf:Description xmlns:tdm="http://www.w3.org/ns/tdmrep/" tdm:reservation="1"/>',
        b'<a xmlns:t="http://www.w3.org/ns/tdmrep/"><t:reservation> 1 </t:reservation></a>',
    ],
)
def test_photos_whose_xmp_forbids_training_are_refused(declaration: bytes) -> None:
    for data in with_xmp(b"<x:xmpmeta>" + declaration + b"</x:xmpmeta>"):
        assert refused(data).reason is Reason.TRAINING_NOT_ALLOWED
    wide = ("\ufeff" + declaration.decode()).encode("utf-16-le")
    assert refused(jpeg(xmp=wide)).reason is Reason.TRAINING_NOT_ALLOWED


@pytest.mark.parametrize(
    "declaration",
    [
        b"<plus:DataMining>" + DMI + b"ALLOWED</plus:DataMining>",
        b"<plus:DataMining>" + DMI + b"UNSPECIFIED</plus:DataMining>",
        b'<rdf:Description xmlns:tdm="http://www.w3.org/ns/tdmrep/" tdm:reservation="0"/>',
        b'<rdf:Description xmlns:hotel="http://hotel.example/" hotel:reservation="1"/>',
    ],
)
def test_photos_whose_xmp_allows_training_or_says_nothing_are_read(declaration: bytes) -> None:
    for data in with_xmp(b"<x:xmpmeta>" + declaration + b"</x:xmpmeta>"):
        assert decode_photo(data, "x.jpg")


def cbor(value: object) -> bytes:
    """Text and maps as C2PA assertions hold them."""
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0x60 + len(text)]) if len(text) < 24 else bytes([0x78, len(text)])) + text
    assert isinstance(value, dict)
    return bytes([0xA0 + len(value)]) + b"".join(cbor(k) + cbor(v) for k, v in value.items())


def with_assertion(uses: dict[str, str], *, owner: str = "c2pa", segment: int = 60_000) -> bytes:
    """A JPEG with a training-mining assertion in its APP11 segments."""
    entries = {f"{owner}.{name}": {"use": use} for name, use in uses.items()}
    box = struct.pack(">I", 0) + b"jumb" + owner.encode() + b".training-mining\0" + cbor({"entries": entries})
    data = jpeg()
    segments = b""
    for number, start in enumerate(range(0, len(box), segment)):
        body = b"JP\0\x01" + struct.pack(">I", number + 1) + (box[:8] if number else b"")
        body += box[start : start + segment]
        segments += b"\xff\xeb" + struct.pack(">H", 2 + len(body)) + body
    return data[:2] + segments + data[2:]


@pytest.mark.parametrize("name", ["ai_training", "ai_generative_training", "data_mining"])
@pytest.mark.parametrize("use", ["notAllowed", "constrained"])
@pytest.mark.parametrize("owner", ["c2pa", "cawg"])
def test_photos_whose_c2pa_assertion_forbids_training_are_refused(name: str, use: str, owner: str) -> None:
    uses = {"ai_inference": "allowed", name: use}
    for segment in (60_000, 50):  # a store that is cut within a word as well
        assert refused(with_assertion(uses, owner=owner, segment=segment)).reason is (
            Reason.TRAINING_NOT_ALLOWED
        )


def test_a_c2pa_assertion_that_allows_training_is_no_obstacle() -> None:
    allowed = {"ai_training": "allowed", "ai_generative_training": "allowed", "data_mining": "allowed"}
    assert decode_photo(with_assertion(allowed), "x.jpg")
    assert decode_photo(with_assertion({**allowed, "ai_inference": "notAllowed"}), "x.jpg")


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        ("cat.jpg", "cat.jpg"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\cat.jpg", "cat.jpg"),
        ("a\0b\nc\u202e.jpg", "abc.jpg"),
        ("", "photo"),
        ("dir/", "photo"),
        ("é" * 300, "é" * 127),
    ],
)
def test_file_names_are_made_safe_to_show(given_name: str, shown: str) -> None:
    assert safe_filename(given_name) == shown


SEEDS = [encode(quarters(24, 24), f) for f in ("JPEG", "PNG", "WEBP")]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_files_are_refused_or_read_but_never_raise_anything_else(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        photo = decode_photo(bytes(raw), "x")
    except MooringError as error:
        assert error.reason in {Reason.BAD_IMAGE, Reason.IMAGE_TOO_LARGE}  # noqa: PT017 - both ways are right
    else:
        assert photo.image.mode == "RGB"
        assert max(photo.image.size) <= MAX_SIDE
