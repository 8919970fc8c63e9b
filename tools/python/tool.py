"""The tool "code": what the policy reads after it ran a program."""

from __future__ import annotations

import asyncio
import signal
from typing import Any, Literal

from langchain_core.tools import BaseTool
from pydantic import BaseModel, Field

from tools.python.sandbox import Limits, PythonResult, SandboxUnavailable, run_python


class CodeInput(BaseModel):
    code: str = Field(description="A Python program. What it prints, and the value of its last line, come back.")


class PythonTool(BaseTool):
    """Runs a program in a sandbox. The artifact has `error`, `exit_code`, `timed_out`, `truncated`, `seconds`."""

    name: str = "code"
    description: str = "Run a Python program (standard library only, no network) and read what it prints."
    args_schema: type[BaseModel] = CodeInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    limits: Limits = Limits()
    unsafe_without_sandbox: bool = False

    async def _arun(self, code: str, **_: Any) -> tuple[str, dict[str, Any]]:
        try:
            result = await run_python(code, self.limits, unsafe_without_sandbox=self.unsafe_without_sandbox)
        except SandboxUnavailable as error:
            return f"SandboxUnavailable: {error}", {"error": True, "sandbox": False}
        artifact = {
            "error": result.exit_code != 0 or result.timed_out or result.truncated,
            "exit_code": result.exit_code,
            "timed_out": result.timed_out,
            "truncated": result.truncated,
            "seconds": result.seconds,
        }
        return observation(result, self.limits), artifact

    def _run(self, code: str, **_: Any) -> tuple[str, dict[str, Any]]:
        return asyncio.run(self._arun(code))


def observation(result: PythonResult, limits: Limits) -> str:
    """The output, and a line on how the program ended unless it ended well."""
    lines = [result.text.strip("\n")] if result.text.strip() else []
    if result.timed_out:
        lines.append(f"Timed out: a program has {limits.wall_s:g} s, {limits.cpu_s} of them on the processor.")
    elif result.truncated:
        lines.append(f"Stopped: a program may print {limits.output_bytes} bytes.")
    elif result.exit_code > 128:
        lines.append(f"Killed by {_signal_name(result.exit_code - 128)}.")
    elif not lines:
        ended = "" if result.exit_code == 0 else f", exit code {result.exit_code}"
        lines.append(f"No output{ended}. Print the result.")
    return "\n".join(lines)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
