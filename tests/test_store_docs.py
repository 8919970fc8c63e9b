"""The queries of docs/store.md answer what they say they do."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from feedback_store import Store
from tests.test_store_erasure import MINE, OURS, learn, talk

DOCS = Path(__file__).parents[1] / "docs" / "store.md"


def test_the_three_queries(tmp_path: Path) -> None:
    right, tools = "v1", "search"
    with Store.open(tmp_path / "s.db") as store:
        store.add_version("v1", None, "v1", {}, "published")
        conversation = talk(store, "ada", MINE)
        learn(store, "v2", "v1")
        talk(store, "bob", OURS, "4", "tea")
        queries = re.findall(r"```sql\n(.*?)```", DOCS.read_text(), re.DOTALL)
        with closing(sqlite3.connect(f"file:{tmp_path / 's.db'}?mode=ro", uri=True)) as reader:
            assert [reader.execute(query).fetchall() for query in queries] == [
                [(right, 2, 1.0)],
                [("v2", conversation, "ada")],
                [(tools, 2, 0.0, 0.0)],
            ]
