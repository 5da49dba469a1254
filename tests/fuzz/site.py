"""A server with something in it, and what must be as it was when the fuzzing is over.

Tenant "fuzz" is fuzzed. Tenant "other" has a subject and an adapter of its own, which nobody may touch; its
image is drawn before and after, so that base and arena are compared bit for bit. Everything is made by
ordinary calls; only the keys are made beside the server.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from chaos.processes import Replica
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection
from mooring import _requests
from mooring._batching import run_messages
from mooring.v1 import adapter_pb2, job_pb2, personalization_pb2, subject_pb2
from mooring_server.config import Role, Settings
from mooring_server.server import _SERVICES, EmbeddedServer
from mooring_server.storage.garbage import Retention, collect
from mooring_server.storage.objects import LocalObjects
from mooring_server.storage.store import Store
from PIL import Image
from tiny_bases import save_tiny_sd, tiny_tokenizer
from tiny_judges import save_tiny_clip, save_tiny_vit

from .calling import PATIENCE, ask, methods_of
from .mutator import Hints

METHODS = methods_of((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME))
BY_NAME = {method.name: method for method in METHODS}
TENANT = "tenants/fuzz"
NAMED = ("first", "second", "third")
"""Adapters that requests name; their placeholders are <first> and so on."""


@dataclass(frozen=True)
class Resources:
    """What a process holds. Bytes, counts."""

    resident: int
    threads: int
    handles: int

    @staticmethod
    def of(pid: int) -> Resources:
        """Of a process, as the system tells."""
        folder = Path(f"/proc/{pid}")
        status = dict(re.findall(r"(\w+):\s+(\d+)", (folder / "status").read_text(encoding="utf-8")))
        handles = len(list((folder / "fd").iterdir()))
        return Resources(int(status["VmRSS"]) * 1024, int(status["Threads"]), handles)


class Site:
    """A running server, stocked.

    Args:
        target: of the server.
        metrics_url: of the server.
        pid: of its process.
        state: its state directory.
        keys: of tenant fuzz in every role, then of tenant other.

    Attributes:
        victims: how many subjects, adapter versions, aliases and publications to take back there are after
            `restock`: things that can be deleted once.
    """

    def __init__(self, target: str, metrics_url: str, pid: int, state: Path, keys: dict[str, str]) -> None:
        self.target, self.metrics_url, self.pid, self.state = target, metrics_url, pid, state
        self._keys = keys
        self.victims = 16
        self._jobs: dict[str, str] = {}
        self._artifacts: list[str] = []
        with grpc.insecure_channel(target) as channel:
            self._first_stock(channel)
        self.restock()

    # ------------------------------------------------------------------ making things

    def _ask(self, channel: grpc.Channel, method: str, *requests: Any, tenant: str = "admin") -> list[Any]:
        return ask(channel, self._keys[tenant], BY_NAME[method], *requests)

    def _first_stock(self, channel: grpc.Channel) -> None:
        for tenant in ("admin", "other"):
            self._make_subject(channel, "rex", photos=2, tenant=tenant)
        quick = {"rank": 2, "batch_size": 1, "views": 1, "preview_every": 1}
        self._jobs["train"] = self._run(channel, "Train", _requests.train("rex", steps=2, **quick))
        self._exports = {form: self._export(channel, "rex@1", form) for form in ("native", "diffusers")}
        for adapter in NAMED:
            self._import(channel, adapter)
        self._import(channel, "theirs", tenant="other")
        evaluation = _requests.evaluate(
            "rex", prompts=["a photo of a {}"], generic_prompts=["a red car", "a cat on grass"], steps=1,
            seeds=[0], class_samples=0,
        )  # fmt: skip
        self._jobs["evaluate"] = self._run(channel, "Evaluate", evaluation)
        rows = (
            b'{"prompt": "a dog", "steps": 1}\n{"prompt": "a <first> dog", "adapter": "first", "steps": 1}\n'
        )
        self._jobs["batch"] = self._run(channel, "RunBatch", *run_messages(("rows.jsonl", rows)))
        train = self._ask(channel, "Train", _requests.train("rex", steps=2000, **quick))[0].job.name
        self._jobs["cancelled"] = train
        self._ask(channel, "CancelJob", job_pb2.CancelJobRequest(name=train))
        list(self._ask(channel, "WatchJob", job_pb2.WatchJobRequest(name=train)))

    def _run(self, channel: grpc.Channel, method: str, *requests: Any) -> str:
        """Start a job and wait for its success; its name."""
        name = self._ask(channel, method, *requests)[0].job.name
        job = self._ask(channel, "WatchJob", job_pb2.WatchJobRequest(name=name))[-1].job
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job
        self._artifacts += [artifact.filename for artifact in job.artifacts][:10]
        return name

    def _make_subject(self, channel: grpc.Channel, subject: str, photos: int, tenant: str = "admin") -> None:
        created = _requests.create_subject(subject, class_noun="dog", rights="owned")
        self._ask(channel, "CreateSubject", created, tenant=tenant)
        files = [(f"{number}.png", picture(number)) for number in range(photos)]
        if files:
            self._ask(channel, "UploadPhotos", *_requests.upload_messages(subject, files), tenant=tenant)

    def _export(self, channel: grpc.Channel, adapter: str, form: str) -> list[tuple[str, bytes]]:
        files: list[tuple[str, bytes]] = []
        for message in self._ask(
            channel, "ExportAdapter", _requests.export_adapter(adapter, file_format=form)
        ):
            if message.HasField("file"):
                files.append((message.file.filename, b""))
            else:
                name, data = files.pop()
                files.append((name, data + message.chunk))
        return [file for file in files if file[0].endswith(".safetensors")]

    def _import(self, channel: grpc.Channel, adapter: str, tenant: str = "admin") -> None:
        # with a placeholder of its own, so that a prompt can name several, and digests differ
        messages = _requests.import_messages(
            adapter, self._exports["diffusers"], rights="owned", placeholder=f"<{adapter}>"
        )
        self._ask(channel, "ImportAdapter", *messages, tenant=tenant)

    def restock(self) -> None:
        """Make again what fuzzed calls have deleted or changed."""
        with grpc.insecure_channel(self.target) as channel:
            self._ask(channel, "UpdateGatePolicy", _requests.update_gate_policy(preset="lenient", mode="off"))
            subjects = {
                each.name for each in self._listed(channel, "ListSubjects", "subjects") if each.photo_count
            }
            if f"{TENANT}/subjects/rex" not in subjects:
                with suppress(grpc.RpcError):
                    name = subject_pb2.DeleteSubjectRequest(name=f"{TENANT}/subjects/rex")
                    self._ask(channel, "DeleteSubject", name)
                self._make_subject(channel, "rex", photos=2)
            for number in range(self.victims):
                with suppress(grpc.RpcError):
                    self._make_subject(channel, f"victim-{number}", photos=0)
            versions = [each.name for each in self._listed(channel, "ListAdapters", "adapters")]
            wanted = [*NAMED, *["doomed"] * self.victims]
            for adapter in dict.fromkeys(wanted):
                there = sum(name.startswith(f"{TENANT}/adapters/{adapter}@") for name in versions)
                for _ in range(wanted.count(adapter) - there):
                    self._import(channel, adapter)
            self._import(channel, "first")
            self._versions = [each.name for each in self._listed(channel, "ListAdapters", "adapters")]
            firsts = [name for name in self._versions if "/first@" in name]
            for number in range(self.victims):
                moved = _requests.publish_adapter(firsts[number % min(2, len(firsts))])
                self._ask(channel, "PublishAdapter", moved)
                self._ask(channel, "PublishAdapter", _requests.publish_adapter("third", alias=f"v{number}"))
            self._tokens = self._page_tokens(channel)

    def _listed(self, channel: grpc.Channel, method: str, field: str) -> list[Any]:
        found, request = [], GetMessageClass(BY_NAME[method].input_type)(page_size=1000)
        while True:
            answer = self._ask(channel, method, request)[0]
            found += getattr(answer, field)
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token

    def _page_tokens(self, channel: grpc.Channel) -> dict[str, str]:
        """A token that each list call of the contract would take."""
        tokens = {}
        for method in METHODS:
            fields = method.input_type.fields_by_name
            if {"page_size", "page_token", "parent"} <= set(fields):
                answer = self._ask(channel, method.name, GetMessageClass(method.input_type)(page_size=1))[0]
                tokens[method.input_type.name] = answer.next_page_token
        return tokens

    # ------------------------------------------------------------------ what a fuzzer should know

    def hints(self) -> Hints:
        """Values that exist on the server now."""
        names = self._names()
        doomed = [name for name in self._versions if "/doomed@" in name] or names["mooring.dev/Adapter"]
        alone = [f"{TENANT}/adapters/{adapter}" for adapter in NAMED]
        aliased = [f"{TENANT}/adapters/first@{alias}" for alias in ("live", "canary", "x1")]
        victims = [f"{TENANT}/subjects/victim-{number}" for number in range(self.victims)]
        condemned = [f"{TENANT}/adapters/third@v{number}" for number in range(self.victims)]
        jobs = self._jobs
        rng = random.Random(1)
        good: dict[str, Sequence[Any]] = {
            "parent": [TENANT, "tenants/-", "", "", "tenants/other"],
            "DeleteSubjectRequest.name": [*victims, f"{TENANT}/subjects/none", "tenants/other/subjects/rex"],
            "DeleteAdapterRequest.name": [*doomed, aliased[0], "tenants/other/adapters/theirs@1"],
            "PublishAdapterRequest.name": [name for name in self._versions if "/first@" in name] + alone,
            "RollBackAdapterRequest.name": [*alone[:1] * 6, *alone],
            "RollBackAdapterRequest.alias": ["", "", "live", "canary"],
            "DeleteAliasRequest.name": [*condemned, *aliased],
            "ListAliasMovesRequest.name": [*alone, *aliased],
            "ListAliasesRequest.adapter": alone,
            "EvaluateRequest.adapter": ["", *alone, *alone, *names["mooring.dev/Adapter"][:12]],
            "EvaluateRequest.subject": [*names["mooring.dev/Subject"][:10], "tenants/other/subjects/rex"],
            "GetEvaluationRequest.name": [jobs["evaluate"], jobs["evaluate"], *jobs.values()],
            "DownloadArtifactRequest.name": [
                jobs["evaluate"],
                jobs["evaluate"],
                jobs["batch"],
                jobs["train"],
            ],
            "DownloadBatchRequest.name": [jobs["batch"], jobs["batch"], jobs["train"]],
            "CancelJobRequest.name": [jobs["cancelled"], jobs["cancelled"], jobs["train"]],
            "GatePolicy.name": ["", f"{TENANT}/gatePolicy", "tenants/-/gatePolicy"],
            "TrainRequest.adapter_id": ["", "rex", "mine"],
            "AdapterImport.adapter_id": ["mine", "second", "third"],
            "FieldMask.paths": ["mode", "max_drift", "min_dino", "require_rights"],
            "alias": ["", "live", "canary", "x1"],
            "prompt": ["a photo of a dog", "a red car on the beach", "the robot", "a <first> dog"],
            "negative_prompt": ["", "snow"],
            "prompts": ["a photo of a {}", "a {} on the beach", "a {} in the city"],
            "generic_prompts": [["a red car", "a cat on grass"], ["a small table", "a dog", "a red car"]],
            "seeds": [[1], [2, 3]],
            "display_name": ["", "Rex", "Ré"],
            "statement": ["", "contract 7"],
            "class_noun": ["dog", "cat"],
            "placeholder": ["<rex>", "", "<x1>"],
            "request_id": [
                "",
                "",
                *(str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(300)),
                "no uuid",
            ],
            "subject_id": [f"n{number}" for number in range(9000)],
            "id": ["a", "b", "c"],
            "page_token": [""],
            "page_size": [0, 1, 3, 50],
            "filename": [*self._artifacts, "report.html", ".."],
            "after_sequence": [0, 1, 2],
            "after_position": [0, 1],
            "steps": [1, 2, 3],
            "count": [1, 2],
            "width": [0, 32, 16],
            "height": [0, 32, 64],
            "preview_interval": [0, 1],
            "rank": [1, 2, 8],
            "batch_size": [1, 2],
            "views": [1, 2],
            "prior_images": [1, 2],
            "class_samples": [0, 2],
            "checkpoint_every": [1, 50],
            "preview_every": [0, 1],
            "probe_every": [1, 5],
            "learning_rate": [0.001, 0.01],
            "embedding_learning_rate": [0.0, 0.02],
            "guidance_scale": [1.0, 4.0],
            "service": ["", "mooring.v1.JobService", "grpc.health.v1.Health"],
            "file_by_filename": ["mooring/v1/job.proto", "none.proto"],
            "file_containing_symbol": ["mooring.v1.JobService", "mooring.v1.None"],
        }
        for message, token in self._tokens.items():
            good[f"{message}.page_token"] = ["", "", token, token[:-2], "!"]
        adapters = [*self._exports["native"], *self._exports["diffusers"]]
        files = {"": PHOTOS, "ImportAdapter": adapters, "RunBatch": ROWS}
        keys = [*self._keys.values(), "moor_" + "0" * 16 + "_" + "0" * 64, "eyJhbGciOiJub25lIn0.e30."]
        needed = frozenset({"EvaluateRequest.adapter", "EvaluateRequest.subject"})
        return Hints(good, needed, names, files, keys)

    def _names(self) -> dict[str, list[str]]:
        """Of resources, by type; most of them exist."""
        wrong = [f"{TENANT}/adapters/first@{n}" for n in ("0", "-1", "999", "9" * 30, "none", "")]
        others = ["tenants/other", "", "rex", f"{TENANT}/subjects/rex/x"]
        versions = [f"{TENANT}/adapters/{adapter}@1" for adapter in NAMED]
        versions += [f"{TENANT}/adapters/first@live", f"{TENANT}/adapters/second", "tenants/-/adapters/third"]
        subjects = [f"{TENANT}/subjects/rex", "tenants/-/subjects/rex"]
        jobs = [*self._jobs.values(), self._jobs["train"].replace(TENANT, "tenants/-")]
        return {
            "mooring.dev/Adapter": versions * 3 + wrong + ["tenants/other/adapters/theirs@1", *others],
            "mooring.dev/Subject": subjects * 8 + [f"{TENANT}/subjects/none", *others],
            "mooring.dev/Job": jobs * 3 + [f"{TENANT}/jobs/none", f"{TENANT}/jobs/{'0' * 32}", *others],
            "mooring.dev/GatePolicy": [f"{TENANT}/gatePolicy", "tenants/-/gatePolicy", "", *others[:1]],
        }

    # ------------------------------------------------------------------ looking

    def samples(self) -> dict[tuple[str, str], float]:
        """The metrics: (name, labels) → value."""
        text = urllib.request.urlopen(self.metrics_url, timeout=PATIENCE).read().decode()
        found = re.findall(r"^([a-zA-Z_:]+)(\{[^}]*\})? ([-+0-9.eEInfNa]+)$", text, re.MULTILINE)
        return {(name, labels): float(value) for name, labels, value in found}

    def bugs_told(self) -> dict[str, float]:
        """Calls that ended in a bug by the server's own count, also after their caller had left."""
        return {
            labels: value
            for (name, labels), value in self.samples().items()
            if name == "grpc_server_handled_total"
            and re.search(r'grpc_code="(INTERNAL|UNKNOWN|DATA_LOSS)"', labels)
        }

    def jobs_broken(self) -> list[str]:
        """Jobs of fuzzed calls that ended in a bug."""
        with grpc.insecure_channel(self.target) as channel:
            failed = [
                job
                for job in self._listed(channel, "ListJobs", "jobs")
                if job.state == job_pb2.JOB_STATE_FAILED and job.error.code in {2, 13, 15}
            ]
        return [f"{job.name}: {job.error.message[:200]}" for job in failed]

    def settle(self, patience: float = PATIENCE) -> None:
        """Wait until no call is under way and nothing waits on the engine for one."""
        deadline = time.monotonic() + patience
        while True:
            samples = self.samples()
            busy = samples[("mooring_rpcs_in_flight", "")] + sum(
                value
                for (name, labels), value in samples.items()
                if name == "mooring_queue_depth" and re.search(r'class="(interactive|batch)"', labels)
            )
            if not busy:
                return
            assert time.monotonic() < deadline, f"{busy:.0f} calls or their work never ended"
            time.sleep(0.05)

    def serving(self) -> bool:
        """Whether it says that it serves."""
        with grpc.insecure_channel(self.target) as channel:
            answer = self._ask(channel, "Check", health_pb2.HealthCheckRequest())[0]
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def others(self) -> dict[str, bytes]:
        """Everything of the other tenant, and an image by the base and one by its adapter."""
        found: dict[str, bytes] = {}
        requests = [
            ("GetSubject", subject_pb2.GetSubjectRequest(name="tenants/-/subjects/rex")),
            ("GetAdapter", adapter_pb2.GetAdapterRequest(name="tenants/-/adapters/theirs")),
            ("ListSubjects", subject_pb2.ListSubjectsRequest()),
            ("ListAdapters", adapter_pb2.ListAdaptersRequest()),
            ("ListAliases", adapter_pb2.ListAliasesRequest()),
            ("ListJobs", job_pb2.ListJobsRequest()),
            ("GetGatePolicy", adapter_pb2.GetGatePolicyRequest()),
            ("ExportAdapter", adapter_pb2.ExportAdapterRequest(name="tenants/-/adapters/theirs@1")),
        ]
        with grpc.insecure_channel(self.target) as channel:
            for method, request in requests:
                answers = self._ask(channel, method, request, tenant="other")
                found[method] = b"".join(answer.SerializeToString(deterministic=True) for answer in answers)
            for adapter, prompt in (("", "a dog"), ("tenants/-/adapters/theirs@1", "a <theirs> dog")):
                wanted = personalization_pb2.GenerateRequest(prompt=prompt, adapter=adapter, steps=4, seed=5)
                answers = self._ask(channel, "Generate", wanted, tenant="other")
                data = b"".join(each.image.data for each in answers)
                with Image.open(io.BytesIO(data)) as image:  # its pixels: files are marked with their time
                    found[f"image by {adapter or 'the base'}"] = image.tobytes()
        return found


def chain_of(state: Path, database_url: str = "") -> tuple[str, bool]:
    """What the audit log's chain says of itself, and whether it holds."""
    store = Store(Settings(state_dir=state, database_url=database_url).storage_url)
    try:
        found = store.verify_audit()
    finally:
        store.close()
    return found.problem or f"{found.head.number:,} entries, intact", not found.problem


def leftovers(state: Path, database_url: str = "") -> list[str]:
    """Objects that nothing refers to and that no ended job explains; files half written. Server stopped."""
    store = Store(Settings(state_dir=state, database_url=database_url).storage_url)
    objects = LocalObjects(state / "objects")
    try:
        unneeded = collect(store, objects, Retention(orphans=-1.0), dry_run=True).keys
    finally:
        store.close()
    half = [str(path) for path in objects.root.rglob(".tmp-*")]
    return [key for key in unneeded if not key.startswith("jobs/")] + half


# ------------------------------------------------------------------------------------------------ files


def picture(seed: int, form: str = "PNG", size: tuple[int, int] = (32, 24)) -> bytes:
    """A small random picture."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3)).save(buffer, form)
    return buffer.getvalue()


PHOTOS = [
    (f"{form}{n}.{form.lower()}", picture(n, form)) for n in range(4) for form in ("PNG", "JPEG", "WEBP")
]


def _rows(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


_ROW = {"prompt": "a dog", "steps": 1}
_GOOD_ROWS = [
    _rows(_ROW),
    _rows(_ROW, _ROW | {"adapter": "first", "prompt": "a <first> dog"}),
    _rows(*({"id": f"{n}", **_ROW, "seed": n, "adapter": "second", "adapter_scale": 0.5} for n in range(4))),
    _rows(_ROW | {"adapter": "first", "more_adapters": [{"adapter": "second", "scale": 0.5}]}),
]
_BAD_ROWS = [
    b"",
    b"\n\n \n",
    b"null\n[]\n1\n",
    b'{"prompt": "a dog", "steps": 1' + b"0" * 400 + b"}\n",
    b'{"prompt": "a dog", "guidance_scale": 1' + b"0" * 400 + b"}\n",
    b'{"prompt": "a dog", "guidance_scale": 1' + b"0" * 5000 + b"}\n",
    b'{"prompt": "a dog", "adapter_scale": 1e999}\n',
    b'{"prompt": "a dog", "seed": 1' + b"8" * 30 + b"}\n",
    b'{"prompt": NaN}\n',
    b"[" * 60_000 + b"\n",
    b'{"a":' * 10_000 + b"\n",
    b'{"prompt": "\\ud800"}\n',
    b'{"prompt": "\\u0000"}\n',
    b'{"prompt": "a dog", "more_adapters": [{"adapter": {}}, 3, null]}\n',
    b'{"prompt": "a dog", "width": true, "sampler": "\xc4\xb0"}\n',
    b"\xff\xfe{\n",
    b'{"\\ud800": 1}\n',
    _rows(*({"prompt": "漢" * 200 + str(n)} for n in range(120))),
    _rows({"id": "a", **_ROW}, {"id": "a", **_ROW}),
]
ROWS = [(f"rows{n}.jsonl", data) for n, data in enumerate(_GOOD_ROWS * 4 + _BAD_ROWS)]


# ------------------------------------------------------------------------------------------------ servers


def settings_of(state: Path, **changes: Any) -> Settings:
    """Of a server that is small, quick and asks for keys, on a tiny base with tiny judges."""
    base, judges = state / "base", state / "judges"
    if not base.exists():
        save_tiny_sd(base)
        save_tiny_clip(judges / "clip", tiny_tokenizer())
        save_tiny_vit(judges / "dino")
    values: dict[str, Any] = {
        "base": str(base),
        "clip_judge": str(judges / "clip"),
        "dino_judge": str(judges / "dino"),
        "state_dir": state,
        "auth": ("api_key",),
        "threads": 1,
        "rank": 8,
        "slots": 4,
        "decoders": 1,
        "max_batch_in_flight": 4,
        "max_adapter_bytes": 8 * 2**20,
        "gc_interval_seconds": 0.0,
        "drain_seconds": 60.0,
        **changes,
    }
    return Settings(**values)


def _keys(store: Store) -> dict[str, str]:
    roles = (Role.ADMIN, Role.USER, Role.READ_ONLY, Role.OPERATOR)
    made = {role.value: store.create_key("fuzz", role.value)[1] for role in roles}
    return made | {"other": store.create_key("other", Role.ADMIN.value)[1]}


@contextmanager
def embedded(state: Path, **changes: Any) -> Iterator[tuple[Site, EmbeddedServer]]:
    """A site in this process, whose server can be looked into and broken."""
    with EmbeddedServer(settings_of(state, **changes), metrics=True) as server:
        keys = _keys(server.server.runtime.store)
        yield Site(server.target, server.metrics_url, os.getpid(), state, keys), server


@contextmanager
def process(state: Path, database_url: str = "") -> Iterator[tuple[Site, Replica]]:
    """A site in a process of its own."""
    settings = settings_of(state, database_url=database_url)
    store = Store(settings.storage_url)
    keys = _keys(store)
    store.close()
    names = ("clip_judge", "dino_judge", "rank", "slots", "decoders", "max_batch_in_flight")
    names += ("max_adapter_bytes", "gc_interval_seconds", "drain_seconds", "database_url")
    variables = {f"MOORING_{name.upper()}": str(getattr(settings, name)) for name in names}
    variables |= {"MOORING_AUTH": "api_key", "MOORING_METRICS_LISTEN": "127.0.0.1:0"}
    with Replica(state, Path(settings.base), variables) as server:
        target = server.target
        lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
        metrics_url = next(line["metrics"] for line in lines if line["event"] == "serving")
        yield Site(target, metrics_url, server.pid, state, keys), server
