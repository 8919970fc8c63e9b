"""The endpoint and the chat on their two ports, in one event loop, until a signal asks to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from starlette.types import ASGIApp

from app.connections import KEEP_ALIVE_SECONDS, PatientH11, raise_open_files
from app.settings import Settings


class PortTaken(RuntimeError):
    """Another program listens on a port that is needed."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.tried = asyncio.Event()  # to start; `started` says whether it did

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.tried.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `serve` below stops both servers together


async def serve(
    apps: Mapping[int, ASGIApp],
    settings: Settings,
    ready: Callable[[], None] = lambda: None,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serve each port's application; returns after SIGINT or SIGTERM, when open requests have ended.

    A second signal stops waiting for them. Raises PortTaken before anything is served.
    """
    raise_open_files()
    with contextlib.ExitStack() as stack:
        sockets = {port: stack.enter_context(bind(settings.host, port)) for port in apps}
        servers = [_Server(uvicorn_config(app, settings)) for app in apps.values()]
        loop = asyncio.get_running_loop()

        def stop() -> None:
            stopping()
            for server in servers:
                server.force_exit = server.should_exit
                server.should_exit = True

        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, stop)
        try:
            async with asyncio.TaskGroup() as group:
                for server, listening in zip(servers, sockets.values(), strict=True):
                    group.create_task(server.serve([listening]))
                await asyncio.gather(*[server.tried.wait() for server in servers])
                if all(server.started for server in servers):
                    ready()
                else:
                    stop()
        finally:
            for sig in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(sig)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortTaken with the setting that moves it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            why = "another program (an earlier Whetstone?) listens there"
        else:
            why = error.strerror or str(error)
        raise PortTaken(
            f"{host}:{port} can't be used: {why}. End it, or choose other ports with WHETSTONE_API_PORT and "
            "WHETSTONE_WEB_PORT."
        ) from error
    return listening


def uvicorn_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        http=PatientH11,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.shutdown_seconds) or 1,
    )
