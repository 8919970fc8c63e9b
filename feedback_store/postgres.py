"""What PostgreSQL needs said: the driver, limits on every wait, locks by name, and what its errors mean."""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.engine import URL

from feedback_store.codec import clean
from feedback_store.errors import StoreError

OLDEST = 13  # tested on 15; nothing here needs more than 13
_CLASS = 5_238_461  # of advisory locks: any number that only Whetstone uses in its database
_SECRET = ("password", "sslpassword", "passfile")  # what libpq takes in a URL's query and nobody should read


class Lock(IntEnum):
    """Names of advisory locks in the store's database; each is held to the end of a transaction, or of a session."""

    MIGRATION = 1
    VERSIONS = 2  # which versions serve, and which conversations stay on which
    TRAINING = 3  # by a session: the one run that is under way


def with_driver(url: URL) -> URL:
    """`postgresql://` and `postgres://` as others write them, for the driver that Whetstone installs."""
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url


def shown(url: URL) -> str:
    """The URL as it may be told: without any secret."""
    query = {name: "***" if name.lower() in _SECRET else value for name, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


def engine_options(url: URL, busy_seconds: float, connections: int) -> dict[str, Any]:
    """For `create_engine`: no wait without an end, and no connection that broke while it rested is handed out.

    The URL's own `options` come last, and so win.
    """
    wait = max(1, int(1000 * busy_seconds))
    own = url.query.get("options", "")
    options = (
        f"-c lock_timeout={wait} -c statement_timeout={max(120_000, 4 * wait)} "
        "-c idle_in_transaction_session_timeout=120000 -c timezone=UTC "
        f"{own if isinstance(own, str) else ' '.join(own)}"
    )
    arguments: dict[str, Any] = {
        "connect_timeout": max(2, int(min(busy_seconds, 10))),
        "options": options.strip(),
        "client_encoding": "utf8",
        # A server that vanished without a word is noticed within half a minute.
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    if "application_name" not in url.query:
        arguments["application_name"] = "whetstone"
    return {
        "connect_args": arguments,
        "pool_size": connections,
        "max_overflow": 0,
        "pool_timeout": busy_seconds,
        "pool_pre_ping": True,
        "pool_use_lifo": True,
        "pool_recycle": 1800,
        # What a server is set to by default doesn't count: the store's statements lock the rows that they rely on.
        "isolation_level": "READ COMMITTED",
    }


def prepare(connection: Any) -> None:
    """A fresh psycopg connection: text that PostgreSQL can't hold is cleaned wherever it stands, ids included."""
    from psycopg.types.string import StrDumper

    class Clean(StrDumper):  # type: ignore[misc]
        def dump(self, obj: str) -> Any:
            return super().dump(clean(obj))

    connection.adapters.register_dumper(str, Clean)


def hold(connection: Connection, lock: Lock, *, shared: bool = False) -> None:
    """Takes an advisory lock to the end of the transaction. On SQLite a writing transaction is alone anyway."""
    if connection.dialect.name == "postgresql":
        function = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
        connection.execute(text(f"SELECT {function}(:class, :lock)"), {"class": _CLASS, "lock": int(lock)})


def hold_owner(connection: Connection, owner: str, *, shared: bool = False) -> None:
    """As `hold`, of an owner: whoever gives a gold shares it, whoever changes what the owner's golds count doesn't."""
    if connection.dialect.name == "postgresql":
        function = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
        key = int.from_bytes(hashlib.sha256(f"{_CLASS}:{clean(owner)}".encode()).digest()[:8], signed=True)
        connection.execute(text(f"SELECT {function}(:key)"), {"key": key})


def try_hold_session(connection: Connection, lock: Lock) -> bool:
    """Takes an advisory lock until the connection closes, unless another session has it."""
    statement = text("SELECT pg_try_advisory_lock(:class, :lock)")
    return bool(connection.execute(statement, {"class": _CLASS, "lock": int(lock)}).scalar())


def check_server(connection: Connection, where: str) -> None:
    """Raises StoreError for a server that is too old, or a database that can't hold every text."""
    version = connection.dialect.server_version_info or (0,)
    if version < (OLDEST,):
        raise StoreError(
            f"The store {where}: the server is PostgreSQL {'.'.join(map(str, version))}, and Whetstone needs {OLDEST} "
            "or later. Upgrade it, or give a file path to use SQLite."
        )
    encoding = connection.execute(text("SHOW server_encoding")).scalar()
    if encoding != "UTF8":
        raise StoreError(
            f"The store {where}: the database's encoding is {encoding}, which can't hold every text. Make one with: "
            "createdb --encoding=UTF8 --template=template0 NAME"
        )
