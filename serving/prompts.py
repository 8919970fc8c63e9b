"""Prompts rendered off the event loop: a long one takes most of a second, in which no answer would go on."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

from serving.terms import Terms

if TYPE_CHECKING:
    from serving.agent import Agent


class PromptRenderer:
    """`Agent.render` in one thread, with a dialect of its own: a tokenizer isn't for several threads."""

    def __init__(self, agent: Agent) -> None:
        self._agent = copy(agent)
        self._agent.dialect = deepcopy(agent.dialect)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")

    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        allowed: Collection[str] | None = None,
        terms: Terms | None = None,
    ) -> list[int]:
        """Raises PromptTooLong, ToolsTooLong. Prompts wait for each other, and nothing else waits for them."""
        render = partial(self._agent.render, messages, allowed, terms or Terms())
        return await asyncio.get_running_loop().run_in_executor(self._thread, render)
