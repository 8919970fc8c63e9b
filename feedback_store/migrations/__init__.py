"""Alembic scripts, run by `feedback_store.migrate`. Forward only: the way back is the copy made before."""
