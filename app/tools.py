"""The deployment's tools, made from the settings: what answers, training and evaluation all call."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from langchain_core.tools import BaseTool

from app.settings import Settings
from tools.audit import audit_file
from tools.custom import load_tools
from tools.python import Bubblewrap, Limits, PythonBackend, PythonTool
from tools.search import SearchOptions, open_search
from tools.toolbox import Toolbox
from tools.workspace import Workspaces

log = logging.getLogger(__name__)


@contextmanager
def open_toolbox(
    settings: Settings,
    search_backends: Sequence[str] | None = None,
    workspaces: Workspaces | None = None,
    audit: bool = False,
    warm: bool = False,
    only: Collection[str] | None = None,
) -> Iterator[Toolbox]:
    """Python, search, the page opener if it is on, the operator's own tools, and those of MCP servers.

    Blocks for some seconds; what was started ends with the block. `search_backends` instead of the settings' own;
    `workspaces` keep the files of conversations; `audit` writes the audit, if the settings have one; `warm` has Python
    start at once instead of at its first call; `only` leaves all other tools out, and starts no server without one.
    Raises ValueError and OSError with the way out: a setting that can't be used, an index that can't be built. An MCP
    server that is down costs a warning.
    """
    with ExitStack() as stack:
        write = stack.enter_context(audit_file(settings.home / "audit.jsonl")) if audit and settings.audit else None
        backend = stack.enter_context(open_python(settings, warm))
        own = [_python(backend, settings, workspaces), _search(settings, search_backends)]
        if settings.open_pages:
            from tools.fetch import FetchTool

            own.append(FetchTool(timeout_s=settings.fetch_seconds, max_bytes=settings.fetch_bytes))
        toolbox = Toolbox(own, settings.tool_calls_per_owner, write)
        toolbox.add(load_tools(settings.tools))
        servers = {
            name: server
            for name, server in settings.mcp_servers.items()
            if only is None or any(tool.startswith(f"{name}_") for tool in only)
        }
        if servers:
            from tools.mcp import McpServers  # half a second of imports, for those who have one

            stack.enter_context(McpServers(servers, toolbox))
        if only is None:
            _look_for_unknown(settings, toolbox)
        else:
            toolbox.discard(set(toolbox.names()) - set(only))
        yield toolbox


def tool_seconds(settings: Settings) -> float:
    """What one call may take, waiting included."""
    if settings.tool_seconds is not None:
        return settings.tool_seconds
    fetch = [settings.fetch_seconds] if settings.open_pages else []
    return 2 * max(settings.python_seconds, settings.search_seconds, *fetch)


@contextmanager
def open_python(settings: Settings, warm: bool = False) -> Iterator[PythonBackend]:
    """What runs the model's programs, with the settings' limits; it ends with the block.

    With `warm` interpreters begin to start at once. Raises ValueError for a package that isn't installed.
    """
    limits = replace(
        Limits(),
        wall_s=settings.python_seconds,
        cpu_s=max(1, min(Limits.cpu_s, round(settings.python_seconds))),
        memory_bytes=settings.python_memory_mb << 20,
        files_bytes=settings.files_mb << 20,
        file_bytes=settings.files_mb << 20,  # what can be uploaded can be read
    )
    if settings.python_backend == "container":
        from tools.python.container import ContainerBackend  # its client is an extra

        container = ContainerBackend(
            limits,
            image=settings.container_image,
            runtime=settings.container_runtime,
            packages=settings.python_packages,
            pool=settings.python_pool,
            running=settings.python_running,
        )
        with closing(container):
            yield container
        return
    bubblewrap = Bubblewrap(
        limits,
        settings.python_packages,
        idle=settings.python_pool,
        running=settings.python_running,
        total_memory=settings.python_total_mb << 20,
        unsafe_without_sandbox=settings.unsafe_without_sandbox,
    )
    with closing(bubblewrap):
        if warm:
            bubblewrap.warm()
        yield bubblewrap


def _python(backend: PythonBackend, settings: Settings, workspaces: Workspaces | None) -> BaseTool:
    keep_state = settings.python_state == "conversation"
    return PythonTool(backend=backend, workspaces=workspaces, keep_state=keep_state)


def _search(settings: Settings, backends: Sequence[str] | None) -> BaseTool:
    options = SearchOptions(
        backends=backends or settings.search_backends,
        timeout_s=settings.search_seconds,
        region=settings.search_region,
        safe=settings.search_safe,
        age=settings.search_age,
        news=settings.search_news,
        cache_s=settings.search_cache_seconds,
        per_minute=settings.search_per_minute,
        searxng_url=settings.searxng_url,
        max_results=settings.search_results,
        max_chars=600 * settings.search_results,
    )
    return open_search(settings.home, options, settings.documents)


def _look_for_unknown(settings: Settings, toolbox: Toolbox) -> None:
    """Tell of names in key_tools that no tool has; a server that is down may bring them yet."""
    for owner, names in settings.key_tools.items():
        if unknown := [name for name in names if name not in toolbox]:
            log.warning(
                "key_tools of %s names %r, and no tool is called that: the tools are %s",
                owner,
                unknown[0],
                ", ".join(toolbox.names()),
            )
