"""An operator's own tools: any LangChain tool, by the name of the module that has it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from langchain_core.tools import BaseTool, BaseToolkit, StructuredTool

_LONGEST_NAMED = 200  # characters of an error that isn't ours


class BadTool(ValueError):
    """An entry of the setting `tools` that brings no tool. The message names it and says the way out."""


def load_tools(entries: Sequence[str]) -> list[BaseTool]:
    """The tools that the entries name, in their order; each entry is `package.module:attribute`.

    The attribute is a BaseTool, a list of them, a BaseToolkit, or a function with a docstring, whose annotated
    arguments become the schema. Importing runs the module's code. Raises BadTool.
    """
    return [tool for entry in entries for tool in _load(entry)]


def _load(entry: str) -> list[BaseTool]:
    module_name, colon, attribute = entry.partition(":")
    if not (colon and module_name.strip() and attribute.strip()):
        raise BadTool(f'tools has {entry!r}, which isn\'t "module:name": write it as in "mypackage.mytools:lookup".')
    found = _attribute(entry, module_name.strip(), attribute.strip())
    tools = _tools(entry, found)
    if not tools:
        raise BadTool(f"tools has {entry!r}, which holds no tool: take it out, or put a BaseTool into it.")
    return tools


def _attribute(entry: str, module_name: str, attribute: str) -> Any:
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        raise BadTool(
            f"tools has {entry!r}, but there is no module {missing!r}: install its package into Whetstone's "
            "environment, put its folder on PYTHONPATH, or mend the name."
        ) from error
    except Exception as error:  # the module is the operator's own code
        raise BadTool(f"tools has {entry!r}, whose module fails to load: {_named(error)}. Mend the module.") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise BadTool(
                f"tools has {entry!r}, but {module_name} has no {attribute!r}: mend the name. "
                f"It has {', '.join(_public(importlib.import_module(module_name))) or 'nothing public'}."
            ) from error
    return found


def _public(module: Any) -> list[str]:
    names = [name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)]
    found = {name: getattr(module, name) for name in names}
    own = (None, module.__name__)
    return [n for n, it in found.items() if isinstance(it, BaseTool) or getattr(it, "__module__", None) in own][:12]


def _tools(entry: str, found: Any) -> list[BaseTool]:
    if isinstance(found, BaseTool):
        return [found]
    if isinstance(found, list | tuple):
        return [tool for one in found for tool in _tools(entry, one)]
    make: Callable[[], Any]
    if isinstance(found, BaseToolkit):
        make = found.get_tools
    elif isinstance(found, type) and issubclass(found, BaseTool | BaseToolkit):
        make = found
    elif inspect.iscoroutinefunction(found):
        make = partial(StructuredTool.from_function, coroutine=found)
    elif inspect.isfunction(found):
        make = partial(StructuredTool.from_function, found)
    else:
        raise BadTool(
            f"tools has {entry!r}, which is a {type(found).__name__}: it must be a LangChain tool (BaseTool), a list "
            "of them, a BaseToolkit, or a function with a docstring and annotated arguments."
        )
    try:
        made = make()
    except Exception as error:  # a function without a docstring, a class that wants arguments
        raise BadTool(
            f"tools has {entry!r}, of which no tool can be made: {_named(error)}. A function needs a docstring and "
            "annotated arguments; a class must need no arguments (else name an instance of it)."
        ) from error
    return _tools(entry, list(made) if isinstance(found, BaseToolkit) else made)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_NAMED]
