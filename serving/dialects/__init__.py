"""Dialects: how a policy writes its actions, and how what comes back is put into its context."""

from typing import Any, Literal

from serving.dialects.base import Dialect, Parsed
from serving.dialects.native import NativeDialect
from serving.dialects.tapo import TapoDialect

DialectName = Literal["tapo", "native"]
DIALECTS: dict[str, type[NativeDialect] | type[TapoDialect]] = {"tapo": TapoDialect, "native": NativeDialect}

__all__ = ["DIALECTS", "Dialect", "DialectName", "NativeDialect", "Parsed", "TapoDialect", "make_dialect"]


def make_dialect(name: DialectName, tokenizer: Any) -> Dialect:
    """Raises ValueError, with the way out, when the model's tokenizer or template doesn't suit the dialect."""
    return DIALECTS[name](tokenizer)
