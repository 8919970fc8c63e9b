"""The tool "fetch": opens a page and gives its readable text."""

from __future__ import annotations

import asyncio
import re
import ssl
from datetime import UTC, datetime
from typing import Any, Literal

import httpcore
from langchain_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict, Field

from tools.documents import DocumentReader, Reading, Unreadable
from tools.fetch.guard import Guard, Refused
from tools.fetch.page import Page, PageError, open_page
from tools.text import clean

_BARE = re.compile(r"[\w-]+(\.[\w-]+)*\.[a-z]{2,}(:\d+)?([/?#].*)?", re.IGNORECASE)


class FetchInput(BaseModel):
    url: str = Field(description="The address of a web page, beginning with https://.")


class FetchTool(BaseTool):
    """Nothing is raised: what went wrong is the text, and `error` in the artifact.

    The artifact has `error`, `sources` (one, or none after an error), `status` (None if no server answered),
    `media_type`, `bytes` (decompressed), `truncated` (by bytes or by characters) and `redirects` (the addresses before
    the last). `timeout_s` counts reading too. `trust` and `network` replace the certificate authorities and the
    sockets, for tests.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str = "fetch"
    description: str = "Open a web page by its address and read its text."
    args_schema: type[BaseModel] = FetchInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    timeout_s: float = 10.0
    max_bytes: int = 2_000_000
    max_chars: int = 4_000
    guard: Guard = Guard()
    trust: ssl.SSLContext | None = None
    network: httpcore.AsyncNetworkBackend | None = None

    async def _arun(self, url: str, **_: Any) -> tuple[str, dict[str, Any]]:
        address = _address(url)
        reader = DocumentReader(timeout_s=self.timeout_s)
        status: int | None = None
        try:
            self.guard.check_url(address)
            reader.start()  # it gets ready while the page is on its way
            async with asyncio.timeout(self.timeout_s):
                page = await open_page(
                    address,
                    self.guard,
                    timeout_s=self.timeout_s,
                    max_bytes=self.max_bytes,
                    trust=self.trust,
                    network=self.network,
                )
                status = page.status
                reading = await asyncio.to_thread(reader.read, page.data, page.media_type, page.charset)
        except Refused as error:
            return self._failed(f"Refused: {error}", status)
        except PageError as error:
            return self._failed(f"{_shown(address)} {error}.", error.status)
        except Unreadable as error:
            return self._failed(f"{_shown(address)} {error}.", status)
        except TimeoutError:  # an OSError too
            return self._failed(f"{_shown(address)} takes more than {self.timeout_s:g} s.", status)
        except OSError as error:
            return self._failed(f"{_shown(address)} wasn't read: no process can be started ({error}).", status)
        finally:
            reader.close()
        return self._opened(page, reading)

    def _run(self, url: str, **_: Any) -> tuple[str, dict[str, Any]]:
        return asyncio.run(self._arun(url))

    def _opened(self, page: Page, reading: Reading) -> tuple[str, dict[str, Any]]:
        host = page.url.split("/")[2]
        title = reading.title or host
        text = _tidy(reading.text if reading.text.startswith(title) else f"{title}\n\n{reading.text}")
        truncated = page.truncated or bool(reading.cut) or len(text) > self.max_chars
        if len(text) > self.max_chars:
            text = text[: max(self.max_chars - 4, 1)].rsplit(None, 1)[0] + " ..."
        source = {
            "title": title[:300],
            "url": page.url,
            "source": host,
            "retrieved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return text, {
            "error": False,
            "sources": [source],
            "status": page.status,
            "media_type": page.media_type,
            "bytes": len(page.data),
            "truncated": truncated,
            "redirects": list(page.redirects),
        }

    def _failed(self, text: str, status: int | None) -> tuple[str, dict[str, Any]]:
        artifact = {"error": True, "sources": [], "status": status, "media_type": "", "bytes": 0, "truncated": False}
        return _tidy(text)[: self.max_chars], artifact | {"redirects": []}


def _address(text: str) -> str:
    """What was meant: without quotes around it, and with the scheme that a person leaves out."""
    url = text.strip().strip("<>\"'`").strip()
    return f"https://{url}" if _BARE.fullmatch(url) else url


def _shown(url: str) -> str:
    return url if len(url) <= 200 else url[:200] + "..."


def _tidy(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", clean(text)).strip()
