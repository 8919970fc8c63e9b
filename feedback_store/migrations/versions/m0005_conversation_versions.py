"""A conversation keeps its version, and another version may be tried on a share of the new ones."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("conversations", sa.Column("version", sa.String(length=100), nullable=True))
    op.add_column("version_changes", sa.Column("moved", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "canary_changes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.String(length=100), nullable=False),
        sa.Column("share", sa.Float(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_canary_changes_version_id_versions")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_canary_changes")),
    )
