"""The rule by which a question's gold is decided: who counts, how much, and when nobody's word is enough.

Golds for one question are votes of their owners. An owner has one, the last given, whatever number of times it was
said and by whatever verifier; it weighs what its source and its owner are trusted. A gold wins with `margin` of all
the trust; short of that the question waits for a person. `settling` applies the rule to the tables.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from feedback_store.codec import clean
from feedback_store.database import Database
from feedback_store.records import Message

SOURCE_TRUST: Mapping[str, float] = MappingProxyType({"verifier": 0.9, "client": 0.8, "person": 0.5, "judge": 0.3})
"""A gold that came with the question, one sent later, one from a person in the chat, one from a model that judges."""

Basis = Literal["", "trusted", "consensus", "review", "known"]
"""How a gold is known: it isn't, a trusted owner's word, votes, a person's decision; or `known`, by votes that have
grown old and were erased, until others say otherwise as surely."""


_EXACTLY = ("name", "tool_calls", "tool_call_id")  # of a message: what folding leaves as it is


@dataclass(frozen=True)
class Policy:
    """How much whose gold counts. Any other source than those of `by_source`, such as a generator's, weighs 1.

    `by_owner` replaces the source's trust. `trusted_owners` weigh 1 and win against all others. `consensus`: summed
    trust, of at least three owners, from which a gold that won is held to be known. An owner whose golds contradicted
    known ones `quarantine_after` times, and more often than `quarantine_rate`, doesn't count any more.
    """

    by_source: Mapping[str, float] = field(default_factory=lambda: SOURCE_TRUST)
    by_owner: Mapping[str, float] = field(default_factory=dict)
    trusted_owners: Collection[str] = frozenset()
    margin: float = 0.7
    consensus: float = 2.0
    quarantine_after: int = 3
    quarantine_rate: float = 0.3

    def trust(self, source: str, owner: str) -> float:
        if owner in self.trusted_owners:
            return 1.0
        return self.by_owner.get(owner, self.by_source.get(source, SOURCE_TRUST.get(source, 1.0)))


class Judging(Database):
    """The base of those parts of the store that take golds or decide on them."""

    policy: Policy = Policy()


@dataclass(frozen=True)
class Vote:
    owner: str
    gold_key: str
    trust: float


@dataclass(frozen=True)
class Verdict:
    """`gold_key` None: nobody knows yet, and `reason` says why. `basis`: "" where the gold can't judge its owners."""

    gold_key: str | None
    basis: Basis
    reason: str


def weigh(votes: Sequence[Vote], policy: Policy) -> Verdict:
    """The verdict on one question by its votes, the oldest first; those of quarantined owners are left out before."""
    last: dict[str, Vote] = {}
    for vote in votes:
        before = last.get(vote.owner)
        same = before is not None and before.gold_key == vote.gold_key
        trust = max(before.trust, vote.trust) if before is not None and same else vote.trust
        last[vote.owner] = Vote(vote.owner, vote.gold_key, trust)
    if not last:
        return Verdict(None, "", "no gold counts: its owners are quarantined, or their last one has expired")
    sums: dict[str, float] = {}
    for vote in last.values():
        sums[vote.gold_key] = sums.get(vote.gold_key, 0.0) + vote.trust
    total = sum(sums.values())
    known = {vote.gold_key for vote in last.values() if vote.owner in policy.trusted_owners}
    if len(known) > 1:
        return Verdict(None, "", "trusted owners contradict each other")
    if known:
        return Verdict(known.pop(), "trusted", "a trusted owner says otherwise")
    if total <= 0:
        return Verdict(None, "", "nobody who gave a gold is trusted to")
    best = max(sums, key=lambda key: sums[key])
    if sums[best] < policy.margin * total:
        return Verdict(
            None, "", f"{len(sums)} golds contradict each other and none has {policy.margin:.0%} of the trust"
        )
    owners = sum(vote.gold_key == best and vote.trust > 0 for vote in last.values())
    agreed = owners >= 3 and sums[best] >= policy.consensus
    return Verdict(best, "consensus" if agreed else "", "others, who are trusted more together, say otherwise")


def question_hash(messages: Sequence[Message]) -> str:
    """What makes two questions the same: 64 hex digits over roles, texts (`folded`), names and tool calls."""
    said = [
        [message.get("role", ""), folded(_text(message))] + [message[part] for part in _EXACTLY if message.get(part)]
        for message in messages
    ]
    return hashlib.sha256(clean(json.dumps(said, ensure_ascii=False, sort_keys=True)).encode()).hexdigest()


def fingerprint(gold_key: str) -> str:
    """What is kept of a gold whose text is erased."""
    return hashlib.sha256(gold_key.encode()).hexdigest()


def plain_key(gold: str) -> str:
    """A gold as it is compared where the caller knows no better: its text, folded."""
    return folded(gold)


def folded(text: str) -> str:
    """Without case, spacing or closing marks, in NFKC: `folded("What  is 2+2 ?") == "what is 2+2"`."""
    flat = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", clean(text)).casefold()).strip()
    return flat.rstrip("?!.… ") or flat


def _text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
