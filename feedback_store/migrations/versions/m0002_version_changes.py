"""Which version serves becomes a history of changes with their reasons, in place of one row that is overwritten."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "version_changes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version_id", sa.String(length=100), nullable=False),
        sa.Column("previous", sa.String(length=100), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name=op.f("fk_version_changes_version_id_versions")),
        sa.ForeignKeyConstraint(["previous"], ["versions.id"], name=op.f("fk_version_changes_previous_versions")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_version_changes")),
    )
    op.execute(
        "INSERT INTO version_changes (version_id, previous, reason, at) "
        "SELECT version_id, NULL, 'in service before changes were recorded', since FROM current_version"
    )
    op.drop_table("current_version")
