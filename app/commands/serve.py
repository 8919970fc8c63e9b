"""`whetstone up`: the chat and the endpoint, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import typer
from rich.panel import Panel
from rich.table import Table

from app.commands import console

if TYPE_CHECKING:
    from app.settings import Settings


def up() -> None:
    """Start the chat and the endpoint. Ctrl-C lets open answers end; a second one doesn't wait for them."""
    settings = console.settings()
    from app.runtime import CantStart
    from app.server import PortTaken

    try:
        asyncio.run(_run(settings))
    except (PortTaken, CantStart) as error:
        raise console.fail(str(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None  # before the servers were up
    console.out.print("Stopped. What was said is in the record.", style="dim")


async def _run(settings: Settings) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from app import logs
    from app.runtime import running_service
    from app.server import bind, serve

    logs.set_up(settings)

    for port in (settings.api_port, settings.web_port):
        bind(settings.host, port).close()  # a taken port is told now, not after the model is prepared
    with console.out.status("Starting …") as status:
        async with running_service(settings, lambda stage: status.update(f"{stage} …")) as service:
            status.update("Opening the chat …")
            from app.api.app import create_app
            from app.retention import tidying
            from app.web.app import create_web

            apps = {settings.api_port: create_app(service, settings), settings.web_port: create_web(service, settings)}

            def ready() -> None:
                status.stop()
                console.out.print(_panel(settings, service.router.current))

            def stopping() -> None:
                left = service.in_flight
                waiting = (
                    f" {left} answer{'s' if left > 1 else ''} may end first; Ctrl-C again to cut short." if left else ""
                )
                console.out.print(f"Stopping.{waiting}", style="dim")

            async with tidying(service.store, settings):
                await serve(apps, settings, ready, stopping)


def _panel(settings: Settings, version: str) -> Panel:
    from app.owners import owner_of

    host = settings.display_host
    rows = Table.grid(padding=(0, 2))
    rows.add_row("Chat", f"[bold link]http://{host}:{settings.web_port}[/]")
    rows.add_row("Endpoint", f"[bold]http://{host}:{settings.api_port}/v1[/]  model [bold]{settings.model_name}[/]")
    rows.add_row("Serving", version)
    rows.add_row("Record", str(settings.store_path))
    for key in settings.api_keys:
        rows.add_row("Login", f"user [bold]{owner_of(key.get_secret_value().encode())}[/], its API key as the password")
    rows.add_row("", "[dim]Ctrl-C to stop[/]")
    return Panel(rows, title="Whetstone", title_align="left", border_style="cyan", expand=False)
