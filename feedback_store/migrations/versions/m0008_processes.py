"""Processes say that they live, so that others can tell from another machine which turns and runs were left;
and lapsed leases are found by an index."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "processes",
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("process_started", sa.Text(), nullable=False),
        sa.Column("alive_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("host", "pid", "process_started", name=op.f("pk_processes")),
    )
    op.create_index(op.f("ix_tasks_lease_until"), "tasks", ["lease_until"], unique=False)
