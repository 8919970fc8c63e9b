"""Outcomes have a trust and golds a date; contested ones wait for a person; owners can be quarantined; an audit."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from feedback_store.gold import SOURCE_TRUST, plain_key, question_hash

revision = "0009"
down_revision = "0008"

_BATCH = 500
_tasks = sa.table(
    "tasks",
    sa.column("id", sa.String),
    sa.column("messages", sa.JSON),
    sa.column("gold", sa.Text),
    sa.column("created_at", sa.DateTime(timezone=True)),
    sa.column("question_hash", sa.String),
    sa.column("gold_key", sa.Text),
)
_origins = sa.table("task_origins", sa.column("source", sa.Text), sa.column("trust", sa.Float))
_outcomes = sa.table(
    "outcomes",
    sa.column("source", sa.String),
    sa.column("trust", sa.Float),
    sa.column("task_id", sa.String),
    sa.column("became", sa.String),
)
_questions = sa.table(
    "questions",
    sa.column("hash", sa.String),
    sa.column("basis", sa.String),
    sa.column("who", sa.Text),
    sa.column("reason", sa.Text),
    sa.column("at", sa.DateTime(timezone=True)),
)


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    for name, kind in (("question_hash", sa.String(64)), ("gold_key", sa.Text()), ("hold", sa.String(16)),
                       ("reason", sa.Text())):  # fmt: skip
        op.add_column("tasks", sa.Column(name, kind, nullable=False, server_default=""))
    op.add_column("tasks", sa.Column("expires_at", moment, nullable=True))
    op.drop_index("ix_tasks_state_attempts_id", "tasks")
    op.create_index("ix_tasks_state_hold_attempts_id", "tasks", ["state", "hold", "attempts", "id"])
    op.create_index("ix_tasks_state_hold_owner", "tasks", ["state", "hold", "owner"])
    op.create_index("ix_tasks_question_hash", "tasks", ["question_hash"])
    op.add_column("task_origins", sa.Column("trust", sa.Float(), nullable=False, server_default="1"))
    op.add_column("task_origins", sa.Column("expires_at", moment, nullable=True))
    op.drop_index("ix_task_origins_task_id", "task_origins")
    op.create_index("ix_task_origins_task_id_owner_id_trust", "task_origins", ["task_id", "owner", "id", "trust"])
    op.create_index("ix_task_origins_owner_id", "task_origins", ["owner", "id"])
    op.add_column("outcomes", sa.Column("trust", sa.Float(), nullable=False, server_default="1"))
    op.add_column("outcomes", sa.Column("became", sa.String(16), nullable=False, server_default=""))
    op.add_column("outcomes", sa.Column("expires_at", moment, nullable=True))
    op.create_table(
        "questions",
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("gold_key", sa.Text(), nullable=True),
        sa.Column("basis", sa.String(16), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.Column("weigh_at", moment, nullable=True),
        sa.PrimaryKeyConstraint("hash", name=op.f("pk_questions")),
    )
    op.create_index("ix_questions_weigh_at", "questions", ["weigh_at"])
    op.create_table(
        "quarantines",
        sa.Column("owner_hash", sa.String(64), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.PrimaryKeyConstraint("owner_hash", name=op.f("pk_quarantines")),
    )
    op.create_table(
        "erased_votes",
        sa.Column("owner_hash", sa.String(64), nullable=False),
        sa.Column("judged", sa.Integer(), nullable=False),
        sa.Column("wrong", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("owner_hash", name=op.f("pk_erased_votes")),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_action", "audit", ["action"])
    _weigh(op.get_bind())


def _weigh(connection: sa.Connection) -> None:
    """What was taught before counts by its source, as from now on. Golds that contradict each other already stay in
    the queue until the next verdict on their question."""
    for source, trust in SOURCE_TRUST.items():
        for table in (_origins, _outcomes):
            connection.execute(sa.update(table).where(table.c.source == source).values(trust=trust))
    connection.execute(sa.update(_outcomes).where(_outcomes.c.task_id.is_not(None)).values(became="queued"))
    seen: set[str] = set()
    last = ""
    look = sa.select(_tasks.c.id, _tasks.c.messages, _tasks.c.gold, _tasks.c.created_at).order_by(_tasks.c.id)
    while rows := connection.execute(look.where(_tasks.c.id > last).limit(_BATCH)).all():
        last = rows[-1].id
        hashes = [question_hash(row.messages) for row in rows]
        connection.execute(
            sa.update(_tasks)
            .where(_tasks.c.id == sa.bindparam("its_id"))
            .values(question_hash=sa.bindparam("its_hash"), gold_key=sa.bindparam("its_key")),
            [
                {"its_id": row.id, "its_hash": digest, "its_key": plain_key(row.gold)}
                for row, digest in zip(rows, hashes, strict=True)
            ],
        )
        new: dict[str, Any] = {
            digest: row.created_at for row, digest in zip(rows, hashes, strict=True) if digest not in seen
        }
        seen |= new.keys()
        if new:
            made = [{"hash": digest, "basis": "", "who": "", "reason": "", "at": at} for digest, at in new.items()]
            connection.execute(sa.insert(_questions), made)
