"""Parts that many tests share: the embedded base model, prepared once a machine."""

from pathlib import Path

import pytest

from serving.model import BaseModel, prepare_base


@pytest.fixture(scope="session")
def base() -> BaseModel:
    return prepare_base(Path.home() / ".whetstone")


_ALONE = ("test_sandbox_hostile.py", "test_sandbox_modes.py", "test_sandbox_pool.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that count this process's children and descriptors go first: other tests leave some open until the end."""
    items.sort(key=lambda item: item.path.name not in _ALONE)
