"""Who a tool works for. It travels in LangChain's run configuration, so that any tool can read it.

A tool of one's own takes it as `config: RunnableConfig` and asks `context_of(config)`.
"""

from __future__ import annotations

from dataclasses import dataclass

from langchain_core.runnables import RunnableConfig

_KEY = "whetstone"


@dataclass(frozen=True)
class ToolContext:
    """The owner and the conversation that a call belongs to; both are empty in training and evaluation.

    `turn_id` is the answer that the call is part of, for the audit line.
    """

    owner: str = ""
    conversation_id: str = ""
    turn_id: str = ""


NOBODY = ToolContext()


def config_of(context: ToolContext) -> RunnableConfig:
    return {"configurable": {_KEY: context}}


def context_of(config: RunnableConfig | None) -> ToolContext:
    found = ((config or {}).get("configurable") or {}).get(_KEY)
    return found if isinstance(found, ToolContext) else NOBODY
