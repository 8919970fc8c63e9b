"""A task: a prompt with a verifier and its gold answer. What the queue holds and training samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """`messages` in OpenAI's chat shape, ending with the user's. `kind` is the slice that reports group by."""

    messages: tuple[dict[str, str], ...]
    verifier: str
    gold: str
    kind: str
    source: str = "generated"
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Stable across processes: a hash of the prompt, the verifier and the gold."""
        content = json.dumps([self.messages, self.verifier, self.gold], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


def ask(question: str, verifier: str, gold: str, kind: str, **meta: str) -> Task:
    """A task of one user message."""
    return Task(({"role": "user", "content": question},), verifier, gold, kind, meta=meta)
