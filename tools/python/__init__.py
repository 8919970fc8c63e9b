"""Python for the policy: sandboxed interpreters, and the tool that wraps them."""

from tools.python.backend import File, Limits, PythonBackend, PythonResult, SandboxUnavailable
from tools.python.sandbox import Bubblewrap
from tools.python.tool import PythonTool

__all__ = ["Bubblewrap", "File", "Limits", "PythonBackend", "PythonResult", "PythonTool", "SandboxUnavailable"]
