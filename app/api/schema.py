"""What a client may send. A parameter that would change the answer and isn't served is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What clients send beside the question, and what changes nothing in an answer.
HARMLESS = frozenset(
    {
        "user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "parallel_tool_calls",
    }
)  # fmt: skip
# Parameters that are accepted only with the value that means "as usual".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "stop": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
}
REASONS = {
    "n": "one answer a request",
    "tools": "Whetstone runs its own tools (Python and search) and takes none from the client",
    "functions": "Whetstone runs its own tools (Python and search) and takes none from the client",
    "response_format": "answers are text",
    "modalities": "answers are text",
    "stop": "an answer ends where the policy ends it; bound it with max_tokens",
}


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class MessageIn(BaseModel):
    model_config = ConfigDict(extra="ignore")  # `name` and what earlier answers carried change nothing

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def as_text(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON can hold half a character
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Metadata(BaseModel):
    """`verifier` and `gold` judge the answer at once; `conversation_id` adds the turn to that conversation.

    Other keys are the client's own and are let be, as with OpenAI.
    """

    model_config = ConfigDict(extra="allow")

    verifier: str | None = None
    gold: str | None = None
    conversation_id: str | None = None

    @model_validator(mode="after")
    def _together(self) -> Metadata:
        if (self.verifier is None) != (self.gold is None):
            missing = "gold" if self.gold is None else "verifier"
            raise ValueError(f"verifier and gold come together, and {missing} is missing")
        return self


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1)
    messages: list[MessageIn] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    metadata: Metadata | None = None

    def unsupported(self) -> tuple[str, str] | None:
        """The first parameter that can't be honoured, and why; None when all can."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in HARMLESS or value in NEUTRAL.get(name, ()):
                continue
            reason = REASONS.get(name, "it isn't supported")
            neutral = f" Leave it out or send {NEUTRAL[name][0]!r}." if name in NEUTRAL else " Leave it out."
            return name, f"{name}: {reason}.{neutral}"
        return None


class FeedbackRequest(BaseModel):
    """The body of POST /v1/feedback: a score, or a verifier and the right answer, which then score the turn."""

    model_config = ConfigDict(extra="forbid")

    turn_id: Annotated[str, Field(min_length=1)] | None = None
    conversation_id: Annotated[str, Field(min_length=1)] | None = None  # instead: its last finished turn
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    verifier: str | None = None
    gold: Annotated[str, Field(min_length=1)] | None = None
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


class VersionTrial(VersionUse):
    """The body of POST /v1/admin/versions/ID/canary: the share of owners whose new conversations begin on it."""

    share: Annotated[float, Field(ge=0, le=1)]
