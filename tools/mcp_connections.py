"""How an MCP server is named in the settings, checked before anything is started."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from langchain_mcp_adapters.sessions import (
    Connection,
    SSEConnection,
    StdioConnection,
    StreamableHttpConnection,
    WebsocketConnection,
)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
_KINDS: dict[str, Any] = {
    "stdio": StdioConnection,
    "sse": SSEConnection,
    "streamable_http": StreamableHttpConnection,
    "http": StreamableHttpConnection,
    "websocket": WebsocketConnection,
}
_NOT_SETTINGS = {"session_kwargs", "httpx_client_factory", "auth"}  # Python objects: a file can't hold them


class BadServer(ValueError):
    """A setting of `mcp_servers` that can't be used. The message names it and says the way out."""


def connection_of(name: str, given: Mapping[str, Any]) -> Connection:
    """A connection as the adapter takes it, the transport made out where it isn't named. Raises BadServer."""
    if not _NAME.fullmatch(name):
        raise BadServer(f"mcp_servers has {name!r}: a server's name has 1 to 32 of the characters A-Z a-z 0-9 _ -.")
    connection = dict(given)
    found = "stdio" if "command" in connection else "streamable_http" if "url" in connection else ""
    kind = str(connection.setdefault("transport", found)).replace("-", "_")
    if kind not in _KINDS:
        raise BadServer(
            f"mcp_servers.{name} has the transport {kind!r}: give it `command` and `args` (a program to start), or "
            f"`url`; transport is one of {', '.join(_KINDS)}."
        )
    if kind == "stdio":
        connection.setdefault("args", [])
    connection["transport"] = kind
    known = set(_KINDS[kind].__annotations__) - _NOT_SETTINGS
    if unknown := sorted(set(connection) - known):
        raise BadServer(f"mcp_servers.{name} has {unknown[0]!r}; a {kind} server takes {', '.join(sorted(known))}.")
    needed = "command" if kind == "stdio" else "url"
    if not isinstance(connection.get(needed), str) or not connection[needed]:
        raise BadServer(f"mcp_servers.{name} needs `{needed}`, a text.")
    if needed == "url":
        schemes = ("ws://", "wss://") if kind == "websocket" else ("http://", "https://")
        if not connection["url"].lower().startswith(schemes):
            raise BadServer(f"mcp_servers.{name}: `url` is {connection['url'][:200]!r}; it begins with {schemes[0]}.")
    arguments, tables = connection.get("args", []), [connection.get(key) or {} for key in ("env", "headers")]
    texts = [*arguments] if isinstance(arguments, list) else [None]
    texts += [text for table in tables for text in (table.values() if isinstance(table, dict) else [None])]
    if not all(isinstance(text, str) for text in texts):
        raise BadServer(f"mcp_servers.{name}: `args` is a list of texts, `env` and `headers` are tables of texts.")
    return cast(Connection, connection)
