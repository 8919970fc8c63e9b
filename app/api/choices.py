"""Several answers to one request, side by side: each is begun, then their events come as they happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import anyio

from app.service import Question, ServiceEvent, Started, new_request_id

_APART = 1009  # between the seeds of two answers: more than an answer has generations, which count on from its seed


def questions(question: Question, n: int) -> list[Question]:
    """`n` questions that differ in their seeds, if there is one, and are turns of their own."""
    seed = question.sampling.seed
    return [
        question
        if not index
        else replace(
            question,
            request_id=new_request_id(),
            sampling=replace(question.sampling, seed=None if seed is None else seed + _APART * index),
        )
        for index in range(n)
    ]


async def begin(answers: Sequence[AsyncGenerator[ServiceEvent]]) -> list[Started]:
    """Wait until each has its turn. When one is refused, all are closed, and its error is raised."""
    started = []
    try:
        for answer in answers:
            event = await anext(answer)
            assert isinstance(event, Started)
            started.append(event)
    except BaseException:
        with anyio.CancelScope(shield=True):
            for answer in answers:
                await answer.aclose()
        raise
    return started


async def together(answers: Sequence[AsyncGenerator[ServiceEvent]]) -> AsyncGenerator[tuple[int, ServiceEvent]]:
    """The events of begun answers, each with its answer's index. The first error ends them all, and so does closing."""
    events: asyncio.Queue[tuple[int, ServiceEvent | Exception | None]] = asyncio.Queue(maxsize=len(answers))

    async def follow(index: int, answer: AsyncGenerator[ServiceEvent]) -> None:
        last: Exception | None = None
        try:
            async with aclosing(answer):
                async for event in answer:
                    await events.put((index, event))
        except Exception as error:
            last = error
        await events.put((index, last))

    tasks = [asyncio.create_task(follow(index, answer)) for index, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            index, event = await events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                left -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)
