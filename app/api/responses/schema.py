"""What a client may send to POST /v1/responses. What would change the answer and isn't served is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from app.api.schema import FunctionIn, Metadata, PlainFormat, unsupported, whole

_LONGEST_METADATA = 512  # characters of a value, as with OpenAI
# Parameters that are accepted only with the value that means "as usual".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "include": ([],),
    "top_logprobs": (0,),
    "context_management": ([],),
}
REASONS = {
    "background": "an answer is given to the request that asks for it",
    "truncation": "a conversation that is too long is refused, never cut",
    "include": "nothing more can be had than a response shows",
    "reasoning": "the model thinks as it has learnt to",
    "prompt": "no prompt templates are kept here",
    "max_tool_calls": "the server's max_turns bounds the calls",
    "top_logprobs": "logprobs are had by /v1/chat/completions",
}


def _named(items: Any, what: str, known: tuple[str, ...], default: str | None = None) -> Any:
    """`items` as they are, if each has a type that is known: a union's own error would list every model."""
    for index, item in enumerate(items if isinstance(items, list) else ()):
        given = item.get("type", default) if isinstance(item, dict) else default
        if given not in known:
            raise ValueError(f"number {index} is of the type {str(given)[:80]!r}; {what} {' or '.join(known)}")
    return items


def _parts(content: Any) -> Any:
    return _named(content, "a part is", ("input_text", "output_text"))


def _items(given: Any) -> Any:
    return _named(given, "an item is", ("message", "function_call", "function_call_output"), default="message")


def _functions(given: Any) -> Any:
    what = "Whetstone's own search and Python run without being asked for, and a tool of the client's is a"
    return _named(given, what, ("function",))


class Part(BaseModel):
    """A text. Its annotations and logprobs, where an earlier answer is sent back, change nothing."""

    type: Literal["input_text", "output_text"]
    text: str


Content = Annotated[str | list[Part], BeforeValidator(_parts)]


class MessageItem(BaseModel):
    """`id`, `status` and `phase`, which earlier answers carry, change nothing."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(BaseModel):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: str


class ResultItem(BaseModel):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


def _type_of(item: Any) -> str:
    given = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return str(given)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(_type_of),
]


class FunctionTool(FunctionIn):
    """`strict` changes nothing: arguments are always held against the schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, given: Any) -> Any:
        known = {"type", "name", "description", "parameters", "strict"}
        if isinstance(given, dict):
            return {key: value for key, value in given.items() if key in known or value not in (None, False)}
        return given


class FunctionChoice(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    name: str


class SchemaFormat(BaseModel):
    """An answer is always held to the schema, whatever `strict` says."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None  # the usual one; there is no other


class ResponseMetadata(Metadata):
    """As with chat completions; at most 16 texts."""

    __pydantic_extra__: dict[str, Annotated[str, Field(max_length=_LONGEST_METADATA)]]

    @model_validator(mode="after")
    def _not_too_many(self) -> ResponseMetadata:
        if len(self.model_fields_set) > 16 or any(len(key) > 64 for key in self.model_extra or ()):
            raise ValueError("at most 16 keys of at most 64 characters")
        return self


class ConversationId(BaseModel):
    id: Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """Whetstone sends no padding: it can only be asked not to."""

    model_config = ConfigDict(extra="forbid")

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(BaseModel):
    """The body of POST /v1/responses."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, body: Any) -> Any:
        return whole(body)

    model: str = Field(min_length=1)
    input: str | Annotated[list[Item], BeforeValidator(_items)]
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(min_length=1)] | None = None
    conversation: Annotated[str, Field(min_length=1)] | ConversationId | None = None
    tools: Annotated[list[FunctionTool], BeforeValidator(_functions)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    text: TextConfig | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    metadata: ResponseMetadata | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation

    def unsupported(self) -> tuple[str, str] | None:
        """The first parameter that can't be honoured, and why; None when all can."""
        return unsupported(self.model_extra or {}, NEUTRAL, REASONS)
