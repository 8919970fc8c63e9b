"""Where a test's store lives: a file, or a database of a PostgreSQL server that the tests start for themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Row, create_engine, text
from sqlalchemy.engine import URL

from feedback_store import Store
from feedback_store.database import parse_location

PASSWORD = "s3cret-of-the-tests"  # no log and no message may ever hold it


def postgres_binaries() -> Path | None:
    """The folder of `initdb` and `postgres`, the newest release's; None where PostgreSQL isn't installed."""
    if on_path := shutil.which("initdb"):
        return Path(on_path).parent
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Cluster:
    """A server of its own in a folder of its own, reached by a socket there: nothing of it is open to the network.

    It sorts text as people do (ICU, English), which is not byte order, and doesn't wait for the disk: a test's crash is
    a process's, not the machine's. PostgreSQL refuses to run as root, so there it runs as another user.
    """

    def __init__(self, binaries: Path, *, durable: bool = False, parent: Path | None = None) -> None:
        """`durable`: as an installed server is, for measuring it."""
        self._bin = binaries
        self._durable = durable
        # A socket's path is short, and pytest's own folders aren't.
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir=parent))
        self._user = None
        if os.getuid() == 0:
            self._user = "postgres" if _exists("postgres") else "nobody"
            shutil.chown(self.folder, self._user)
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run(
            "initdb", "-D", "data", "-U", "whetstone", "--pwfile=password", "--auth=scram-sha-256", "--encoding=UTF8",
            "--locale-provider=icu", "--icu-locale=en-US", "--locale=C.UTF-8", "--no-sync", "--no-instructions",
        )  # fmt: skip
        self.start()

    def start(self, *options: str) -> None:
        settings = {
            "listen_addresses": "''", "unix_socket_directories": str(self.folder), "max_connections": "120",
        }  # fmt: skip
        if not self._durable:
            settings |= {
                "fsync": "off", "full_page_writes": "off", "shared_buffers": "32MB", "max_wal_size": "256MB",
            }  # fmt: skip
        flags = " ".join([*(f"-c {name}={value}" for name, value in settings.items()), *options])
        self._run("pg_ctl", "-D", "data", "-w", "-t", "120", "-l", "log", "-o", flags, "start")

    def stop(self, mode: str = "fast") -> None:
        """`immediate` is a crash: nothing is written any more, and the next start recovers."""
        self._run("pg_ctl", "-D", "data", "-w", "-t", "120", "-m", mode, "stop")

    def remove(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder)

    def url(self, database: str, user: str = "whetstone", password: str = PASSWORD) -> str:
        url = URL.create("postgresql", user, password, database=database, query={"host": str(self.folder)})
        return url.render_as_string(hide_password=False)

    def execute(self, *statements: str, database: str = "postgres") -> None:
        """Each outside of a transaction, as CREATE DATABASE asks for."""
        engine = create_engine(parse_location(self.url(database)), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
        engine.dispose()

    @property
    def version(self) -> str:
        return (self.folder / "data" / "PG_VERSION").read_text().strip()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments], cwd=self.folder, user=self._user, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        if done.returncode:
            log = self.folder / "log"
            raise RuntimeError(f"{program} failed:\n{done.stdout}\n{log.read_text() if log.exists() else ''}")


def _exists(user: str) -> bool:
    import pwd

    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


class Places(Protocol):
    """Makes places for stores on one kind of database."""

    kind: str

    def blank(self) -> str:
        """Where nothing is yet."""

    def new(self) -> str:
        """Where an empty store of this release is."""

    def drop(self, place: str) -> None: ...


class Files:
    kind = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    def blank(self) -> str:
        self._made += 1
        folder = self._folder / str(self._made)
        folder.mkdir()
        return str(folder / "store.db")

    def new(self) -> str:
        place = self.blank()
        shutil.copy(self._template, place)
        return place

    def drop(self, place: str) -> None:
        shutil.rmtree(Path(place).parent)

    @cached_property
    def _template(self) -> str:
        place = self.blank()
        Store.open(place).close()
        return place


class Databases:
    kind = "postgresql"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._made = 0
        self._template = ""

    def blank(self) -> str:
        return self._make("template0")

    def new(self) -> str:
        if not self._template:
            place = self._make("template0")
            Store.open(place).close()
            self._template = _name(place)
        return self._make(self._template)

    def drop(self, place: str) -> None:
        self._cluster.execute(f"DROP DATABASE {_name(place)} WITH (FORCE)")

    def _make(self, template: str) -> str:
        self._made += 1
        name = f"test_{id(self)}_{self._made}"
        self._cluster.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self._cluster.url(name)


def _name(place: str) -> str:
    return str(parse_location(place).database)


def edit(place: str | Path, *statements: str, **values: Any) -> None:
    """Past the store's back."""
    engine = create_engine(parse_location(place))
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement), values)
    engine.dispose()


def rows(place: str | Path, statement: str, **values: Any) -> Sequence[Row[Any]]:
    engine = create_engine(parse_location(place))
    with engine.connect() as connection:
        found = connection.execute(text(statement), values).all()
    engine.dispose()
    return found


def count(place: str | Path, table: str) -> int:
    return int(rows(place, f"SELECT count(*) FROM {table}")[0][0])
