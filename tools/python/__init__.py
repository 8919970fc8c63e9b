"""Python for the policy: a fresh sandboxed interpreter for every call, and the tool that wraps it."""

from tools.python.sandbox import Limits, PythonResult, SandboxUnavailable, run_python
from tools.python.tool import PythonTool

__all__ = ["Limits", "PythonResult", "PythonTool", "SandboxUnavailable", "run_python"]
