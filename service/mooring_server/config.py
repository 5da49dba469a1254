"""Settings of the server: one typed class, read from `MOORING_*` variables or made in code.

Every default is right for one person on one machine: loopback only, SQLite and a folder under the user's
state directory, the packaged base model. What is not right is refused when the settings are made, not when a
request first meets it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 2**20
AuthMethod = Literal["api_key", "jwt", "mtls"]
TENANT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""The form of a tenant's name."""


class Role(StrEnum):
    """What a credential is for; one per credential. What each may do stands in `rpc/permissions.py`."""

    READ_ONLY = "read-only"
    USER = "user"
    ADMIN = "admin"
    OPERATOR = "operator"


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/mooring`, by default `~/.local/state/mooring` (XDG base directory specification)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mooring"


def default_threads() -> int:
    """One torch thread fewer than the processors this process may use, and at least one.

    Threads that outnumber free processors wait for each other by spinning: a small UNet step took 16 times as
    long with two threads on two busy cores.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else 1)


class Quota(BaseModel):
    """What one tenant may use. None is no limit.

    Attributes:
        requests_per_second: calls in the long run, streams counted once.
        burst: calls at once; by default twice the rate, and at least one.
        concurrent_calls: calls that run, streams too.
        queue_depth: generations that wait or run.
        concurrent_jobs: jobs that have not ended.
        adapters: adapter versions, with those that unfinished trainings will make.
        stored_bytes: of photos as uploaded and of adapter files.
        device_seconds_per_day: engine time in a UTC day; work that has begun is not cut off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    requests_per_second: float | None = Field(default=None, gt=0)
    burst: float | None = Field(default=None, ge=1)
    concurrent_calls: int | None = Field(default=None, ge=1)
    queue_depth: int | None = Field(default=None, ge=0)
    concurrent_jobs: int | None = Field(default=None, ge=0)
    adapters: int | None = Field(default=None, ge=0)
    stored_bytes: int | None = Field(default=None, ge=0)
    device_seconds_per_day: float | None = Field(default=None, ge=0)


class Settings(BaseSettings):
    """Everything that can be set. Each field is also the variable `MOORING_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="MOORING_", frozen=True, extra="forbid")

    base: str = Field(
        default="",
        description="Base model: local directory, hub id, or dinghy-1, the small packaged one. "
        "Default: the packaged dinghy-4.",
    )
    clip_judge: str = Field(
        default="", description="CLIP judge for Evaluate: a local CLIPModel directory. Default: packaged."
    )
    dino_judge: str = Field(
        default="", description="DINO judge for Evaluate: a local ViT directory. Default: packaged."
    )
    device: str = Field(default="cpu", description="Torch device of the base, for example cpu or cuda:0.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format of UNet and text encoders."
    )
    threads: int = Field(
        default_factory=default_threads, ge=1, le=1024, description="Torch threads of the engine."
    )
    autocast: bool = Field(
        default=False, description="Compute the UNet in bfloat16 on weights of any dtype (see dtype)."
    )
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = Field(
        default="auto", description="Kernel of attention; auto lets torch choose for each shape."
    )
    compile: bool = Field(
        default=False, description="Compile the UNet with torch.compile: minutes at start, faster steps."
    )
    cuda_graphs: bool = Field(
        default=False, description="Replay UNet passes as CUDA graphs: less work for the host at every step."
    )

    state_dir: Path = Field(
        default_factory=default_state_dir, description="Folder of the database and the objects."
    )
    database_url: str = Field(
        default="", description="SQLAlchemy URL. Default: SQLite in the state directory."
    )

    objects_url: str = Field(
        default="",
        description="Objects: s3://bucket/prefix or a folder. Default: `objects` in the state directory.",
    )

    listen: str = Field(
        default="127.0.0.1:50051",
        description="Address of the gRPC server; port 0 takes a free one. Off loopback: TLS and auth only.",
    )
    metrics_listen: str = Field(
        default="127.0.0.1:9464",
        description="Address of /metrics; port 0 takes a free one, empty switches it off.",
    )
    health_listen: str = Field(
        default="",
        description="Address for health alone, plain gRPC to anybody who reaches it (probes). Default: none.",
    )
    tls_cert: Path | None = Field(
        default=None, description="Server certificate chain, PEM. Read again on change."
    )
    tls_key: Path | None = Field(default=None, description="Its private key, PEM. Read again on change.")
    tls_client_ca: Path | None = Field(
        default=None, description="CA of client certificates, PEM; with it every client must show one."
    )
    max_connection_age_seconds: float = Field(
        default=3600.0,
        ge=0.0,
        description="Connections with a client certificate end after about this long, so that one that was "
        "revoked does not stay; 0: never.",
    )
    max_connection_grace_seconds: float = Field(
        default=3600.0, ge=1.0, description="Time that calls which run then have to end, streams too."
    )
    auth: Annotated[tuple[AuthMethod, ...], NoDecode] = Field(
        default=(),
        description="Accepted credentials, with commas: api_key, jwt, mtls. Empty: none, loopback only.",
    )
    mtls_trust_domain: str = Field(
        default="mooring",
        description="Trust domain of client certificates: spiffe://DOMAIN/tenants/TENANT/ROLE.",
    )
    jwt_issuer: str = Field(default="", description="Required `iss` of tokens.")
    jwt_audience: str = Field(default="", description="Required `aud` of tokens.")
    jwt_jwks_file: Path | None = Field(default=None, description="Keys of the issuer: a JWKS file.")
    jwt_jwks_url: str = Field(default="", description="Keys of the issuer: a JWKS https address.")
    jwt_jwks_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Hosts that keys may be fetched from, separated by commas."
    )
    jwt_jwks_ca: Path | None = Field(default=None, description="CA of that host, PEM. Default: the system's.")
    jwt_refresh_seconds: float = Field(
        default=300.0, ge=10.0, le=86_400.0, description="Age at which the issuer's keys are read again."
    )
    jwt_leeway_seconds: float = Field(
        default=30.0, ge=0.0, le=300.0, description="How far clocks may differ for `exp`, `nbf` and `iat`."
    )
    jwt_tenant_claim: str = Field(default="tenant", min_length=1, description="Claim that names the tenant.")
    jwt_role_claim: str = Field(default="role", min_length=1, description="Claim that names the role.")
    reflection: Literal["open", "authenticated", "off"] = Field(
        default="open", description="Who may read the contract by reflection."
    )
    quota: Quota = Field(default=Quota(), description="Limits of every tenant, as JSON; see security.md.")
    tenant_quotas: dict[str, Quota] = Field(
        default={},
        description="Limits of tenants that differ, as JSON by tenant; what is left out is as above.",
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto: JSON unless standard error is a terminal."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least level."
    )

    slots: int = Field(
        default=9, ge=2, le=4096, description="Device slots of the adapter bank, with the zero slot."
    )
    rank: int = Field(default=16, ge=1, le=128, description="Largest adapter rank.")
    targets: Literal["attention", "attention+ff", "attention+ff+text", "all"] = Field(
        default="attention+ff",
        description="Layers that adapters may change; text encoders and all, convolutions too, for imports.",
    )
    training_share: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="Share of device time that training keeps while others wait."
    )
    deterministic: bool | None = Field(
        default=None,
        description="An image's bits do not depend on its batch. Default: on a CPU without compile.",
    )
    max_running: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Requests of a class that take turns. Default: what one UNet pass takes, 4 at least.",
    )
    max_step_seconds: float = Field(
        default=0.5,
        gt=0.0,
        le=60.0,
        description="Longest pass that requests are batched for; it is what a new request waits for.",
    )
    max_queue: int = Field(
        default=64, ge=1, le=100_000, description="Generation requests that may wait or run."
    )
    max_batch_in_flight: int = Field(
        default=16, ge=1, le=10_000, description="Unfinished requests of one GenerateBatch call."
    )
    prompt_policy: str = Field(
        default="packaged",
        description="Phrases that prompts must not have: packaged, off, or a file (docs/safety.md).",
    )
    image_check: str = Field(
        default="",
        description="Classifier of images: a transformers image-classification directory; empty: none.",
    )
    image_check_refuse: str = Field(
        default="nsfw", description="Its labels that are withheld, separated by commas."
    )
    image_check_threshold: float = Field(
        default=0.5, gt=0.0, le=1.0, description="Probability of these labels from which it is withheld."
    )
    safety_exempt_tenants: str = Field(
        default="", description="Tenants whose prompts and images are not checked, separated by commas."
    )
    provenance: bool = Field(
        default=True, description="Sign a provenance mark (C2PA) into finished images (docs/provenance.md)."
    )
    provenance_cert: Path | None = Field(
        default=None,
        description="Certificate chain of the marks, PEM. Default: one that the server issues itself. "
        "Read again on change.",
    )
    provenance_key: Path | None = Field(
        default=None, description="Its private key, PEM. Read again on change."
    )
    max_batch_rows: int = Field(
        default=10_000, ge=1, le=1_000_000, description="Rows of one batch job's file."
    )
    max_batch_bytes: int = Field(
        default=16 * MIB, ge=1024, le=1024 * MIB, description="Size of one batch job's file."
    )
    max_photo_bytes: int = Field(
        default=20 * MIB, ge=1024, le=20 * MIB, description="Size of one uploaded photo."
    )
    decoders: int = Field(
        default=2, ge=1, le=64, description="Processes that decode uploaded photos, started when needed."
    )
    max_adapter_bytes: int = Field(
        default=512 * MIB, ge=1024, description="Size of one adapter file, checked before loading."
    )
    host_cache_bytes: int = Field(
        default=1024 * MIB, ge=0, description="Adapters kept in host memory, ready for a slot."
    )
    disk_cache_bytes: int = Field(
        default=0, ge=0, description="Adapter files kept on local disk; 0: none, as the objects are local."
    )
    disk_cache_dir: str = Field(
        default="", description="Their folder. Default: adapter-cache in the state directory."
    )
    lease_seconds: float = Field(
        default=30.0, ge=1.0, le=3600.0, description="A job whose runner is silent this long is taken over."
    )
    gc_interval_seconds: float = Field(
        default=3600.0,
        ge=0.0,
        description="Between two collections of unused objects; 0: none here.",
    )
    gc_orphan_hours: float = Field(
        default=24.0, ge=1.0, description="Objects that nothing refers to stay this long."
    )
    gc_result_days: float = Field(
        default=90.0, ge=0.0, description="Artifacts and previews of an ended job stay this long."
    )
    gc_deleted_adapter_days: float = Field(
        default=7.0, ge=0.0, description="Files of a deleted adapter stay this long."
    )
    drain_pause_seconds: float = Field(
        default=0.0,
        ge=0.0,
        le=300.0,
        description="From NOT_SERVING to refusing calls; lets load balancers notice.",
    )
    drain_seconds: float = Field(
        default=25.0,
        ge=0.0,
        le=3600.0,
        description="Time for running calls and the job's checkpoint at shutdown.",
    )

    @field_validator("auth", "jwt_jwks_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("tenant_quotas")
    @classmethod
    def _tenants(cls, value: dict[str, Quota]) -> dict[str, Quota]:
        for name in value:
            if not TENANT.fullmatch(name):
                message = f"{name!r} is not a tenant's name: 1 to 63 lower-case letters, digits and hyphens"
                raise ValueError(message)
        return value

    @field_validator("listen", "metrics_listen", "health_listen")
    @classmethod
    def _address(cls, value: str) -> str:
        form = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[^:\[\]/]+):(\d{1,5})", value)
        if value and (form is None or int(form[1]) > 65535):
            message = f"{value!r} is not host:port"
            raise ValueError(message)
        return value

    @field_validator("objects_url")
    @classmethod
    def _known_store(cls, value: str) -> str:
        if "://" in value and not value.startswith(("s3://", "file:///")):
            message = f"{value!r} is neither s3://bucket/prefix nor a folder"
            raise ValueError(message)
        return value

    @field_validator("listen")
    @classmethod
    def _present(cls, value: str) -> str:
        if not value:
            message = "an address is needed"
            raise ValueError(message)
        return value

    @model_validator(mode="after")
    def _computable(self) -> Self:
        if self._on_cpu and self.cuda_graphs:
            message = f"cuda_graphs needs a CUDA device, not {self.device}"
            raise ValueError(message)
        if self._on_cpu and self.compile and self.deterministic:
            message = "compile has no use beside deterministic on a CPU, where passes are computed row by row"
            raise ValueError(message)
        return self

    @property
    def _on_cpu(self) -> bool:
        return self.device.partition(":")[0] == "cpu"

    @property
    def keeps_bits(self) -> bool:
        """Whether an image's bits shall not depend on what it is batched with."""
        return self._on_cpu and not self.compile if self.deterministic is None else self.deterministic

    @property
    def costs_file(self) -> Path:
        """Where the measured costs of UNet passes are kept for the next start."""
        return self.state_dir / "pass-costs.json"

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        """Who can reach the server must have to say who they are, and must not be overheard.

        Health may listen anywhere: it tells whether the server serves, and nothing else.
        """
        for name in ("listen", "metrics_listen"):
            address = getattr(self, name)
            if not address or is_loopback(address.rpartition(":")[0]):
                continue
            if not self.auth:
                message = (
                    f"{name}: {address!r} is not a loopback address, and a server without authentication "
                    "listens on 127.0.0.1, [::1] or localhost only; set MOORING_AUTH"
                )
                raise ValueError(message)
            if name == "listen" and self.tls_cert is None:
                message = (
                    f"{name}: {address!r} is not a loopback address, and credentials must not travel in the "
                    "clear; set MOORING_TLS_CERT and MOORING_TLS_KEY"
                )
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Each method of authentication has all that it needs."""
        url = urlsplit(self.jwt_jwks_url)
        problems = {
            "tls_cert and tls_key belong together": (self.tls_cert is None) != (self.tls_key is None),
            "provenance_cert and provenance_key belong together": (self.provenance_cert is None)
            != (self.provenance_key is None),
            "tls_client_ca needs tls_cert and tls_key": self.tls_client_ca and self.tls_cert is None,
            "auth mtls needs tls_client_ca": "mtls" in self.auth and self.tls_client_ca is None,
            "auth jwt needs jwt_issuer and jwt_audience": "jwt" in self.auth
            and not (self.jwt_issuer and self.jwt_audience),
            "auth jwt needs one of jwt_jwks_file and jwt_jwks_url": "jwt" in self.auth
            and bool(self.jwt_jwks_file) == bool(self.jwt_jwks_url),
            "jwt_jwks_url must be https": self.jwt_jwks_url and url.scheme != "https",
            f"jwt_jwks_url: host {url.hostname!r} is not in jwt_jwks_hosts": self.jwt_jwks_url
            and url.hostname not in self.jwt_jwks_hosts,
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(problem)
        return self

    def quota_of(self, tenant: str) -> Quota:
        """The limits of a tenant: its own where it has any, else everybody's."""
        own = self.tenant_quotas.get(tenant)
        return self.quota if own is None else self.quota.model_copy(update=own.model_dump(exclude_unset=True))

    @property
    def storage_url(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.state_dir / 'mooring.db'}"

    @property
    def adapter_cache_dir(self) -> Path:
        """Folder of the adapter files' disk cache."""
        return Path(self.disk_cache_dir) if self.disk_cache_dir else self.state_dir / "adapter-cache"

    @property
    def objects_location(self) -> str:
        """Where photos, checkpoints, adapters and results are: a URL or a folder."""
        return self.objects_url or str(self.state_dir / "objects")


def is_loopback(host: str) -> bool:
    """Whether a host (no port, brackets allowed) can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
