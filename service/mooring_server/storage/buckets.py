"""Objects in an S3 bucket, through obstore.

One request writes an object, so that a key holds all of it or nothing. What the bucket acknowledges is not
believed: every write is read back and compared before anything may refer to it. `If-None-Match` lets a key
that names its content be written once; a server that ignores it (some S3 lookalikes do) writes the same bytes
again. ETags are not used: with encryption by KMS they are not digests.

Credentials and endpoint come from the standard variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, AWS_WEB_IDENTITY_TOKEN_FILE with
AWS_ROLE_ARN, AWS_CONTAINER_CREDENTIALS_*) or, without any of them, from the instance's metadata service.

Left out: multipart uploads (one request carries up to 5 GiB; an adapter has a hundredth of that), listing by
time, other clouds (obstore knows them; nobody has tested them here).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from mooring_server.errors import StorageUnavailableError
from mooring_server.storage.objects import (
    LocalObjects,
    ObjectEntry,
    ObjectStore,
    check_key,
    intact,
    require_intact,
)

log = logging.getLogger(__name__)

_ATTEMPTS = (
    3  # of a write that the bucket acknowledges and does not keep, of a read that is not what it should be
)
_PAUSE_SECONDS = 0.2


def open_objects(url: str) -> ObjectStore:
    """The store that a URL names.

    Args:
        url: ``s3://bucket/prefix``, ``file:///folder``, or a folder.

    Raises:
        ValueError: for any other URL.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        return BucketObjects(parts.netloc, parts.path.strip("/"))
    if parts.scheme == "file" and not parts.netloc:
        return LocalObjects(unquote(parts.path))
    if not parts.scheme and url:
        return LocalObjects(Path(url).expanduser())
    raise ValueError(f"objects need s3://bucket/prefix or a folder, not {url!r}")


class BucketObjects:
    """Objects of one prefix of an S3 bucket. Thread-safe.

    Args:
        bucket: its name.
        prefix: below which all keys lie; "" for the whole bucket.
        timeout: seconds for one request.
        retry_seconds: for how long a failing request is repeated.
        options: of obstore's S3Store, over the environment's.

    Raises:
        ValueError: no bucket's name, or an option that does not exist.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        timeout: float = 60.0,
        retry_seconds: float = 15.0,
        **options: Any,
    ) -> None:
        if not bucket:
            raise ValueError("s3:// needs a bucket's name")
        try:
            self._store = S3Store(
                bucket,
                prefix=check_key(prefix) if prefix else None,
                client_options={
                    # given here, because options in code hide the variable
                    "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in {"1", "true", "yes"},
                    "timeout": timedelta(seconds=timeout),
                    "connect_timeout": timedelta(seconds=5),
                },
                retry_config={
                    "max_retries": 6,
                    "retry_timeout": timedelta(seconds=retry_seconds),
                    "backoff": {"max_backoff": timedelta(seconds=3)},
                },
                **options,
            )
        except BaseError as error:
            raise ValueError(str(error)) from error

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`, and make sure that the bucket has it."""
        check_key(key)
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_SECONDS * attempt)
            with self._typed():
                self._write(key, data, once=not attempt and _names_content(key, data))
                if self._read(key) == data:
                    return
        log.warning("the bucket acknowledges %s and does not keep it", key)
        raise StorageUnavailableError("The bucket of the objects does not keep what is written to it.")

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises KeyError when there are none, OBJECT_DAMAGED when they are others."""
        check_key(key)
        with self._typed():
            for _ in range(_ATTEMPTS):
                data = self._read(key)
                if data is None or intact(key, data):
                    break  # else it was broken on its way, perhaps
        if data is None:
            raise KeyError(key)
        return require_intact(key, data)

    def exists(self, key: str) -> bool:
        """Whether `key` holds bytes."""
        check_key(key)
        with self._typed():
            try:
                self._store.head(key)
            except FileNotFoundError:
                return False
        return True

    def delete(self, key: str) -> None:
        """Remove `key` if it is there."""
        check_key(key)
        with self._typed(), contextlib.suppress(FileNotFoundError):
            self._store.delete(key)

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with `prefix`, in ascending order."""
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        """Keys, sizes and times, in ascending order of keys."""
        folder = prefix.rpartition("/")[0]
        with self._typed():
            found = [
                ObjectEntry(meta["path"], meta["size"], meta["last_modified"].timestamp())
                for batch in self._store.list(folder or None)
                for meta in batch
                if meta["path"].startswith(prefix)
            ]
        yield from sorted(found, key=lambda entry: entry.key)

    def _write(self, key: str, data: bytes, *, once: bool) -> None:
        mode: Any = "create" if once else "overwrite"
        with contextlib.suppress(AlreadyExistsError):  # then it is compared like one that we wrote
            obstore.put(self._store, key, data, mode=mode, use_multipart=False)

    def _read(self, key: str) -> bytes | None:
        try:
            return bytes(self._store.get(key).bytes())
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            log.warning("the bucket fails: %s", error)
            # Of a listing, obstore only quotes the answer, among durations and ports that may read 403 too.
            refused = isinstance(error, PermissionDeniedError | UnauthenticatedError) or (
                "status code: 403 " in str(error)
            )
            said = "refuses the server's credentials" if refused else "does not answer"
            raise StorageUnavailableError(f"The bucket of the objects {said}.") from error


def _names_content(key: str, data: bytes) -> bool:
    return intact(key, data) and not intact(key, data + b"\0")
