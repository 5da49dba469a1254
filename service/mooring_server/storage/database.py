"""The connection to SQLite or PostgreSQL, its transactions, and what every table shares.

Two kinds of transaction:
- `reading()`: a consistent snapshot (SQLite: deferred; PostgreSQL: repeatable read);
- `writing()`: SQLite takes the write lock at once (BEGIN IMMEDIATE), so that nothing between a read and its
  write can change and no upgrade deadlock exists; PostgreSQL locks the rows it reads with FOR UPDATE.

SQLite runs in WAL mode with synchronous=FULL: a committed transaction survives a power cut.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import sqlite3
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import (
    Connection,
    Engine,
    Insert,
    Row,
    Table,
    create_engine,
    event,
    func,
    insert,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from mooring_server.errors import FieldViolation, MooringError, Reason, StorageUnavailableError
from mooring_server.storage import migrate, schema
from mooring_server.storage.pages import PageTokens

log = logging.getLogger(__name__)

_BUSY_TIMEOUT_SECONDS = 30.0
_PAGE_KEY = "page_key"
_OBJECTS_LOCK = 0x4D6F6F73  # PostgreSQL advisory lock
_IDLE_SECONDS = 30
"""How long PostgreSQL waits for the next statement of a transaction that writes: between two of them nothing
slow is done, so whoever lets that much pass is frozen or gone, and its locks stop every other replica."""
_IDLE_TOO_LONG = "25P03"
_NETWORK: Mapping[str, int] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}
"""libpq's own defaults wait for hours for a server whose machine lost power."""
_SQLITE_AWAY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}
DEFAULT_PAGE = 50
MAX_PAGE = 1000
MAX_PAGE_BYTES = 2 * 2**20
"""Of a page's documents, so that it fits into one message of 4 MiB; a page has one row at least."""
MAX_REQUEST_ID = 128
"""Characters. A UUID has 36; PostgreSQL indexes no key of more than 2,704 bytes."""


class ClosePage(Protocol):
    """Makes a page of the rows that were read for it."""

    def __call__(
        self,
        rows: Sequence[Row[Any]],
        cursor_of: Callable[[Row[Any]], list[Any]],
        bytes_of: Callable[[Row[Any]], int] = ...,
    ) -> tuple[Sequence[Row[Any]], str]:
        """The page's rows and the next page's token ("" at the end).

        Args:
            rows: one more than the page may have, where there are so many.
            cursor_of: what the next page begins after.
            bytes_of: about how much of a message a row takes, where rows may be large.
        """


class Database:
    """One database, shared by all threads of the process.

    Args:
        url: ``sqlite:///<path>`` or ``postgresql://user@host/name``.
        clock: seconds since the epoch, for tests. By default SQLite uses this machine's clock and PostgreSQL
            its server's, so that replicas with skewed clocks agree on when a lease ends.

    Raises:
        MooringError: STORAGE_UNAVAILABLE; INTERNAL when a newer server has migrated it.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock
        self._engine = open_engine(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._writer = self._engine.execution_options(mooring_writes=True)
        with typed():
            migrate.upgrade(self._engine)
        self._pages = PageTokens(self._page_key())

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A read-only transaction on one snapshot."""
        options = (
            {} if self._is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        )
        with (
            typed(),
            self._engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A write transaction: committed at the end of the block, rolled back when it raises."""
        with typed(), self._writer.begin() as connection:
            yield connection

    def now(self, connection: Connection) -> float:
        """Seconds since the epoch by the clock that all users of this database share."""
        if self._clock is not None:
            return self._clock()
        if self._is_sqlite:
            return time.time()
        return float(connection.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0.0)

    def lock_objects(self, connection: Connection, *, exclusive: bool) -> None:
        """Until the end of the transaction: exclusive to judge what is referred to, shared to refer to it."""
        if not self._is_sqlite:  # where one writes, no other does
            lock = func.pg_advisory_xact_lock if exclusive else func.pg_advisory_xact_lock_shared
            connection.execute(select(lock(_OBJECTS_LOCK)))

    def require_not_condemned(self, connection: Connection, keys: Sequence[str]) -> None:
        """Called in the transaction that begins to refer to objects; see `garbage`.

        Raises:
            MooringError: STORAGE_UNAVAILABLE when one was collected meanwhile; a repeat writes a new one.
        """
        self.lock_objects(connection, exclusive=False)
        column = schema.condemned_objects.c.object_key
        if connection.execute(select(column).where(column.in_(keys)).limit(1)).first() is not None:
            raise StorageUnavailableError("What was uploaded was taken for garbage before it was done.")

    def upsert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        """An INSERT that can say ON CONFLICT, in the database's dialect."""
        return sqlite.insert(table) if self._is_sqlite else postgresql.insert(table)

    def replayed(
        self, connection: Connection, tenant: str, rpc: str, request_id: str, *, payload: Any, resource: str
    ) -> str | None:
        """Record a request; return the resource that the same request made before, None when it is new.

        Args:
            connection: the write transaction that also creates the resource.
            tenant: who asks.
            rpc: which creating call; request ids of different calls are independent.
            request_id: chosen by the caller; "" means that the call is not idempotent.
            payload: everything that the caller asked for, JSON-serialisable.
            resource: the id that the call is about to create.

        Raises:
            MooringError: REQUEST_ID_REUSED when the id came with another payload; INVALID_FIELD for one that
                not every database can keep.
        """
        if not request_id:
            return None
        check_text("request_id", request_id, limit=MAX_REQUEST_ID)
        payload_hash = hashlib.sha256(_canonical(payload)).hexdigest()
        key = {"tenant": tenant, "rpc": rpc, "request_id": request_id}
        recorded = connection.execute(
            self.upsert(schema.requests)
            .values(**key, payload_hash=payload_hash, resource=resource, create_time=self.now(connection))
            .on_conflict_do_nothing()
            .returning(schema.requests.c.request_id)
        )
        if recorded.first() is not None:
            return None
        return self.recalled(connection, tenant, rpc, request_id, payload=payload)

    def recalled(
        self, connection: Connection, tenant: str, rpc: str, request_id: str, *, payload: Any
    ) -> str | None:
        """The resource that the same request made before, None when there is none; arguments as above.

        Raises:
            MooringError: REQUEST_ID_REUSED when the id came with another payload.
        """
        key = {"tenant": tenant, "rpc": rpc, "request_id": request_id}
        row = connection.execute(select(schema.requests).filter_by(**key)).one_or_none()
        if row is None:
            return None
        if row.payload_hash != hashlib.sha256(_canonical(payload)).hexdigest():
            raise MooringError(
                Reason.REQUEST_ID_REUSED,
                f"request_id {request_id!r} was already used for another {rpc} request.",
                remedy="Send a new request_id with a new request; repeat one only with the same request.",
                fields=[FieldViolation("request_id", "used before with different fields")],
            )
        return str(row.resource)

    def page(
        self, page_size: int, page_token: str, query: Sequence[Any]
    ) -> tuple[int, list[Any] | None, ClosePage]:
        """Check paging arguments.

        Returns:
            The number of rows to read (one more than a page, to learn whether another follows), the cursor
            after which to read (None at the start), and the function that makes a page of what was read.
        """
        if page_size < 0:
            raise MooringError(
                Reason.INVALID_FIELD,
                f"page_size {page_size} is negative.",
                remedy=f"Leave it 0 for {DEFAULT_PAGE}, or ask for up to {MAX_PAGE}.",
                fields=[FieldViolation("page_size", "must not be negative")],
            )
        size = min(page_size or DEFAULT_PAGE, MAX_PAGE)
        cursor = self._pages.read(page_token, query) if page_token else None

        def close(
            rows: Sequence[Row[Any]],
            cursor_of: Callable[[Row[Any]], list[Any]],
            bytes_of: Callable[[Row[Any]], int] = lambda _row: 0,
        ) -> tuple[Sequence[Row[Any]], str]:
            kept, room = 0, MAX_PAGE_BYTES
            for row in rows[:size]:
                room -= bytes_of(row)
                if kept and room < 0:
                    break
                kept += 1
            more = len(rows) > kept
            return rows[:kept], self._pages.make(cursor_of(rows[kept - 1]), query) if more else ""

        return size + 1, cursor, close

    def _page_key(self) -> bytes:
        """The key that signs page tokens, the same for all replicas; made by the first one."""
        state = schema.server_state
        query = select(state.c.value).filter_by(key=_PAGE_KEY)
        with self.reading() as connection:
            known = connection.scalar(query)
        if known is None:
            with self.writing() as connection:
                fresh = self.upsert(state).values(key=_PAGE_KEY, value=secrets.token_bytes(32))
                connection.execute(fresh.on_conflict_do_nothing())
                known = connection.scalars(query).one()
        return bytes(known)


@contextmanager
def typed() -> Iterator[None]:
    """Of what SQLAlchemy raises, a database that is away, busy, full or read-only as STORAGE_UNAVAILABLE."""
    try:
        yield
    except (OperationalError, InterfaceError, InternalError, PoolTimeoutError) as error:
        if isinstance(error, InternalError) and getattr(error.orig, "sqlstate", None) != _IDLE_TOO_LONG:
            raise
        code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
        if code is not None and code & 0xFF not in _SQLITE_AWAY:
            raise
        log.warning("the database fails: %s", error)
        said = "is away." if code is None else f"fails: {getattr(error, 'orig', error)}."
        raise StorageUnavailableError(f"The database {said}") from error


def new_id() -> str:
    """A fresh server-made id: 32 hex digits, sorted by nothing, guessable by nobody."""
    return uuid.uuid4().hex


def insert_row(connection: Connection, table: Table, values: dict[str, Any]) -> None:
    """Insert one row."""
    statement: Insert = insert(table).values(**values)
    connection.execute(statement)


def check_text(field: str, value: str, *, limit: int) -> None:
    """Refuse text that is too long or that holds control characters (PostgreSQL cannot store NUL).

    Raises:
        MooringError: INVALID_FIELD.
    """
    if len(value) > limit:
        problem = f"{field} has {len(value)} characters; at most {limit} are taken."
    elif any(unicodedata.category(character) in {"Cc", "Cs"} for character in value):
        problem = f"{field} holds a control character."
    else:
        return
    raise MooringError(Reason.INVALID_FIELD, problem, fields=[FieldViolation(field, problem)])


def size_of(*documents: Any) -> int:
    """Characters of JSON documents: a measure of what their messages take."""
    return sum(len(json.dumps(document, ensure_ascii=False).encode()) for document in documents)


def _canonical(payload: Any) -> bytes:
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def use_wal(connection: Any, *, seconds: float = _BUSY_TIMEOUT_SECONDS) -> None:
    """Let a SQLite file be written in WAL mode.

    Of several processes that open a fresh file at once one changes the mode, and SQLite tells the others that
    the file is locked without waiting as `timeout` says, lest they wait for each other: so ask again.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def open_engine(url: str) -> Engine:
    """The connections to a database, set up as the module says; nothing is read or written yet.

    Raises:
        ValueError: for another database than SQLite in a file, or PostgreSQL.
    """
    parsed = make_url(url)
    dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    if parsed.get_backend_name() == "postgresql":
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            json_serializer=dumps,
            pool_pre_ping=True,
            pool_size=10,
            connect_args={name: value for name, value in _NETWORK.items() if name not in parsed.query},
        )

        @event.listens_for(engine, "begin")
        def bound(connection: Connection) -> None:
            if connection.get_execution_options().get("mooring_writes", False):
                # for this transaction alone: a pooler may give the session to somebody else afterwards
                connection.exec_driver_sql(
                    f"SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'"
                )

        return engine
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        raise ValueError(f"storage needs sqlite:///<path> or postgresql://…, not {url!r}")
    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        parsed, json_serializer=dumps, connect_args={"timeout": _BUSY_TIMEOUT_SECONDS}, pool_size=10
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, not where the driver guesses
        use_wal(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("mooring_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
