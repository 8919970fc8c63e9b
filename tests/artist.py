"""A runner of programs that draws and writes without running any: what the chat and the endpoint show is under test."""

from __future__ import annotations

import io
from typing import Any, Literal

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from PIL import Image, ImageDraw
from pydantic import ConfigDict

from tools.context import context_of
from tools.workspace import Workspaces


def figure(text: str = "sales") -> bytes:
    """A PNG of a bar chart."""
    image = Image.new("RGB", (480, 300), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 10), text, fill="black")
    for number, height in enumerate((60, 120, 90, 200)):
        draw.rectangle((60 + 100 * number, 270 - height, 120 + 100 * number, 270), fill="teal")
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


class Artist(BaseTool):
    """Adds up the conversation's .csv files, draws them and writes the sum, and a page with a script in it."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str = "code"
    description: str = "Draw."
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    workspaces: Workspaces

    async def _arun(self, code: str, config: RunnableConfig) -> tuple[str, dict[str, Any]]:
        conversation = context_of(config).conversation_id
        given = self.workspaces.load(conversation)
        lines = [line for file in given if file.name.endswith(".csv") for line in file.data.decode().split()]
        total = sum(int(line) for line in lines)
        written = [
            self.workspaces.write(conversation, "total.txt", str(total).encode()),
            self.workspaces.write(conversation, "<img src=x onerror=alert(1)>.html", b"<script>alert(1)</script>"),
        ]
        drawn = self.workspaces.write_image(conversation, figure())
        return str(total), {
            "files": [{"name": file.name, "bytes": file.bytes, "media_type": file.media_type} for file in written],
            "images": [{"name": drawn, "media_type": "image/png"}],
            "sources": [
                {
                    "title": "Sales <b>2024</b> ](javascript:alert(1))",
                    "url": "https://example.org/sales_(a)",
                    "source": "Example",
                },
                {"title": "Prices", "url": "javascript:alert(1)", "source": "Price list", "retrieved_at": "2026-01-02"},
            ],
        }

    def _run(self, code: str) -> tuple[str, dict[str, Any]]:
        raise NotImplementedError("asynchronous only")
