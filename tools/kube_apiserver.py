"""A real Kubernetes API server to check manifests against, built from Go modules.

    python -m tools.kube_apiserver build                        # once: about 13 minutes
    python -m tools.kube_apiserver check deploy/kubernetes/...  # every object, strict, as a dry run

Schema files say what a field is called; only the server also runs defaulting, cross-field validation and
admission (pod security among them). Nothing is installed and no container runs: `etcd` and `kube-apiserver`
are two programs in `.cache/kubernetes`, started on loopback with throw-away certificates and stopped again.
Kubernetes publishes neither as a module for `go install`, as its own go.mod names its parts by v0.0.0: a
throw-away module replaces each by the version that belongs to the release.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "kubernetes"
KUBERNETES = "1.36.3"
ETCD = "3.6.16"
START_SECONDS = 120.0
_TOKEN = "throw-away"  # noqa: S105 - of a server on loopback that lives for one check
_RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


class ToolError(Exception):
    """What could not be built, started or applied; the text is for the person at the terminal."""


def programs() -> tuple[Path, Path]:
    """Where etcd and kube-apiserver lie once they are built."""
    return CACHE / f"etcd-{ETCD}", CACHE / f"kube-apiserver-{KUBERNETES}"


def built() -> bool:
    """Whether both programs are there."""
    return all(path.is_file() for path in programs())


def build() -> None:
    """Build what is missing.

    Raises:
        ToolError: no Go, or a build failed.
    """
    if shutil.which("go") is None:
        raise ToolError("Go is not on the PATH; it builds etcd and kube-apiserver.")
    etcd, apiserver = programs()
    if not etcd.is_file():
        _build(etcd, "go.etcd.io/etcd/server/v3", f"v{ETCD}", "go.etcd.io/etcd/server/v3", {})
    if not apiserver.is_file():
        module = "k8s.io/kubernetes"
        downloaded = json.loads(_go(Path.cwd(), "mod", "download", "-json", f"{module}@v{KUBERNETES}"))
        theirs = Path(downloaded["GoMod"]).read_text(encoding="utf-8")
        parts = set(re.findall(r"(k8s\.io/[\w.-]+) v0\.0\.0(?![\w.-])", theirs))
        release = f"v0.{KUBERNETES.split('.', 1)[1]}"
        _build(
            apiserver, module, f"v{KUBERNETES}", f"{module}/cmd/kube-apiserver", dict.fromkeys(parts, release)
        )


def _build(program: Path, module: str, version: str, package: str, parts: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="mooring-go-") as name:
        folder = Path(name)
        lines = ["module throwaway", "go 1.24", f"require {module} {version}"]
        lines += [f"replace {part} => {part} {release}" for part, release in sorted(parts.items())]
        (folder / "go.mod").write_text("\n".join(lines) + "\n", encoding="utf-8")
        program.parent.mkdir(parents=True, exist_ok=True)
        unfinished = program.with_suffix(".part")
        # -mod=mod adds what the package needs and no more; `go mod tidy` would fetch everybody's tests too
        _go(folder, "build", "-mod=mod", "-trimpath", "-ldflags=-s -w", "-o", str(unfinished), package)
        unfinished.rename(program)


def _go(folder: Path, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - fixed program, own arguments
        ["go", *arguments],  # noqa: S607 - Go is found as the user's shell finds it
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ToolError(f"go {' '.join(arguments[:2])}: {done.stderr.strip()[-2000:]}")
    return done.stdout


@contextmanager
def running() -> Iterator[Path]:
    """A fresh API server; yields the kubeconfig of its administrator.

    Raises:
        ToolError: it is not built, or not ready in time.
    """
    if not built():
        raise ToolError("Not built yet: python -m tools.kube_apiserver build")
    etcd, apiserver = programs()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mooring-kube-")))
        client, peer, secure = _free_ports(3)
        store = f"http://127.0.0.1:{client}"
        _start(
            stack, folder / "etcd.log", str(etcd), "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync",
            "--listen-client-urls", store, "--advertise-client-urls", store,
            "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", f"default=http://127.0.0.1:{peer}",
        )  # fmt: skip
        key = folder / "accounts.key"
        _signing_key(key)
        (folder / "tokens.csv").write_text(f"{_TOKEN},admin,admin,system:masters\n", encoding="utf-8")
        process = _start(
            stack, folder / "kube-apiserver.log", str(apiserver), "--etcd-servers", store,
            "--service-account-key-file", str(key), "--service-account-signing-key-file", str(key),
            "--service-account-issuer", "https://kubernetes.default.svc",
            "--token-auth-file", str(folder / "tokens.csv"), "--authorization-mode", "RBAC",
            "--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1",
            "--secure-port", str(secure), "--cert-dir", str(folder / "certificates"),
            "--service-cluster-ip-range", "10.0.0.0/24",
            # no controllers run here: the account that they would make for each namespace is not waited for
            "--disable-admission-plugins", "ServiceAccount",
        )  # fmt: skip
        config = folder / "kubeconfig"
        config.write_text(_kubeconfig(f"https://127.0.0.1:{secure}"), encoding="utf-8")
        _wait_ready(config, process, folder / "kube-apiserver.log")
        yield config


def kubectl(config: Path, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run kubectl against a server."""
    beside = Path(sys.executable).parent / "kubectl"
    program = str(beside) if beside.is_file() else "kubectl"
    return subprocess.run(  # noqa: S603 - fixed program, own arguments
        [program, "--kubeconfig", str(config), *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def render(folder: Path) -> str:
    """The YAML documents of a kustomization.

    Raises:
        ToolError: kustomize refuses it.
    """
    done = kubectl(Path(os.devnull), "kustomize", str(folder))
    if done.returncode:
        raise ToolError(done.stderr)
    return done.stdout


def accepted(config: Path, manifests: str, namespace: str) -> str:
    """Let a server judge manifests: strict field names, defaults, validation, admission. Nothing is stored.

    The namespace is made for real (a dry run cannot put objects into one that is not there) and enforces the
    restricted pod security standard. Objects that hold pods by a template (a StatefulSet) are only warned
    about by that admission, so a warning counts as a refusal.

    Args:
        config: kubeconfig of `running`.
        manifests: YAML documents.
        namespace: that they name.

    Returns:
        What the server said of each object.

    Raises:
        ToolError: it refuses one, or warns.
    """
    if kubectl(config, "get", "namespace", namespace).returncode:
        for step in (("create", "namespace", namespace), ("label", "namespace", namespace, _RESTRICTED)):
            done = kubectl(config, *step)
            if done.returncode:
                raise ToolError(done.stderr)
    warn = kubectl(
        config, "label", "--overwrite", "namespace", namespace, _RESTRICTED.replace("enforce", "warn")
    )
    if warn.returncode:
        raise ToolError(warn.stderr)
    done = kubectl(
        config, "apply", "--dry-run=server", "--validate=strict", "--server-side", "-f", "-", text=manifests
    )
    if done.returncode or done.stderr.strip():
        raise ToolError(done.stderr.strip() or done.stdout)
    return done.stdout


def _start(stack: ExitStack, log: Path, *command: str) -> subprocess.Popen[bytes]:
    output = stack.enter_context(log.open("wb"))
    process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)  # noqa: S603

    def stop() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)
    return process


def _wait_ready(config: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if kubectl(config, "get", "--raw", "/readyz").returncode == 0:
            return
        time.sleep(0.5)
    words = log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
    raise ToolError(f"kube-apiserver did not become ready:\n{words}")


def _signing_key(path: Path) -> None:
    """A key for service account tokens, which the server insists on."""
    command = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed program
    if done.returncode:
        raise ToolError(f"openssl: {done.stderr.strip()}")


def _kubeconfig(server: str) -> str:
    # the certificate is made by the server at its start and only ever seen on loopback
    cluster = {"server": server, "insecure-skip-tls-verify": True}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "check",
            "clusters": [{"name": "check", "cluster": cluster}],
            "users": [{"name": "check", "user": {"token": _TOKEN}}],
            "contexts": [{"name": "check", "context": {"cluster": "check", "user": "check"}}],
        }
    )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.kube_apiserver",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("build", help="build etcd and kube-apiserver into .cache/kubernetes")
    check = commands.add_parser("check", help="apply kustomizations as a strict server-side dry run")
    check.add_argument("folders", nargs="+", type=Path, help="folders with a kustomization.yaml")
    check.add_argument(
        "--namespace", default="mooring", help="the namespace that they name (default: mooring)"
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.what == "build":
            build()
            sys.stdout.write("".join(f"{path}\n" for path in programs()))
            return 0
        rendered = [render(folder) for folder in chosen.folders]
        with running() as config:
            for manifests in rendered:
                sys.stdout.write(accepted(config, manifests, chosen.namespace))
    except ToolError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
