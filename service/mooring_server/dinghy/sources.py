"""Artwork sources: fetch, licence check, rasterise, cache.

Every picture that dinghy learns from is drawn from artwork published on the npm
registry under MIT or Apache-2.0. The packages are named here by version; they are
fetched by the ordinary client (``npm pack``), their licence field is checked, and the
objects used are rasterised once into ``sprites-v<world version>.npz``. A machine without npm or
network reads the same sprites from one small file instead, an atlas: see :func:`load_atlas`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import nouns

SPRITE_PX = 128
"""Side of a cached sprite in pixels (twice the drawn size, so that it is only ever reduced)."""

STYLES = ("3d", "flat", "noto", "noto-v1", "fxemoji")
"""Drawing styles: Fluent 3D, Fluent flat, Noto, the older Noto and Firefox OS."""

NAMED_STYLES = ("3d", "flat", "noto")
"""Styles kept under an object's own noun; its other drawings are extras, known by their hypernym alone."""

PHOTO_STYLES = ("3d",)
"""Styles whose pictures may be called photos."""

ATLAS_VARIABLE = "MOORING_DINGHY_ATLAS"
"""Environment variable with the path of an atlas to read the sprites from."""


@dataclass(frozen=True)
class Package:
    """One artwork package: npm name, pinned version, the licence that it must declare."""

    name: str
    version: str
    licence: str
    what: str

    @property
    def stem(self) -> str:
        """File name stem of the packed tarball."""
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}"


PACKAGES = {
    "3d": Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Fluent Emoji, 3D style, WebP 256 px"),
    "flat": Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji, flat, SVG"),
    "noto": Package("@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji, SVG"),
    "noto-v1": Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Noto Emoji of 2017, SVG"),
    "fxemoji": Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Firefox OS Emoji, SVG"),
    "names": Package("emojibase-data", "17.0.0", "MIT", "names and subgroups by code point"),
}


def cache_dir() -> Path:
    """Folder for downloads, rasterised sprites, checkpoints and logs.

    ``MOORING_DINGHY_CACHE`` if set, else ``.cache/dinghy`` under the working directory.
    """
    path = Path(os.environ.get("MOORING_DINGHY_CACHE", ".cache/dinghy"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch(package: Package, cache: Path) -> Path:
    """Return the unpacked folder of ``package``, fetching it with ``npm pack`` when missing."""
    target = cache / "npm" / package.stem
    if not (target / "package.json").exists():
        tarball = cache / "npm" / f"{package.stem}.tgz"
        tarball.parent.mkdir(parents=True, exist_ok=True)
        if not tarball.exists():
            subprocess.run(  # noqa: S603 - fixed arguments
                ["npm", "pack", "--silent", f"{package.name}@{package.version}"],  # noqa: S607 - the user's npm
                cwd=tarball.parent,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(tarball) as archive:
            archive.extractall(part, filter="data")
        next(child for child in part.iterdir() if child.is_dir()).rename(target)
        shutil.rmtree(part)
    declared = json.loads((target / "package.json").read_text()).get("license")
    if declared != package.licence:
        raise RuntimeError(f"{package.name}: expected licence {package.licence}, found {declared!r}")
    return target


class Artwork:
    """Reads one object in one style at any size."""

    def __init__(self, cache: Path) -> None:
        self.folders = {key: fetch(package, cache) for key, package in PACKAGES.items()}
        self._sets: dict[str, tuple[dict[str, Any], dict[str, str], int]] = {}
        for style in STYLES[1:]:
            icons = json.loads((self.folders[style] / "icons.json").read_text())
            chars = json.loads((self.folders[style] / "chars.json").read_text())
            if style == "noto-v1":  # keyed by name only; the names are those of its successor
                chars = dict(self._sets["noto"][1])
            elif style == "fxemoji":
                chars = self._names_to_codes(set(icons["icons"]))
            self._sets[style] = (icons["icons"], chars, int(icons.get("width", 32)))

    def _names_to_codes(self, known: set[str]) -> dict[str, str]:
        """Code point (lower-case hex) to icon name, where the Unicode or CLDR name is that of an icon.

        Names are compared without spaces and punctuation. A name that belongs to two code points is left
        out: a guess could bring a held-out object in under another one's code.
        """
        claims: dict[str, list[str]] = {}
        for code, (_, label) in self.subgroups().items():
            names = {_bare(label)}
            if "-" not in code:
                names.add(_bare(unicodedata.name(chr(int(code, 16)), "")))
            for name in names & known:
                claims.setdefault(name, []).append(code)
        return {codes[0].lower(): name for name, codes in claims.items() if len(codes) == 1}

    def subgroups(self) -> dict[str, tuple[str, str]]:
        """Code point (upper-case hex, no variation selector) to (subgroup, label)."""
        root = self.folders["names"]
        names = json.loads((root / "meta" / "groups.json").read_text())["subgroups"]
        table: dict[str, tuple[str, str]] = {}
        for entry in json.loads((root / "en" / "data.json").read_text()):
            if "subgroup" in entry:
                code = entry["hexcode"].replace("-FE0F", "")
                table[code] = (names[str(entry["subgroup"])], entry["label"])
        return table

    def read(self, style: str, code: str, px: int) -> Image.Image | None:
        """The object ``code`` as RGBA ``px`` × ``px``; None when the style lacks it or it is empty."""
        image: Image.Image | None = None
        low = code.lower()
        if style == "3d":
            for name in (low, f"{low}-fe0f"):
                path = self.folders["3d"] / "assets" / f"{name}.webp"
                if path.exists():
                    image = Image.open(path).convert("RGBA")
                    break
        else:
            image = self._rasterise(style, low, px * 2)
        if image is None:
            return None
        box = image.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
        # One in some hundred SVGs renders to nothing: an empty sprite would teach "a hammer" = nothing.
        if box is None or (box[2] - box[0]) * (box[3] - box[1]) < 0.03 * image.width * image.height:
            return None
        image = image.crop(box)
        scale = px / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        square = Image.new("RGBA", (px, px), (0, 0, 0, 0))
        square.paste(image, ((px - size[0]) // 2, (px - size[1]) // 2))
        return square

    def _rasterise(self, style: str, low: str, px: int) -> Image.Image | None:
        import resvg_py

        icons, chars, default = self._sets[style]
        name = chars.get(low) or chars.get(f"{low}-fe0f")
        if name is None or name not in icons:
            return None
        icon = icons[name]
        width, height = icon.get("width", default), icon.get("height", default)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{px}" height="{px}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        return Image.open(io.BytesIO(png)).convert("RGBA")


def _bare(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


@dataclass
class Sprites:
    """The rasterised artwork of the world.

    ``pixels`` is uint8 ``[n, 128, 128, 4]``; the other fields have one entry per sprite:
    ``noun`` the object's own noun or "" for an extra, ``hyper`` its hypernym, ``style``,
    ``code`` the code point and ``role`` one of "named", "extra", "held".
    """

    pixels: NDArray[np.uint8]
    noun: list[str]
    hyper: list[str]
    style: list[str]
    code: list[str]
    role: list[str]

    def where(self, role: str, styles: tuple[str, ...] = STYLES, noun: str | None = None) -> list[int]:
        """Indices of the sprites with this role, in these styles and, if given, of this noun."""
        return [
            i
            for i in range(len(self.role))
            if self.role[i] == role and self.style[i] in styles and (noun is None or self.noun[i] == noun)
        ]


def load_sprites(cache: Path | None = None) -> Sprites:
    """The sprites of the world: from the atlas that ``MOORING_DINGHY_ATLAS`` names, else from the cache.

    The cache's file is built (about two minutes) when it is missing.
    """
    atlas = os.environ.get(ATLAS_VARIABLE)
    if atlas:
        return load_atlas(Path(atlas))
    cache = cache or cache_dir()
    path = cache / f"sprites-v{nouns.WORLD_VERSION}.npz"
    if not path.exists():
        _build(cache, path)
    data = np.load(path)
    return Sprites(pixels=data["pixels"], **{key: [str(x) for x in data[key]] for key in _FIELDS})


def save_atlas(sprites: Sprites, path: Path) -> int:
    """Write the sprites as WebP files (quality 90, exact alpha) and ``meta.json`` in one zip.

    Less than half the size of the cache's file, for a machine that has neither npm nor a network:
    ``MOORING_DINGHY_ATLAS=atlas.zip python -m mooring_server.dinghy …`` trains from it.
    Returns the size of the file in bytes.
    """
    meta = {"version": nouns.WORLD_VERSION, **{key: getattr(sprites, key) for key in _FIELDS}}
    part = path.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("meta.json", json.dumps(meta), zipfile.ZIP_DEFLATED)
        for i, pixels in enumerate(sprites.pixels):
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "WEBP", quality=90, alpha_quality=100, method=4)
            archive.writestr(f"{i:05d}.webp", data.getvalue())
    part.rename(path)
    return path.stat().st_size


def load_atlas(path: Path) -> Sprites:
    """Read what :func:`save_atlas` wrote; colours differ from the cache's a little, alpha does not.

    Raises ``RuntimeError`` when the atlas belongs to another version of the world.
    """
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read("meta.json"))
        if meta.pop("version") != nouns.WORLD_VERSION:
            raise RuntimeError(f"{path.name} is not of world version {nouns.WORLD_VERSION}")
        count = len(meta["role"])
        pixels = np.empty((count, SPRITE_PX, SPRITE_PX, 4), np.uint8)
        for i in range(count):
            with Image.open(io.BytesIO(archive.read(f"{i:05d}.webp"))) as image:
                pixels[i] = np.asarray(image.convert("RGBA"))
    return Sprites(pixels=pixels, **meta)


_FIELDS = ("noun", "hyper", "style", "code", "role")


def _alike(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether two drawings are all but the same: under 5 % mean difference of the premultiplied pixels."""
    a, b = (p.astype(np.float32) for p in (one, other))
    a, b = (np.concatenate([p[..., :3] * p[..., 3:] / 255, p[..., 3:]], axis=2) for p in (a, b))
    return float(np.abs(a - b).mean()) < 0.05 * 255


def _build(cache: Path, path: Path) -> None:
    art = Artwork(cache)
    wanted: list[tuple[str, str, str, str]] = []  # role, code, noun, hypernym
    wanted += [("named", code, noun, hyper) for noun, (code, hyper) in nouns.NAMED.items()]
    wanted += [("held", s.code, s.name, s.class_noun) for s in nouns.HELD_OUT]
    taken = {w[1] for w in wanted} | nouns.EXCLUDED_CODES
    for code, (subgroup, _label) in sorted(art.subgroups().items()):
        hyper = nouns.EXTRA_HYPERNYM.get(code) or nouns.SUBGROUP_HYPERNYM.get(subgroup)
        if hyper and code not in taken:
            wanted.append(("extra", code, "", hyper))
    rows: list[tuple[NDArray[np.uint8], str, str, str, str, str]] = []
    missing: list[str] = []
    for role, code, noun, hyper in wanted:
        seen: list[NDArray[np.uint8]] = []
        for style in STYLES:
            image = art.read(style, code, SPRITE_PX)
            if image is None:
                missing.append(f"{role}:{noun or hyper}:{code}:{style}")
                continue
            pixels = np.asarray(image)
            # The older Noto often is the newer: kept, it would show a style that is held out.
            if style not in NAMED_STYLES and any(_alike(pixels, other) for other in seen):
                continue
            seen.append(pixels)
            if role == "named" and style not in NAMED_STYLES:
                rows.append((pixels, "", hyper, style, code, "extra"))
            else:
                rows.append((pixels, noun, hyper, style, code, role))
    named_missing = [m for m in missing if m.startswith(("named", "held")) and m.endswith((":3d", ":flat"))]
    if named_missing:
        raise RuntimeError(f"objects without artwork: {named_missing}")
    part = path.with_suffix(".part.npz")
    columns: dict[str, Any] = {key: np.array([r[k] for r in rows]) for k, key in enumerate(_FIELDS, start=1)}
    np.savez_compressed(part, pixels=np.stack([r[0] for r in rows]), **columns)
    part.rename(path)
    (cache / "sprites-missing.json").write_text(json.dumps(missing, indent=0))
