"""The `mooring` command: photos in, a moored adapter served, its drift measured.

Commands talk to a server through the Python client, like any other program; torch is imported by the server's
process alone, so that help and errors come at once.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from mooring_server import cli_batch, cli_health, cli_verify, cli_work
from mooring_server.cli_audit import audit
from mooring_server.cli_keys import keys
from mooring_server.cli_options import BaseOption, ServerOption, StateDirOption
from mooring_server.cli_output import EXIT_CODE_HELP, err, errors_shown, out
from mooring_server.cli_resources import adapters, jobs, subjects
from mooring_server.cli_server import (
    RunningServer,
    announced,
    connect,
    read_settings,
    resolve_state_dir,
    stop_when_abandoned,
)
from mooring_server.cli_storage import backup, db, gc, restore

app = typer.Typer(
    name="mooring",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODE_HELP,
)
app.add_typer(subjects, name="subjects")
app.add_typer(adapters, name="adapters")
app.add_typer(jobs, name="jobs")
app.add_typer(audit, name="audit")
app.add_typer(db, name="db")
app.add_typer(keys, name="keys")
app.command("gc", epilog=EXIT_CODE_HELP)(gc)
app.command("backup", epilog=EXIT_CODE_HELP)(backup)
app.command("restore", epilog=EXIT_CODE_HELP)(restore)
app.command("train", epilog=EXIT_CODE_HELP)(cli_work.train)
app.command("generate", epilog=EXIT_CODE_HELP)(cli_work.generate)
app.command("batch", epilog=EXIT_CODE_HELP)(cli_batch.batch)
app.command("evaluate", epilog=EXIT_CODE_HELP)(cli_work.evaluate)
app.command("verify", epilog=cli_verify.EXIT_CODES)(cli_verify.verify)
app.command("health", epilog=EXIT_CODE_HELP)(cli_health.health)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"mooring {version('mooring-server')}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Personalise a text-to-image model, within a measured distance of the base.

    \b
    mooring subjects create rex ./photos --class dog --rights owned
    mooring train rex
    mooring generate "a photo of <rex> dog on the beach" --adapter rex
    mooring evaluate rex
    mooring demo                    all of it on photos that ship with Mooring

    Without --server, commands use the server that runs on the state directory,
    or start one for themselves.
    """
    del version
    # Commands tell what is wrong in their own words; Python would print a library's warnings beside them.
    logging.getLogger("mooring_server").addHandler(logging.NullHandler())


@app.command()
def serve(
    *,
    base: BaseOption = "",
    state_dir: StateDirOption = None,
    listen: Annotated[
        str,
        typer.Option(
            envvar="MOORING_LISTEN", metavar="HOST:PORT", help="gRPC address; port 0 takes a free one."
        ),
    ] = "",
    metrics_listen: Annotated[
        str, typer.Option(envvar="MOORING_METRICS_LISTEN", metavar="HOST:PORT", help="Address of /metrics.")
    ] = "",
    threads: Annotated[
        int | None,
        typer.Option(envvar="MOORING_THREADS", min=1, help="Torch threads. Default: one fewer than cores."),
    ] = None,
    embedded: Annotated[bool, typer.Option("--embedded", hidden=True)] = False,
) -> None:
    """Run the server until SIGTERM or Ctrl-C, then drain: finish calls, checkpoint the running job.

    Every setting can also be a MOORING_* environment variable;
    docs/configuration.md lists them.

    \b
    mooring serve
    mooring serve --base ./stable-diffusion-v1-5 --listen 127.0.0.1:6000
    """
    with errors_shown():
        settings = read_settings(
            base=base,
            state_dir=resolve_state_dir(state_dir),
            listen=listen,
            metrics_listen=metrics_listen,
            threads=threads,
        )
        with announced(settings.state_dir) as announce:
            # torch comes in here, and must know its threads before it does; how they wait is left to OpenMP:
            # two threads that wait passively are slower than one (docs/decisions.md)
            os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
            os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of libraries have no place in a log
            if embedded:
                stop_when_abandoned(settings.state_dir)
            import asyncio

            from mooring_server import server as server_module

            def ready(target: str) -> None:
                secure = bool(settings.auth or settings.tls_cert)
                announce(RunningServer(os.getpid(), target, embedded=embedded, base=base, secure=secure))
                err.print(
                    f"mooring serves {settings.base or 'dinghy'} on {target}; state in {settings.state_dir}"
                )

            asyncio.run(server_module.serve(settings, on_ready=ready))


@app.command()
def demo(
    *,
    subject: Annotated[
        str, typer.Option(metavar="NAME", help="Which shipped held-out object to learn.")
    ] = "robot",
    directory: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where pictures, report and state go.")
    ] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of both adapters.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Of training and pictures.")] = 0,
    server: ServerOption = "",
) -> None:
    """Show the whole thing on shipped photos: base, unprotected and moored side by side, with figures.

    Starts a server of its own below the folder, trains two adapters on twelve
    photos of an object that the base has never seen, and writes grid.png and
    report.html. Five to ten minutes on two cores.

    \b
    mooring demo
    mooring demo --subject duck --out duck-demo
    """
    from mooring_server import demo as demo_module

    chosen = demo_module.choose_subject(subject)
    state = f"--server {server}" if server else f"--state-dir {directory / 'state'}"
    err.print(f"mooring demo: {subject}, {steps} steps, into {directory}{os.sep}")
    with errors_shown(), connect(server, directory / "state") as client:
        run = demo_module.Demo(client, chosen, directory, steps=steps, seed=seed)
        arms = run.run()
        demo_module.print_outcome(run, arms, chosen, directory, state)
