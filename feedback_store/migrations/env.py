"""Alembic's entry: runs the scripts in the transaction that `feedback_store.migrate` hands over."""

from __future__ import annotations

from alembic import context

from feedback_store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
