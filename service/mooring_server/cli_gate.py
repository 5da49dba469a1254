"""What is live: `mooring adapters publish | rollback | unpublish | aliases` and `mooring adapters gate …`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mooring_server.cli_options import (
    AdapterArgument,
    BaseOption,
    JsonOption,
    ServerOption,
    StateDirOption,
)
from mooring_server.cli_output import (
    errors_shown,
    fail,
    local_time,
    message_dict,
    out,
    print_json,
    short,
    table,
)
from mooring_server.cli_server import connect

if TYPE_CHECKING:
    from mooring.v1 import gate_pb2

gate = typer.Typer(
    help="What a version must show to be published: show, set, decisions.", no_args_is_help=True
)

AdapterId = Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter id, without a version.")]
AliasOption = Annotated[str, typer.Option(metavar="NAME", help='The alias. Default: "live".')]

MEANINGS = {
    "evaluation": "evaluated",
    "rights": "rights declared",
    "prompts": "prompts of the subject",
    "generic_prompts": "prompts without the subject",
    "dino": "likeness to the photos (DINO)",
    "dino_gain": "likeness gained over the base",
    "generic_clip_t_drop": "CLIP-T lost without the subject",
    "drift": "drift, upper end",
    "drift_over_budget": "drift ÷ its budget, upper end",
    "sigma": "largest σ_max",
    "relative_sigma": "largest σ_max ÷ base layer's",
}
"""What a figure is, for people who sign off."""

THRESHOLDS = {
    "min_prompts": ("prompts", "≥"),
    "min_generic_prompts": ("generic_prompts", "≥"),
    "min_dino": ("dino", "≥"),
    "min_dino_gain": ("dino_gain", "≥"),
    "max_generic_clip_t_drop": ("generic_clip_t_drop", "≤"),
    "max_drift": ("drift", "≤"),
    "max_drift_over_budget": ("drift_over_budget", "≤"),
    "max_sigma": ("sigma", "≤"),
    "max_relative_sigma": ("relative_sigma", "≤"),
}
"""A policy's fields: the figure each bounds, and from which side."""

_COLOURS = {"passed": "green", "refused": "red", "warned": "yellow", "not_checked": "yellow"}


class Preset(StrEnum):
    """Complete policies to start from."""

    STRICT = "strict"
    BALANCED = "balanced"
    LENIENT = "lenient"


class Mode(StrEnum):
    """What the gate does with a version that fails."""

    ENFORCE = "enforce"
    WARN = "warn"
    OFF = "off"


# -- aliases -------------------------------------------------------------------------------------------


def publish(
    adapter: AdapterArgument,
    *,
    alias: AliasOption = "live",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only ask the gate; nothing is moved or written down.")
    ] = False,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Let an alias point to a version, if the gate passes it.

    The gate judges the newest evaluation of exactly this version, its
    certificate and its rights. From then on ADAPTER@ALIAS stands for the
    version wherever an adapter is named; running requests keep theirs.

    \b
    mooring evaluate rex@3
    mooring adapters publish rex@3
    mooring adapters publish rex@3 --alias canary --dry-run
    mooring generate "a photo of a <rex> dog" --adapter rex@live
    """
    from mooring.errors import FailedPreconditionError

    with errors_shown(), connect(server, state_dir, base=base) as client:
        try:
            answer = client.publish_adapter(adapter, alias=alias, validate_only=dry_run)
        except FailedPreconditionError as error:
            kept = error.metadata.get("decision", "")
            if not kept:
                raise
            found = client.list_gate_decisions(_without_alias(adapter))
            decision = next((item for item in found if item.name == kept), None)
            if decision is None:
                raise
            if as_json:
                print_json({"decision": message_dict(decision)})
            else:
                print_decision(decision)
            raise fail(
                f"The gate does not let {short(decision.adapter)} be published.", error.remedy, code=4
            ) from None
    if as_json:
        print_json(message_dict(answer))
        return
    print_decision(answer.decision)
    would = "would be " if dry_run else ""
    before = answer.alias.previous_adapter
    out.print(
        f"[bold]{short(answer.alias.name)}[/] {would}→ [bold]{short(answer.alias.adapter)}[/]"
        + (f", before {short(before)}" if before else ""),
        soft_wrap=True,
    )


def rollback(
    adapter: AdapterId,
    *,
    alias: AliasOption = "live",
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Let an alias point again to the version before, without asking the gate.

    Called again it goes further back. The history keeps everything.

    \b
    mooring adapters rollback rex
    """
    with errors_shown(), connect(server, state_dir, base=base) as client:
        moved = client.roll_back_adapter(adapter, alias=alias)
    if as_json:
        print_json(message_dict(moved))
        return
    further = f"; before that {short(moved.previous_adapter)}" if moved.previous_adapter else ""
    out.print(f"[bold]{short(moved.name)}[/] → [bold]{short(moved.adapter)}[/]{further}", soft_wrap=True)


def unpublish(
    adapter: AdapterId,
    *,
    alias: AliasOption = "live",
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
) -> None:
    """Delete an alias; versions and history stay.

    \b
    mooring adapters unpublish rex
    """
    with errors_shown(), connect(server, state_dir, base=base) as client:
        client.delete_alias(f"{adapter}@{alias}")
    out.print(f"deleted alias {escape(adapter)}@{escape(alias)}")


def aliases(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Only of this adapter.")] = "",
    *,
    history: Annotated[
        bool, typer.Option("--history", help="Everything that moved them, newest first; needs ADAPTER.")
    ] = False,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """List aliases and where they point.

    \b
    mooring adapters aliases
    mooring adapters aliases rex --history
    """
    from mooring.types import enum_word
    from mooring.v1 import gate_pb2

    if history and not adapter:
        raise fail("--history is of one adapter.", "Name it: mooring adapters aliases rex --history", code=2)
    with errors_shown(), connect(server, state_dir, base=base) as client:
        found: list[Any] = list(client.list_alias_moves(adapter) if history else client.list_aliases(adapter))
    if as_json:
        print_json([message_dict(item) for item in found])
    elif history:
        table(
            ["alias", "what", "points to", "before", "by", "when"],
            [
                [
                    short(move.alias),
                    enum_word(gate_pb2.AliasMoveKind, move.kind).replace("_", " "),
                    short(move.adapter) or "–",
                    short(move.previous_adapter) or "–",
                    move.actor,
                    local_time(move.create_time),
                ]
                for move in found
            ],
            empty="never published: mooring adapters publish --help",
        )
    else:
        table(
            ["alias", "points to", "rollback to", "by", "since"],
            [
                [
                    short(item.name),
                    short(item.adapter),
                    short(item.previous_adapter) or "–",
                    item.actor,
                    local_time(item.update_time),
                ]
                for item in found
            ],
            empty="no aliases yet: mooring adapters publish --help",
        )


def _without_alias(adapter: str) -> str:
    """The name that decisions are listed by: an alias's adapter as a whole."""
    name, _, version = adapter.rpartition("@")
    return adapter if not name or version.isdigit() else name


# -- the gate ------------------------------------------------------------------------------------------


@gate.command("show")
def gate_show(
    *,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show what the gate asks for."""
    with errors_shown(), connect(server, state_dir, base=base) as client:
        policy = client.gate_policy()
    _print_policy(policy, as_json=as_json)


@gate.command("set")
def gate_set(
    *,
    preset: Annotated[
        Preset | None, typer.Option(help="Start from this instead of the policy in force.")
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="Refuse what fails, publish it with a warning, or do not look.")
    ] = None,
    min_dino: Annotated[
        float | None, typer.Option(metavar="COSINE", help="Least likeness to the photos in new scenes.")
    ] = None,
    min_dino_gain: Annotated[
        float | None, typer.Option(metavar="COSINE", help="Least gain of it over the untouched base.")
    ] = None,
    max_generic_clip_t_drop: Annotated[
        float | None, typer.Option(metavar="COSINE", help="Most CLIP-T lost on prompts without the subject.")
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Largest drift, share of the base's guidance energy, upper end."),
    ] = None,
    max_drift_over_budget: Annotated[
        float | None, typer.Option(metavar="RATIO", help="The same as a multiple of the training's budget.")
    ] = None,
    max_sigma: Annotated[
        float | None, typer.Option(metavar="NORM", help="Largest spectral norm of any layer's change.")
    ] = None,
    max_relative_sigma: Annotated[
        float | None, typer.Option(metavar="RATIO", help="The same, of its base layer's norm.")
    ] = None,
    min_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Fewest prompts of the subject in the evaluation.")
    ] = None,
    min_generic_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Fewest prompts without the subject.")
    ] = None,
    evaluation: Annotated[
        bool | None,
        typer.Option("--evaluation/--no-evaluation", help="Whether an evaluation is required."),
    ] = None,
    rights: Annotated[
        bool | None,
        typer.Option("--rights/--no-rights", help="Whether a rights declaration is required."),
    ] = None,
    allow_rights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BASIS",
            help='The only bases that pass: owned, licensed, consent, public_domain; "any" for all.',
        ),
    ] = None,
    no: Annotated[
        list[str] | None, typer.Option("--no", metavar="THRESHOLD", help="Check this no longer.")
    ] = None,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Change what the gate asks for, from the next publication on; what is not named stays.

    \b
    mooring adapters gate set --preset strict
    mooring adapters gate set --min-dino 0.7 --max-drift 0.3
    mooring adapters gate set --no min-dino --mode warn
    mooring adapters gate set --allow-rights owned --allow-rights consent
    """
    given: dict[str, Any] = {
        "min_dino": min_dino,
        "min_dino_gain": min_dino_gain,
        "max_generic_clip_t_drop": max_generic_clip_t_drop,
        "max_drift": max_drift,
        "max_drift_over_budget": max_drift_over_budget,
        "max_sigma": max_sigma,
        "max_relative_sigma": max_relative_sigma,
        "min_prompts": min_prompts,
        "min_generic_prompts": min_generic_prompts,
        "require_evaluation": evaluation,
        "require_rights": rights,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    for threshold in no or []:
        name = threshold.removeprefix("--").replace("-", "_")
        if name not in THRESHOLDS:
            raise fail(
                f"The gate has no threshold {threshold!r}.",
                f"One of {', '.join(THRESHOLDS).replace('_', '-')}.",
                code=2,
            )
        if name in changes:
            raise fail(f"--no {threshold} and a value for it exclude each other.", code=2)
        changes[name] = None
    if not changes and preset is None and mode is None and not allow_rights:
        raise fail("Nothing to change.", "See mooring adapters gate set --help.", code=2)
    bases = [] if allow_rights == ["any"] else allow_rights or None
    with errors_shown(), connect(server, state_dir, base=base) as client:
        policy = client.update_gate_policy(
            preset=preset or "", mode=mode or "", allowed_rights=bases, **changes
        )
    _print_policy(policy, as_json=as_json)


@gate.command("decisions")
def gate_decisions(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help='Only about this adapter, or version ("rex@2").')
    ] = "",
    *,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """List what the gate decided, newest first; each decision is kept for good.

    \b
    mooring adapters gate decisions rex
    mooring adapters gate decisions --json | jq '.[] | select(.verdict == "GATE_VERDICT_REFUSED")'
    """
    with errors_shown(), connect(server, state_dir, base=base) as client:
        found = list(client.list_gate_decisions(adapter))
    if as_json:
        print_json([message_dict(item) for item in found])
        return
    table(
        ["adapter", "alias", "verdict", "failed", "by", "when"],
        [
            [
                short(item.adapter),
                item.alias,
                _verdict(item).replace("_", " "),
                ", ".join(check.figure for check in item.checks if not check.passed),
                item.actor,
                local_time(item.create_time),
            ]
            for item in found
        ],
        empty="no decisions yet: mooring adapters publish --help",
    )


def print_decision(decision: gate_pb2.GateDecision) -> None:
    """Every figure beside its threshold, green or red, and the verdict."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("figure", no_wrap=True)
    for column in ("found", "asked"):
        grid.add_column(column, justify="right")
    grid.add_column("")
    grid.add_column("")
    for check in decision.checks:
        colour, mark = ("green", "✓") if check.passed else ("red", "✗")
        grid.add_row(
            Text(MEANINGS.get(check.figure, check.figure)),
            Text(_found(check), style=colour),
            Text(_asked(check)),
            Text(mark, style=f"bold {colour}"),
            Text(_remark(check), style="dim"),
        )
    if decision.checks:
        out.print(grid)
    verdict = _verdict(decision)
    about = f"of {short(decision.adapter)} as {decision.alias}"
    who = f", by {decision.actor}, {local_time(decision.create_time)}" if decision.name else ""
    colour = _COLOURS.get(verdict, "white")
    out.print(f"gate    [bold {colour}]{verdict.replace('_', ' ')}[/] {escape(about + who)}", soft_wrap=True)
    if decision.evaluation:
        out.print(f"from    evaluation job {short(decision.evaluation)}", style="dim", soft_wrap=True)


def _verdict(decision: gate_pb2.GateDecision) -> str:
    from mooring.types import enum_word
    from mooring.v1 import gate_pb2 as pb

    return enum_word(pb.GateVerdict, decision.verdict)


def _found(check: gate_pb2.GateCheck) -> str:
    if check.HasField("value"):
        return f"{check.value:.4g}"
    return check.detail.partition(";")[0] if check.figure == "rights" else "yes" if check.passed else "–"


def _asked(check: gate_pb2.GateCheck) -> str:
    from mooring.v1 import gate_pb2 as pb

    if not check.HasField("threshold"):
        return "yes"
    bound = "≥" if check.comparison == pb.GATE_COMPARISON_AT_LEAST else "≤"
    return f"{bound} {check.threshold:.4g}"


def _remark(check: gate_pb2.GateCheck) -> str:
    """What a reader should know beside the figures."""
    if check.HasField("measured"):
        return f"measured {check.measured:.4g}"
    if check.passed:
        return ""
    return check.detail.partition(";")[2].strip() if check.figure == "rights" else check.detail


def _print_policy(policy: gate_pb2.GatePolicy, *, as_json: bool) -> None:
    from mooring.types import enum_word
    from mooring.v1 import gate_pb2 as pb
    from mooring.v1 import subject_pb2

    if as_json:
        print_json(message_dict(policy))
        return
    mode = enum_word(pb.GateMode, policy.mode)
    changed = (
        f"revision {policy.revision}, by {policy.updated_by}, {local_time(policy.update_time)}"
        if policy.revision
        else "the default"
    )
    out.print(f"gate    [bold]{mode}[/], {escape(changed)}", soft_wrap=True)
    bases = ", ".join(enum_word(subject_pb2.RightsDeclaration.Basis, item) for item in policy.allowed_rights)
    rows = [
        ["require_evaluation", MEANINGS["evaluation"], "yes" if policy.require_evaluation else "no"],
        ["require_rights", MEANINGS["rights"], "yes" if policy.require_rights else "no"],
        ["allowed_rights", "bases of rights", bases or "any"],
    ]
    for name, (figure, bound) in THRESHOLDS.items():
        asked = f"{bound} {getattr(policy, name):.4g}" if policy.HasField(name) else "not checked"  # type: ignore[arg-type]
        rows.append([name, MEANINGS[figure], asked])
    table(["threshold", "what", "asked"], rows, empty="")
