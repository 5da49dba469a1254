"""`mooring verify`: where an image comes from, by the mark in its file. Needs neither server nor network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mooring_server.cli_options import JsonOption
from mooring_server.cli_output import fail, out, print_json

if TYPE_CHECKING:
    from mooring_server.provenance.verify import Finding

EXIT_CODES = (
    "Exit codes: 0 every file has a valid mark (with --trust: of a trusted signer), 1 a file has not, "
    "2 a file or the anchors cannot be read."
)
MAX_FILE_BYTES = 512 * 2**20


def verify(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="Pictures: PNG, JPEG, WebP, …", dir_okay=False)
    ],
    *,
    trust: Annotated[
        Path | None,
        typer.Option(
            "--trust",
            metavar="PEM",
            help="Certificates of the authorities to trust. A server that issued its own certificate keeps "
            "its authority in STATE_DIR/provenance/authority.pem.",
            dir_okay=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell where pictures come from: who marked them, when, by which base and adapters.

    The mark is a signed C2PA manifest in the file. It is "valid" when picture
    and mark are as they were signed, "tampered" when one of them was changed,
    "invalid" when the mark cannot be used (its certificate has ended, say).
    "no mark" proves nothing: saving a picture anew drops the mark.

    Valid is not trusted: anybody can sign a mark that names Mooring. Whose
    signature it is, is answered only with --trust.

    \b
    mooring verify images/robot-7.png
    mooring verify images/*.png --trust ~/.local/state/mooring/provenance/authority.pem
    mooring verify robot-7.png --json
    """
    anchors = "" if trust is None else _anchors(trust)
    for path in files:
        _require_readable(path)
    from mooring_server.provenance.verify import MarkState, examine

    findings = [(path, examine(_read(path), anchors)) for path in files]
    if as_json:
        print_json([{"file": str(path), **dataclasses.asdict(found)} for path, found in findings])
    else:
        for path, found in findings:
            _print(path, found)
    good = all(found.state is MarkState.VALID and (found.trusted or not anchors) for _, found in findings)
    raise typer.Exit(0 if good else 1)


def _require_readable(path: Path) -> None:
    """Before the first verdict, so that one wrong name does not cut the answer in two."""
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
        raise fail(f"{path} is larger than {MAX_FILE_BYTES // 2**20} MiB.", "Name a picture.", code=2)
    try:
        path.open("rb").close()
    except OSError as error:
        raise fail(f"{path} cannot be read: {error.strerror or error}.", "Name a picture.", code=2) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise fail(f"{path} cannot be read: {error.strerror or error}.", "Name a picture.", code=2) from None


def _anchors(path: Path) -> str:
    from cryptography import x509

    data = _read(path)
    try:
        x509.load_pem_x509_certificates(data)
    except ValueError:
        raise fail(f"{path} holds no certificate in PEM.", "Name a file of certificates.", code=2) from None
    return data.decode("ascii", "ignore")


def _print(path: Path, found: Finding) -> None:
    trust = {True: ", trusted", False: ", signer not trusted", None: ""}[found.trusted]
    colour = "green" if found.state == "valid" and found.trusted is not False else "red"
    out.print(f"{escape(str(path))}: [{colour}]{found.state}{trust}[/]", soft_wrap=True)
    lines = [
        ("marked by", found.generator),
        ("signed by", found.signer),
        ("made", " ".join(text for text in (found.time, found.source) if text)),
        ("base", found.base),
        *(("adapter", digest) for digest in found.adapters),
        *(("problem", problem) for problem in found.problems),
    ]
    for name, value in lines:
        if value:
            out.print(f"  {name:<10}{escape(value)}", soft_wrap=True)
