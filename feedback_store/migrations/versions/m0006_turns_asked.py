"""A turn keeps what its client asked beside the messages, so that a response can be read back and gone on from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("turns", sa.Column("asked", sa.JSON(), nullable=True))
