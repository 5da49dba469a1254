"""Writes docs/configuration.md from the settings class, so that the reference cannot say anything else.

    python -m tools.config_reference            # writes the file
    python -m tools.config_reference --check    # says whether it is up to date; a test does the same

Names, defaults, ranges and descriptions come from `mooring_server.config.Settings`, options from the command
`mooring serve`.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from mooring_server.config import Settings
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
COMMAND = "python -m tools.config_reference"
_HEAD = f"""# Configuration

<!-- Written by `{COMMAND}` from service/mooring_server/config.py; do not edit by hand. -->

Every setting is an environment variable of `mooring serve`; the few that one changes by hand are options of
the command too, and an option wins. A value that is not allowed ends the start with one line that names it.
Lists and maps are written in JSON, where nothing else is said. [operations.md](operations.md) tells how to
run the server. Two things are set by the variables of their own standards, which work here as everywhere:
[traces](operations.md#traces) by `OTEL_*`, a [bucket's](operations.md#a-bucket) credentials by `AWS_*`.

| variable | option | values | default | what |
|---|---|---|---|---|
"""
_TYPES: dict[Any, str] = {
    str: "text",
    SecretStr: "text, never shown",
    int: "integer",
    float: "number",
    bool: "`true`, `false`",
    Path: "path",
}


def values_of(field: FieldInfo) -> str:
    """What a setting may be: its type, or the values and the range that it allows."""
    text = _type_name(field.annotation)
    if NoDecode in field.metadata:
        text += ", with commas between"
    bounds = []
    for limit in field.metadata:
        match limit:
            case annotated_types.Ge(ge=value):
                bounds.append(f"≥ {_number(value)}")
            case annotated_types.Gt(gt=value):
                bounds.append(f"> {_number(value)}")
            case annotated_types.Le(le=value):
                bounds.append(f"≤ {_number(value)}")
            case annotated_types.Lt(lt=value):
                bounds.append(f"< {_number(value)}")
            case _:
                continue
    return " ".join([text, ", ".join(bounds)]).strip()


def default_of(field: FieldInfo) -> str:
    """What a setting is when nobody sets it; a computed default is told by its function's first sentence."""
    if field.default_factory is not None:
        factory: Callable[..., Any] = field.default_factory
        if factory in {list, tuple, dict, set, frozenset}:
            return "none"
        told = (inspect.getdoc(factory) or "").splitlines()
        if not told:
            message = f"{factory!r} needs a docstring: it is what the reference says of the default"
            raise ValueError(message)
        return told[0].removesuffix(".")
    value = field.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value == "":
        return "(empty)"
    if value in ((), [], {}):
        return "none"
    if isinstance(value, BaseModel):
        return f"`{value.model_dump_json(exclude_unset=True)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def render() -> str:
    """The whole document."""
    options = _options()
    rows = []
    for name, field in Settings.model_fields.items():
        variable = f"{Settings.model_config['env_prefix']}{name.upper()}"
        cells = [
            f"`{variable}`",
            f"`{options[variable]}`" if variable in options else "",
            values_of(field),
            default_of(field),
            field.description or "",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return _HEAD + "".join(rows)


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in {Union, types.UnionType}:
        return " or ".join(_type_name(part) for part in arguments if part is not type(None))
    if origin in {list, tuple, set, frozenset}:
        return f"list of {_type_name(arguments[0])}"
    fields: Mapping[str, Any] | None = getattr(annotation, "model_fields", None)
    if fields is not None:
        return f"JSON object ({', '.join(f'`{name}`' for name in fields)})"
    if origin is dict:
        return f"map of text to {_type_name(arguments[1])}"
    return _TYPES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"


def _options() -> dict[str, str]:
    """Options of `mooring serve`, by the variable that each stands for."""
    from mooring_server.cli import app
    from typer.main import get_command

    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {option.envvar: option.opts[0] for option in serve.params if option.envvar}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is stale")
    text = render()
    if not parser.parse_args(arguments).check:
        DOCUMENT.write_text(text, encoding="utf-8")
        return 0
    if DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{DOCUMENT.name} is stale; run: {COMMAND}\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
