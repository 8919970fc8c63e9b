"""Errors in OpenAI's shape: every failure that a client can meet, as {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from app.service import Overloaded, ToolClash
from feedback_store import InvalidRecord, NotFound, StoreError
from online_rl.verifiers import BadGold, UnknownVerifier
from serving.agent import ToolsTooLong
from serving.engines.base import EngineError, GrammarFailed, PromptTooLong, UnknownVersion, WeightsRefused
from serving.manifest import CorruptVersion
from tools.workspace import BadName, FileMissing, WorkspaceError, WorkspaceFull

log = logging.getLogger(__name__)


class ApiError(HTTPException):
    """A refusal with OpenAI's fields. `status` decides the type unless `kind` names another."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail=message, headers=headers)
        self.message = message
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else _INVALID),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, headers=self.headers)


_INVALID = "invalid_request_error"
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_RETRY = {"Retry-After": "2"}


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error from below. One that nobody foresaw is logged, and told without detail."""
    match error:
        case ApiError():
            return error
        case ToolClash():
            return ApiError(400, str(error), "invalid_value", "tools")
        case ToolsTooLong():
            return ApiError(400, str(error), "context_length_exceeded", "tools")
        case PromptTooLong():
            return ApiError(400, str(error), "context_length_exceeded", "messages")
        case GrammarFailed():
            return ApiError(400, str(error), "schema_not_enforced", "response_format")
        case WeightsRefused():
            return ApiError(409, str(error), "weights_not_in_service", "model")
        case UnknownVersion():
            return ApiError(404, str(error), "model_not_found", "model")
        case UnknownVerifier():
            return ApiError(400, str(error), "unknown_verifier", "verifier")
        case BadGold():
            return ApiError(400, str(error), "invalid_value", "gold")
        case Overloaded():
            return ApiError(429, str(error), "overloaded", headers=_RETRY)
        case FileMissing():
            return ApiError(404, str(error), "file_not_found")
        case BadName():
            return ApiError(400, str(error), "invalid_name", "files")
        case WorkspaceFull():
            return ApiError(413, str(error), "workspace_full", "files")
        case NotFound():
            return ApiError(404, str(error), "not_found")
        case StoreError():
            log.error("the store failed: %s", error)
            told = "The record can't be used, and nothing is answered without it. The server's log says why."
            if isinstance(error, InvalidRecord):  # of what was asked, not of where the store lies
                told = str(error)
            return ApiError(503, told, "store_unavailable")
        case CorruptVersion() | EngineError(__cause__=CorruptVersion()):
            log.error("a version can't be loaded: %s", error)
            told = "This version's files aren't what was published: it can't be loaded. The server's log says why."
            return ApiError(503, told, "version_corrupt", "model")
        case EngineError():
            log.error("the engine failed: %s", error)
            return ApiError(503, str(error), "engine_unavailable", headers=_RETRY)
        case StarletteHTTPException():
            return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case RequestValidationError():
            return _from_validation(error)
    log.error("a request failed", exc_info=error)
    return ApiError(500, f"an unforeseen {type(error).__name__}; the server's log has the details.", "internal_error")


def install(app: FastAPI) -> None:
    async def handle(_request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (
        StarletteHTTPException,
        RequestValidationError,
        EngineError,
        StoreError,
        UnknownVerifier,
        BadGold,
        CorruptVersion,
        Overloaded,
        ToolClash,
        WorkspaceError,
        Exception,
    ):
        app.add_exception_handler(kind, handle)


def _from_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        position = first["loc"][-1]
        return ApiError(400, f"the body isn't JSON: {first['ctx']['error']} at character {position}.", "invalid_json")
    where, *loc = first["loc"]
    path = _path(loc, error.body, first["type"] == "missing") if where == "body" else [str(part) for part in loc]
    param = ".".join(path) or None
    message = first["msg"].removeprefix("Value error, ")
    if param is None and first["type"] == "value_error":
        return ApiError(400, message, "invalid_value")
    if param is None:  # no JSON at all, or JSON that isn't an object
        return ApiError(400, "the body must be a JSON object (Content-Type: application/json).", "invalid_body")
    return ApiError(400, f"{param}: {message}", "missing" if first["type"] == "missing" else "invalid_value", param)


def _path(loc: Sequence[str | int], body: Any, missing: bool) -> list[str]:
    """Where in the body an error lies: `loc` names the branches of unions too, which the client never wrote."""
    path, at = [], body
    for position, part in enumerate(loc):
        known = (isinstance(at, dict) and part in at) or (isinstance(at, list) and isinstance(part, int))
        if known:
            at = at[part]
        if known or (missing and position == len(loc) - 1):
            path.append(str(part))
    return path
