"""Dialects: how a policy writes its actions, and how what comes back is put into its context."""

from serving.dialects.tapo import TapoDialect

__all__ = ["TapoDialect"]
