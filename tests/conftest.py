"""Parts that many tests share: the embedded base model, prepared once a machine, and places for stores."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.model import BaseModel, prepare_base
from tests.databases import Cluster, Databases, Files, Places, postgres_binaries


@pytest.fixture(scope="session")
def base() -> BaseModel:
    return prepare_base(Path.home() / ".whetstone")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server; tests that ask for it are skipped where none is installed."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL isn't installed (Debian, Ubuntu: apt-get install postgresql)")
    server = Cluster(binaries)
    yield server
    server.remove()


@pytest.fixture(scope="session")
def _databases(cluster: Cluster) -> Databases:
    return Databases(cluster)


@pytest.fixture(scope="session")
def _files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def places(request: pytest.FixtureRequest) -> Places:
    """Where stores may live: a test that uses it runs once on either database."""
    places: Places = request.getfixturevalue("_files" if request.param == "sqlite" else "_databases")
    return places


@pytest.fixture
def place(places: Places) -> Iterator[str]:
    """The path or the URL of an empty store of this release, for `Store.open`."""
    made = places.new()
    yield made
    places.drop(made)


_ALONE = ("test_sandbox_hostile.py", "test_sandbox_modes.py", "test_sandbox_pool.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that count this process's children and descriptors go first: other tests leave some open until the end."""
    items.sort(key=lambda item: item.path.name not in _ALONE)
