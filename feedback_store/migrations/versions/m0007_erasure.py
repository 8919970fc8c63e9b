"""Full-text search, consent, and what is left of a conversation that was erased."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from feedback_store.errors import StoreError
from feedback_store.search import turn_text, vector_of

revision = "0007"
down_revision = "0006"

_BATCH = 500

_turns = sa.table(
    "turns",
    sa.column("id", sa.String),
    sa.column("conversation_id", sa.String),
    sa.column("messages", sa.JSON),
    sa.column("answer", sa.Text),
)
_texts = sa.table(
    "search_texts",
    sa.column("conversation_id", sa.String),
    sa.column("turn_id", sa.String),
    sa.column("text", sa.Text),
)

_SQLITE_INDEX = (
    "CREATE VIRTUAL TABLE search_index USING fts5("
    "text, content='search_texts', content_rowid='id', tokenize='unicode61 remove_diacritics 2')",
    "CREATE TRIGGER search_texts_added AFTER INSERT ON search_texts BEGIN "
    "INSERT INTO search_index (rowid, text) VALUES (new.id, new.text); END",
    "CREATE TRIGGER search_texts_removed AFTER DELETE ON search_texts BEGIN "
    "INSERT INTO search_index (search_index, rowid, text) VALUES ('delete', old.id, old.text); END",
    "CREATE TRIGGER search_texts_changed AFTER UPDATE ON search_texts BEGIN "
    "INSERT INTO search_index (search_index, rowid, text) VALUES ('delete', old.id, old.text); "
    "INSERT INTO search_index (rowid, text) VALUES (new.id, new.text); END",
)


def upgrade() -> None:
    op.create_table(
        "search_texts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("conversation_id", sa.String(length=40), nullable=False),
        sa.Column("turn_id", sa.String(length=40), nullable=True),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["conversation_id"], ["conversations.id"], name=op.f("fk_search_texts_conversation_id_conversations")
        ),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.id"], name=op.f("fk_search_texts_turn_id_turns")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_search_texts")),
    )
    op.create_index(op.f("ix_search_texts_conversation_id"), "search_texts", ["conversation_id"])
    op.create_index(op.f("ix_search_texts_turn_id"), "search_texts", ["turn_id"])
    op.create_table(
        "consents",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("training", sa.Boolean(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_consents")),
    )
    _make_tombstones()
    op.create_index(op.f("ix_outcomes_task_id"), "outcomes", ["task_id"])
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        if not connection.execute(sa.text("SELECT 1 FROM pragma_module_list WHERE name = 'fts5'")).first():
            raise StoreError(
                "This Python's SQLite has no full-text index (FTS5). Use a Python whose SQLite has it, as those of "
                "python.org, of Debian and of conda do, or PostgreSQL."
            )
        for statement in _SQLITE_INDEX:
            op.execute(statement)
    else:
        op.execute(f"CREATE INDEX search_index ON search_texts USING gin ({vector_of('text')})")
    _index_turns(connection)


def _make_tombstones() -> None:
    op.create_table(
        "tombstones",
        sa.Column("conversation_id", sa.String(length=40), nullable=False),
        sa.Column("owner_hash", sa.String(length=64), nullable=False),
        sa.Column("turns", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("swept_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("conversation_id", name=op.f("pk_tombstones")),
    )
    op.create_index(op.f("ix_tombstones_owner_hash"), "tombstones", ["owner_hash"])
    op.create_index(op.f("ix_tombstones_swept_at"), "tombstones", ["swept_at"])
    op.create_table(
        "erased_turns",
        sa.Column("turn_id", sa.String(length=40), nullable=False),
        sa.Column("conversation_id", sa.String(length=40), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("turn_id", name=op.f("pk_erased_turns")),
    )
    op.create_index(op.f("ix_erased_turns_conversation_id"), "erased_turns", ["conversation_id"])
    op.create_table(
        "erased_uses",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("task_id", sa.String(length=40), nullable=False),
        sa.Column("conversation_id", sa.String(length=40), nullable=True),
        sa.Column("owner_hash", sa.String(length=64), nullable=False),
        sa.Column("taints", sa.Boolean(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("swept_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_erased_uses_run_id_runs")),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f("fk_erased_uses_task_id_tasks")),
        sa.ForeignKeyConstraint(
            ["conversation_id"], ["tombstones.conversation_id"], name=op.f("fk_erased_uses_conversation_id_tombstones")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erased_uses")),
    )
    for column in ("run_id", "task_id", "conversation_id", "owner_hash"):
        op.create_index(op.f(f"ix_erased_uses_{column}"), "erased_uses", [column])
    op.create_table(
        "erased_results",
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("hash", name=op.f("pk_erased_results")),
    )


def _index_turns(connection: sa.Connection) -> None:
    """Batch by batch along the primary key, so that a large record needs no large memory."""
    c = _turns.c
    page = sa.select(c.id, c.conversation_id, c.messages, c.answer).order_by(c.id).limit(_BATCH)
    after = ""
    while rows := connection.execute(page.where(c.id > after)).all():
        found: list[dict[str, Any]] = [
            {"conversation_id": row.conversation_id, "turn_id": row.id, "text": turn_text(row.messages, row.answer)}
            for row in rows
        ]
        connection.execute(sa.insert(_texts), found)
        after = rows[-1].id
