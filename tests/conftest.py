"""Parts that many tests share: the embedded base model, prepared once a machine."""

from pathlib import Path

import pytest

from serving.model import BaseModel, prepare_base


@pytest.fixture(scope="session")
def base() -> BaseModel:
    return prepare_base(Path.home() / ".whetstone")
