"""What an image file itself says against training on it.

Three declarations are honoured, wherever a file keeps them:

- IPTC/PLUS `plus:DataMining`: every value that begins with DMI-PROHIBITED;
- the C2PA / CAWG training-and-data-mining assertion: `notAllowed` or `constrained` for training, generative
  training or data mining. A constrained use needs an agreement that this server cannot check;
- the TDM reservation protocol in XMP: `tdm:reservation` of 1.

Signatures of C2PA manifests are not verified: whoever forged a prohibition harms nobody's rights.
Left out: declarations beside the file (HTTP headers, robots.txt, `tdmrep.json`), which no upload brings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_PLUS = re.compile(rb"DMI-PROHIBITED(?:-[A-Z]+)?")
_TDM_NAMESPACE = b"www.w3.org/ns/tdmrep"
_TDM = re.compile(rb":reservation(?:\s*=\s*[\"']|[^<>]*>)\s*1\b")
_ASSERTION = b".training-mining"
# An entry is a map whose `use` is text: CBOR writes its length before it (j: 10, k: 11), JSON quotes it.
_USE = re.compile(
    rb"(?:c2pa|cawg)\.(ai_generative_training|ai_training|data_mining)(?![a-z_]).{0,4096}?"
    rb"use(?:[gjk]|\"\s*:\s*\")(allowed|notAllowed|constrained)",
    re.DOTALL,
)
_APP11, _START_OF_SCAN = 0xEB, 0xDA
_JUMBF_HEADER = 8  # "JP", box instance (2 bytes), packet number (4 bytes)


def training_reserved(data: bytes, info: Mapping[Any, Any]) -> str:
    """The declaration in a file that forbids training, in words; "" when there is none.

    Args:
        data: the whole file.
        info: what Pillow read beside the pixels; holds the XMP that a PNG keeps compressed.
    """
    xmp = info.get("xmp", info.get("XML:com.adobe.xmp", b""))
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    for text in (xmp.replace(b"\0", b""), data):  # without zeros, UTF-16 and UTF-32 read as ASCII
        plus = _PLUS.search(text)
        if plus:
            return f"PLUS data mining {plus[0].decode()}"
        if _TDM_NAMESPACE in text and _TDM.search(text, text.index(_TDM_NAMESPACE)):
            return "TDM reservation 1"
    return _forbidden_by_c2pa(_manifest(data))


def _forbidden_by_c2pa(manifest: bytes) -> str:
    start = manifest.find(_ASSERTION)
    while start >= 0:
        end = manifest.find(_ASSERTION, start + 1)
        for entry in _USE.finditer(manifest, start, len(manifest) if end < 0 else end):
            if entry[2] != b"allowed":
                return f"C2PA {entry[1].decode()} {entry[2].decode()}"
        start = end
    return ""


def _manifest(data: bytes) -> bytes:
    """The bytes to search: a JPEG's C2PA store, which it cuts into segments of 64 KiB, in one piece."""
    if not data.startswith(b"\xff\xd8"):
        return data
    return b"".join(_app11(data)) or data


def _app11(data: bytes) -> Iterator[bytes]:
    """The JUMBF payloads of a JPEG's APP11 segments, in file order."""
    at, follows = 2, False
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == _APP11:
            body = data[at + 4 : at + 2 + size]
            # every packet but the first repeats the box's length and type
            yield body[_JUMBF_HEADER + (8 if follows else 0) :]
            follows = True
        at += 2 + max(size, 2)
