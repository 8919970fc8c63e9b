"""`whetstone ask`: one question from the terminal, with the same agent, engine and record as the server."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Annotated

import typer

from app.commands import console
from app.commands.console import AsJson

if TYPE_CHECKING:
    from app.service import Finished
    from app.settings import Settings


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    version: Annotated[str | None, typer.Option(help="Ask this version instead of the one in service.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question, showing the steps; the turn is recorded."""
    if not question.strip():
        raise console.fail('the question is empty: write it in quotes, as in: whetstone ask "What is 17 * 23?"')
    settings = console.settings()
    from app.runtime import CantStart
    from feedback_store import StoreError
    from serving.engines.base import EngineError
    from serving.manifest import CorruptVersion

    try:
        asyncio.run(_ask(settings, question, version, as_json))
    except (CantStart, StoreError, EngineError, CorruptVersion) as error:
        raise console.fail(str(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None  # the turn is in the record, as cancelled


async def _ask(settings: Settings, question: str, version: str | None, as_json: bool) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from contextlib import aclosing

    from app.runtime import running_service
    from app.service import Finished, Question
    from serving.engines.base import Sampling
    from serving.trajectory import AnswerText, ToolCall, ToolResult

    sampling = Sampling(settings.temperature, settings.top_p, settings.max_tokens)
    asked = Question("local", [{"role": "user", "content": question}], sampling, version=version)
    with console.err.status("Starting …") as status:
        async with running_service(settings, lambda stage: status.update(f"{stage} …")) as service:
            status.update("Thinking …")
            async with aclosing(service.answer(asked)) as events:
                async for event in events:
                    match event:
                        case ToolCall(tool, text) if not as_json:
                            console.out.print(f"[dim]{tool}>[/] {console.escaped(text)}")
                        case ToolResult(observation) if not as_json:
                            console.out.print(f"[dim]{console.escaped(observation.text)}[/]")
                        case AnswerText():
                            status.stop()
                        case Finished():
                            _show(event, as_json)


def _show(finished: Finished, as_json: bool) -> None:
    from app.citations import sources_of

    if as_json:
        from app.api import wire

        answered = wire.Answered(logprobs=False)
        answered.feed(finished)
        console.print_json(wire.completion([answered]).model_dump(exclude_unset=True))
        return
    console.out.print(console.escaped(finished.trajectory.answer) or "[dim]The model gave no answer.[/]")
    for source in sources_of(finished.trajectory):
        whose = source.url or source.source
        console.out.print(
            f"[dim]{source.number}. {console.escaped(f'{source.title} ({whose})' if whose else source.title)}[/]"
        )
    console.out.print(f"[dim]{finished.started.version} · {finished.started.turn_id}[/]")
