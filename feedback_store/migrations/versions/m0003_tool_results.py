"""Tool results move out of the steps: each is kept once under its content's hash, and can be looked up by its call."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

from feedback_store.errors import StoreError
from feedback_store.records import StoredObservation
from feedback_store.schema import UtcTime
from feedback_store.tool_results import as_stored, call_hash, put_result, result_hash

revision = "0003"
down_revision = "0002"

_BATCH = 500

_steps = sa.table(
    "steps",
    sa.column("turn_id", sa.String),
    sa.column("position", sa.Integer),
    sa.column("input", sa.Text),
    sa.column("tool", sa.Text),
    sa.column("observation", sa.Text),
    sa.column("observation_error", sa.Boolean),
    sa.column("observation_artifact", sa.JSON),
    sa.column("result_hash", sa.String),
    sa.column("call_hash", sa.String),
    sa.column("created_at", UtcTime),
)


def upgrade() -> None:
    op.create_table(
        "tool_results",
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("tool", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("error", sa.Boolean(), nullable=False),
        sa.Column("artifact", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("hash", name=op.f("pk_tool_results")),
    )
    op.add_column("steps", sa.Column("result_hash", sa.String(length=64), nullable=True))
    op.add_column("steps", sa.Column("call_hash", sa.String(length=64), nullable=True))
    _move_results(op.get_bind())
    with op.batch_alter_table("steps") as steps:
        for name in ("tool", "observation", "observation_error", "observation_artifact"):
            steps.drop_column(name)
        steps.create_foreign_key(op.f("fk_steps_result_hash_tool_results"), "tool_results", ["result_hash"], ["hash"])
    op.create_index(op.f("ix_steps_call_hash_created_at"), "steps", ["call_hash", "created_at"], unique=False)
    op.create_index(op.f("ix_steps_result_hash"), "steps", ["result_hash"], unique=False)


def _move_results(connection: sa.Connection) -> None:
    """Batch by batch along the primary key, so that a large record needs no large memory."""
    c = _steps.c
    columns = [column for column in c if column.name not in ("observation_artifact", "result_hash", "call_hash")]
    page = (
        # as text: a row that isn't JSON shall be named
        sa.select(*columns, sa.cast(c.observation_artifact, sa.Text).label("artifact"))
        .where(c.tool.is_not(None))
        .order_by(c.turn_id, c.position)
        .limit(_BATCH)
    )
    link = (
        sa.update(_steps)
        .where(c.turn_id == sa.bindparam("of_turn"), c.position == sa.bindparam("at"))
        .values(result_hash=sa.bindparam("result"), call_hash=sa.bindparam("call"))
    )
    after: tuple[str, int] | None = None
    while True:
        beyond = page if after is None else page.where(sa.tuple_(c.turn_id, c.position) > sa.tuple_(*after))
        rows = connection.execute(beyond).all()
        if not rows:
            return
        links = []
        for row in rows:
            result = _result(row)
            put_result(connection, result, row.created_at)
            links.append(
                {
                    "of_turn": row.turn_id,
                    "at": row.position,
                    "result": result_hash(result),
                    "call": call_hash(result.tool, row.input),
                }
            )
        connection.execute(link, links)
        after = rows[-1].turn_id, rows[-1].position


def _result(row: Any) -> StoredObservation:
    try:
        artifact = json.loads(row.artifact) if row.artifact else {}
    except ValueError as error:
        raise StoreError(f"The artifact of step {row.position} of turn {row.turn_id} isn't JSON ({error}).") from error
    return as_stored(
        StoredObservation(row.tool, row.observation or "", bool(row.observation_error), artifact or {}, 0.0)
    )
