"""The backup of PostgreSQL and a bucket in docs/operations.md, run as it stands there while work goes on."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import BUCKET, Postgres, moto

from . import storm
from .place import Place
from .table import Row

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def steps() -> list[str]:
    """The shell blocks of the section: the remote, the backup, the way back."""
    section = DOCUMENT.read_text(encoding="utf-8").partition("## Backup and restore")[2].partition("\n## ")[0]
    found = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert [
        len(re.findall(word, "".join(found))) for word in ("pg_dump", "pg_restore", "mooring db verify")
    ] == [1] * 3
    return found


def shell(*blocks: str, **variables: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_backup_in_the_document_restores_everything(tmp_path: Path) -> None:
    remote, backup, restore = steps()
    with Postgres() as database, moto() as bucket:
        place = Place(tmp_path / "old", database.new_database(), bucket=bucket, prefix="old")
        place.folder.mkdir()
        scene = storm.Scene(place, Row("backup"), 5)
        worker = scene.start()
        assert storm._until(
            lambda: {note.get("done") for note in place.said()} >= {"batch", "publish", "train"}
        )
        tools = os.pathsep.join(
            [str(database.binaries), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        variables = bucket.environment | {
            "PATH": tools,
            "S3_PROVIDER": "Other",
            "BACKUP": str(tmp_path / "backup"),
            "DATABASE": place.url,
            "BUCKET": f"{BUCKET}/old",
            "NEW_DATABASE": database.new_database(),
            "NEW_BUCKET": f"{BUCKET}/new",
        }
        restored = dataclasses.replace(
            place, folder=tmp_path / "new", url=variables["NEW_DATABASE"], prefix="new"
        )
        restored.folder.mkdir()
        shutil.copy(place.notes, restored.notes)
        shell(remote, backup, **variables)
        scene.kill(worker)
        assert " objects, " in shell(remote, restore, **variables)

        row = Row("restored")
        checker = storm.Checker(restored)
        checker.look(row)
        assert row.lost + row.half + row.orphans == []
        # what was begun before the backup is answered and done there
        last = storm._context().Process(
            target=storm.run, args=(restored, storm.Orders(77, produce=False, seconds=storm.PATIENCE))
        )
        last.start()
        last.join()
        checker.look(row, finished=True)
        checker.close()
        assert row.lost + row.half + row.orphans == []
        assert row.jobs
        # more than the notes tell: what was asked for between the copy of the notes and the dump
        assert all("requests of" in problem for problem in row.double)
        scene.checker.close()
