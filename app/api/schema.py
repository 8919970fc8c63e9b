"""What a client may send. A parameter that would change the answer and isn't served is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

_DEEPEST = 100  # levels of a body: more than any schema that is taken
# What clients send beside the question, and what changes nothing in an answer.
HARMLESS = frozenset(
    {
        "user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "parallel_tool_calls",
    }
)  # fmt: skip
# Parameters that are accepted only with the value that means "as usual".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
}
REASONS = {
    "functions": "it has given way to tools",
    "function_call": "it has given way to tool_choice",
    "modalities": "answers are text",
}


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class FunctionCallIn(BaseModel):
    name: str
    arguments: str


class ToolCallIn(BaseModel):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: FunctionCallIn


class MessageIn(BaseModel):
    model_config = ConfigDict(extra="ignore")  # `name` and what earlier answers carried change nothing

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _as_its_role(self) -> MessageIn:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the assistant's has tool_calls")
        if self.content is None and not self.tool_calls:
            raise ValueError("the content is missing")
        return self

    def as_message(self) -> dict[str, Any]:
        given = self.content or ""
        text = given if isinstance(given, str) else "".join(part.text for part in given)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _whole_json(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id or ""
        return message


def whole(value: Any, depth: int = 0) -> Any:
    """A JSON value whose texts hold no half characters, which JSON can spell and no encoding can write."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if depth > _DEEPEST:
        return value  # refused further on
    if isinstance(value, dict):
        return {whole(key): whole(item, depth + 1) for key, item in value.items()}
    return [whole(item, depth + 1) for item in value] if isinstance(value, list) else value


def _whole_json(text: str) -> str:
    """The same of a JSON text in a text, whose escapes are still to be read. One that isn't JSON stays as it is."""
    try:
        return json.dumps(whole(json.loads(text)), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


class FunctionIn(BaseModel):
    """`strict` changes nothing: arguments are always held against the schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolIn(BaseModel):
    type: Literal["function"]
    function: FunctionIn


class FunctionName(BaseModel):
    name: str


class NamedChoice(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionName


class JsonSchema(BaseModel):
    """An answer is always held to the schema, whatever `strict` says."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class PlainFormat(BaseModel):
    type: Literal["text", "json_object"]


class JsonSchemaFormat(BaseModel):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class Metadata(BaseModel):
    """`verifier` and `gold` judge the answer at once, and train nothing from `gold_expires_at` on; `conversation_id`
    adds the turn to that conversation; `server_tools` "none" leaves the policy with the client's tools only.

    Other keys are the client's own and are let be, as with OpenAI.
    """

    model_config = ConfigDict(extra="allow")

    verifier: str | None = None
    gold: str | None = None
    gold_expires_at: AwareDatetime | None = None
    conversation_id: str | None = None
    server_tools: Literal["all", "none"] = "all"

    @model_validator(mode="after")
    def _together(self) -> Metadata:
        if (self.verifier is None) != (self.gold is None):
            missing = "gold" if self.gold is None else "verifier"
            raise ValueError(f"verifier and gold come together, and {missing} is missing")
        _check_expiry("gold_expires_at", self.gold_expires_at, self.gold)
        return self


def _check_expiry(name: str, at: datetime | None, gold: str | None) -> None:
    if at is not None and gold is None:
        raise ValueError(f"{name} is a gold's, and there is none")
    if at is not None and at <= datetime.now(UTC):
        raise ValueError(f"{name} is past: give a later time, or leave the gold out")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


def _stops(given: str | list[str]) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    if len(stops) > 4 or not all(0 < len(stop) <= 256 for stop in stops):
        raise ValueError("at most 4 strings of 1 to 256 characters")
    return stops


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. A step calls one tool at most, whatever `parallel_tool_calls` says."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, body: Any) -> Any:
        return whole(body)

    model: str = Field(min_length=1)
    messages: list[MessageIn] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: Annotated[str | list[str], AfterValidator(_stops)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[PlainFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    tools: list[ToolIn] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    metadata: Metadata | None = None

    def unsupported(self) -> tuple[str, str] | None:
        """The first parameter that can't be honoured, and why; None when all can."""
        return unsupported(self.model_extra or {}, NEUTRAL, REASONS)


def unsupported(
    more: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], reasons: Mapping[str, str]
) -> tuple[str, str] | None:
    """Of the parameters that no field takes, the first that can't be honoured, and why. `neutral`: the values that are
    let pass, for they ask for nothing."""
    for name, value in more.items():
        if value is None or name in HARMLESS or any(_same(value, allowed) for allowed in neutral.get(name, ())):
            continue
        way_out = f" Leave it out or send {json.dumps(neutral[name][0])}." if name in neutral else " Leave it out."
        reason = reasons.get(name, "it isn't supported")
        return name, f"{name}: {reason}.{way_out}"
    return None


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and no number for a truth value."""
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)


class FeedbackRequest(BaseModel):
    """The body of POST /v1/feedback: a score, or a verifier and the right answer, which then score the turn."""

    model_config = ConfigDict(extra="forbid")

    turn_id: Annotated[str, Field(min_length=1)] | None = None
    conversation_id: Annotated[str, Field(min_length=1)] | None = None  # instead: its last finished turn
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    verifier: str | None = None
    gold: Annotated[str, Field(min_length=1)] | None = None
    expires_at: AwareDatetime | None = None  # of the gold: it trains nothing from then on
    comment: Annotated[str, Field(max_length=4000)] = ""

    @model_validator(mode="after")
    def _one_verdict(self) -> FeedbackRequest:
        if (self.turn_id is None) == (self.conversation_id is None):
            raise ValueError("send either a turn_id, or a conversation_id, which means its last finished turn")
        if (self.verifier is None) != (self.gold is None):
            missing = "gold" if self.gold is None else "verifier"
            raise ValueError(f"verifier and gold come together, and {missing} is missing")
        if (self.score is None) == (self.gold is None):
            raise ValueError("send either a score, or a verifier and a gold answer that score it")
        _check_expiry("expires_at", self.expires_at, self.gold)
        return self


class ConversationRequest(BaseModel):
    """The body of POST /v1/conversations, which may be left out: a conversation begins empty."""

    model_config = ConfigDict(extra="forbid")

    items: Annotated[list[Any], Field(max_length=0)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=0)] | None = None


class VersionUse(BaseModel):
    """The body of POST /v1/admin/versions/…, which may be left out: the reason, kept in the record, and whether the
    conversations that stay on another version come along."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[str, Field(max_length=1000)] = ""
    move_conversations: bool = False


class Rollback(VersionUse):
    """The body of POST /v1/admin/versions/rollback. `from`: the version that is to go; a call that is repeated, and
    would bring it back, is refused then."""

    from_: Annotated[str | None, Field(alias="from")] = None


class Reason(BaseModel):
    """Why, kept in the record."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[str, Field(max_length=1000)] = ""


class ReviewDecision(BaseModel):
    """The body of POST /v1/admin/review/ID: the gold, one of those that were given, or null to reject them all."""

    model_config = ConfigDict(extra="forbid")

    gold: Annotated[str, Field(min_length=1)] | None
    reason: Annotated[str, Field(max_length=1000)] = ""


class VersionTrial(VersionUse):
    """The body of POST /v1/admin/versions/ID/canary: the share of owners whose new conversations begin on it."""

    share: Annotated[float, Field(ge=0, le=1)]


class ConsentRequest(BaseModel):
    """`training`: whether the caller's conversations may train the policy; without it they serve the caller alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    training: bool
