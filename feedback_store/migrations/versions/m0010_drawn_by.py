"""A step tells which versions drew its tokens, where full weights were changed under it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("steps", sa.Column("drawn_by", sa.JSON(), nullable=True))
