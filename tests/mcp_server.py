"""An MCP server for tests: `python mcp_server.py stdio`, or `http PORT` on the loopback."""

import os
import sys
import time

from mcp.server.fastmcp import FastMCP, Image

STDIO = {"command": sys.executable, "args": [__file__, "stdio"]}  # how it is named in the settings
server = FastMCP("test", port=int(sys.argv[2]) if sys.argv[1:2] == ["http"] else 0, log_level="ERROR")


@server.tool()
def add(a: int, b: int = 1) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def echo(config: str, runtime: str = "", self: str = "") -> str:
    """Say what was given, under names that a caller might use itself."""
    return f"{config} {runtime} {self}"


@server.tool()
def fail() -> str:
    """Raise."""
    raise ValueError("it is broken")


@server.tool(structured_output=False)
def picture() -> list[object]:
    """A text and an image."""
    return ["drawn", Image(data=b"\x89PNG", format="png")]


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(1)


@server.tool()
def hang(seconds: float) -> str:
    """Take long."""
    time.sleep(seconds)
    return "late"


@server.tool(name="bad name!")
def unnamed() -> str:
    """Its name can't be used."""
    return ""


@server.tool()
def environment() -> str:
    """The names of the variables that the server has."""
    return " ".join(sorted(os.environ))


if __name__ == "__main__":
    server.run("stdio" if sys.argv[1] == "stdio" else "streamable-http")
