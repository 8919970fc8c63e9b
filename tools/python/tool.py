"""The tool "code": what the policy reads after it ran a program, and what people get of it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict, Field

from tools.context import ToolContext, context_of
from tools.python.backend import File, Limits, PythonResult, SandboxUnavailable
from tools.python.sandbox import Bubblewrap
from tools.workspace import WorkspaceError, Workspaces

_NAMED = 10  # files that an observation names


@cache
def _shared() -> Bubblewrap:
    return Bubblewrap()


class CodeInput(BaseModel):
    code: str = Field(description="A Python program. What it prints, and the value of its last line, come back.")


class PythonTool(BaseTool):
    """Runs a program in `backend`, by default a process-wide bubblewrap.

    In a conversation, its files lie in the working folder, and what the program writes or draws is kept with them;
    without one (training, evaluation) nothing is kept. With `keep_state`, the variables live on through a conversation.
    The artifact has `error`, `exit_code`, `timed_out`, `truncated`, `seconds`, `files` and `images`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str = "code"
    description: str = "Run a Python program (no network) and read what it prints."
    args_schema: type[BaseModel] = CodeInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    backend: Any = Field(default_factory=_shared)  # a PythonBackend: pydantic can't check a protocol's methods
    workspaces: Workspaces | None = None
    keep_state: bool = False

    async def _arun(self, code: str, config: RunnableConfig, **_: Any) -> tuple[str, dict[str, Any]]:
        context = context_of(config)
        kept = self.workspaces if context.conversation_id else None
        files: list[File] = []
        session = None
        try:
            if kept is not None:
                files = await asyncio.to_thread(kept.load, context.conversation_id)
                if self.keep_state:
                    session = f"{context.owner}/{context.conversation_id}"
            result = await self.backend.run(code, files, session)
        except SandboxUnavailable as error:
            return f"SandboxUnavailable: {error}", {"error": True, "sandbox": False}
        notes: list[str] = []
        if session is not None and result.fresh and "NameError" in result.text:
            notes.append("The interpreter is new: it has no variables of earlier programs.")
        artifact: dict[str, Any] = {
            "error": result.exit_code != 0 or result.timed_out,
            "exit_code": result.exit_code,
            "timed_out": result.timed_out,
            "truncated": result.truncated,
            "seconds": round(result.seconds, 4),
        }
        if kept is not None and (result.files or result.images):
            artifact["files"], artifact["images"], refused = await asyncio.to_thread(_keep, kept, context, result)
            notes += refused
        written = artifact.get("files") if kept is not None else [{"name": file.name} for file in result.files]
        return observation(result, self.backend.limits, [one["name"] for one in written or []], notes), artifact

    def _run(self, code: str, config: RunnableConfig, **_: Any) -> tuple[str, dict[str, Any]]:
        return asyncio.run(self._arun(code, config))


def _keep(
    workspaces: Workspaces, context: ToolContext, result: PythonResult
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """What was kept of a program's files and figures, and why anything else wasn't."""
    files, images, refused = [], [], []
    for file in result.files:
        try:
            kept = workspaces.write(context.conversation_id, file.name, file.data)
            files.append({"name": kept.name, "bytes": kept.bytes, "media_type": kept.media_type})
        except (WorkspaceError, OSError) as error:
            refused.append(f"The file {file.name} wasn't kept: {error}")
    for number, png in enumerate(result.images, start=1):
        try:
            name = workspaces.write_image(context.conversation_id, png)
            images.append({"name": name, "media_type": "image/png"})
        except (WorkspaceError, OSError) as error:
            refused.append(f"Figure {number} wasn't kept: {error}")
    return files, images, refused


def observation(result: PythonResult, limits: Limits, written: Sequence[str], notes: Sequence[str]) -> str:
    """The output, a line on what was drawn and written, and a line on how the program ended unless it ended well."""
    lines = [result.text.strip("\n")] if result.text.strip() else []
    if result.images:
        lines.append(f"Drew {len(result.images)} figure{'s' if len(result.images) > 1 else ''}.")
    if written:
        more = f" and {len(written) - _NAMED} more" if len(written) > _NAMED else ""
        lines.append("Wrote " + ", ".join(written[:_NAMED]) + more + ".")
    lines += notes
    if result.timed_out:
        lines.append(f"Timed out: a program has {limits.wall_s:g} s, {limits.cpu_s} of them on the processor.")
    elif result.truncated and result.exit_code > 128:
        lines.append(f"Stopped: a program may print {limits.flood_bytes} bytes.")
    elif result.exit_code > 128:
        lines.append(f"Killed by {_signal_name(result.exit_code - 128)}.")
    elif not lines:
        ended = "" if result.exit_code == 0 else f", exit code {result.exit_code}"
        lines.append(f"No output{ended}. Print the result.")
    return "\n".join(lines)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
