"""Reading photos that strangers uploaded.

Order of defence: compressed size → file signature (allow-list) → size in the header → frame count → only then
pixels. What is kept is a fresh RGB picture: rotated as EXIF says, transparent parts on white, at most
`MAX_SIDE` px, with none of the file's metadata.

The server runs this in a process of its own (`decoding`): decoders are where hostile bytes do their harm.

Left out on purpose: colour management (an embedded profile is ignored: pixels are taken as sRGB), and formats
beyond JPEG, PNG and WebP.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.jobs.reservations import training_reserved

MAX_PHOTO_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000  # below Pillow's own warning level, so that what it would warn of is an error here
MAX_SIDE = 1024
MIN_SIDE = 16

_SIGNATURES = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n", "WEBP": b"RIFF"}
_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\x00": "a TIFF or raw camera file",
    b"MM\x00*": "a TIFF or raw camera file",
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<?xml": "an SVG or XML file",
}


@dataclass(frozen=True)
class CheckedPhoto:
    """A photo that was decoded in full.

    Attributes:
        filename: as uploaded, made safe to show.
        sha256: of the uploaded bytes, 64 hex digits.
        size_bytes: of the uploaded bytes.
        image: RGB, longer side at most `MAX_SIDE` px, no metadata.
    """

    filename: str
    sha256: str
    size_bytes: int
    image: Image.Image


def decode_photo(data: bytes, filename: str) -> CheckedPhoto:
    """Decode one uploaded file.

    Args:
        data: the whole file, at most `MAX_PHOTO_BYTES`.
        filename: for messages; never used as a path.

    Raises:
        MooringError: IMAGE_TOO_LARGE (bytes or pixels), BAD_IMAGE (anything else that is wrong with it), or
            TRAINING_NOT_ALLOWED when the file itself says that it must not be used for training. The message
            names the file.
    """
    name = safe_filename(filename)
    if len(data) > MAX_PHOTO_BYTES:
        raise photo_too_large(len(data), name)
    file_format = _format(data, name)
    if file_format == "WEBP":
        # libwebp allocates the whole canvas when a file is opened, before Pillow can look at its size.
        _check_pixels(_webp_size(data), name)
    try:
        image = Image.open(io.BytesIO(data), formats=[file_format])
        _check_pixels(image.size, name)
        _check_frames(image, name)
        image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # a huge JPEG is decoded at 1/2, 1/4 or 1/8
        image.load()
        _check_training_allowed(data, image.info, name)  # now, because PNG may keep its texts at the end
        upright = _oriented(image)
        flat = _on_white(upright)
    except MooringError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(name, "more than Pillow's limit") from None
    except MemoryError:
        raise _error(
            Reason.IMAGE_TOO_LARGE,
            name,
            "takes more memory to decode than a decoder may use",
            "Save it smaller: 2,000 px on the longer side are plenty.",
        ) from None
    except Exception as error:  # noqa: BLE001 - a decoder fed with hostile bytes may raise anything
        raise _error(
            Reason.BAD_IMAGE,
            name,
            f"cannot be decoded: it is damaged or cut off ({str(error) or type(error).__name__})",
            "Upload the original file again.",
        ) from None
    return CheckedPhoto(name, hashlib.sha256(data).hexdigest(), len(data), _reduced(flat, name))


def photo_too_large(size: int, name: str) -> MooringError:
    """A file of more than `MAX_PHOTO_BYTES`."""
    return _error(
        Reason.IMAGE_TOO_LARGE,
        name,
        f"is {size / 2**20:.1f} MiB; at most {MAX_PHOTO_BYTES // 2**20} MiB are taken",
        "Save it smaller, for example as a JPEG of 2,000 px.",
    )


def encode_png(image: Image.Image) -> bytes:
    """The picture as PNG, without metadata."""
    buffer = io.BytesIO()
    # A copy by its pixels alone: Pillow writes profiles and EXIF that a picture remembers from its file.
    # Level 3 takes a third of the default's time for 3 % more bytes; noise-like pixels compress badly anyway.
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def safe_filename(filename: str) -> str:
    """The last part of a path, printable, at most 255 bytes of UTF-8; "photo" when nothing is left."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    printable = "".join(character for character in last if character.isprintable())
    return printable.encode("utf-8", "ignore")[:255].decode("utf-8", "ignore").strip() or "photo"


def _format(data: bytes, name: str) -> str:
    for file_format, signature in _SIGNATURES.items():
        if data.startswith(signature) and (file_format != "WEBP" or data[8:12] == b"WEBP"):
            return file_format
    if not data:
        kind = "is empty"
    elif data[4:8] == b"ftyp":
        kind = "is a HEIC/AVIF picture or a video"
    else:
        other = [text for start, text in _OTHER_FORMATS.items() if data.startswith(start)]
        kind = f"is {other[0]}" if other else "is not a picture"
    raise _error(Reason.BAD_IMAGE, name, kind, "Only JPEG, PNG and WebP are taken: export it as JPEG.")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size from the first chunk (RFC 9649); (0, 0) when there is none to read."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = (int.from_bytes(body[i : i + 2], "little") & 0x3FFF for i in (6, 8))
        return width, height
    return 0, 0


def _check_pixels(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(name, f"{width} × {height} px")


def _check_frames(image: Image.Image, name: str) -> None:
    # A JPEG with several pictures inside (MPO) is what phones make for depth or bursts: the first counts.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise _error(Reason.BAD_IMAGE, name, "is animated", "Save one frame of it as JPEG or PNG.")


def _check_training_allowed(data: bytes, info: dict[Any, Any], name: str) -> None:
    declaration = training_reserved(data, info)
    if declaration:
        raise _error(
            Reason.TRAINING_NOT_ALLOWED,
            name,
            f"says in its own metadata that it must not be used for training ({declaration})",
            "Use photos whose owner allows training.",
        )


def _oriented(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # damaged EXIF beside good pixels: take the pixels as they are
        return ImageOps.exif_transpose(image)
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of any mode; 16-bit grey keeps its upper 8 bits (Pillow's own conversion would clip)."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.uint32) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _reduced(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    scale = min(1.0, MAX_SIDE / max(width, height))
    size = round(width * scale), round(height * scale)
    if min(size) < MIN_SIDE:
        raise _error(
            Reason.BAD_IMAGE,
            name,
            f"is too small or too narrow to learn from ({width} × {height} px)",
            f"Use a photo with at least {MIN_SIDE} px on each side and sides at most 64 to 1.",
        )
    return image if scale == 1.0 else image.resize(size, Image.Resampling.LANCZOS)


def _too_many_pixels(name: str, size: str) -> MooringError:
    return _error(
        Reason.IMAGE_TOO_LARGE,
        name,
        f"has {size}; at most {MAX_PIXELS // 10**6} million pixels are taken",
        "Save it smaller: 2,000 px on the longer side are plenty.",
    )


def _error(reason: Reason, name: str, what: str, remedy: str) -> MooringError:
    message = f"{name} {what}."
    return MooringError(
        reason, message, remedy=remedy, fields=[FieldViolation("file", f"{message} {remedy}")]
    )
