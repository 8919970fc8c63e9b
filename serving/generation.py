"""One generation while it is written: its tokens, what the parser makes of them, and what of its answer is shown."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from serving.dialects.base import Dialect, MalformedCall, Parsed, read_call
from serving.engines.base import FinishReason, TokenChunk
from serving.terms import StopText, Terms
from serving.token_bytes import TokenBytes, TokenSpans
from serving.trajectory import AnswerText, Thinking, TokenLogprob


class Generation:
    """`ids`, `logprobs`, `mask` and `versions`, which tells what drew a token, are parallel. Masked 0 are the tokens
    that weren't drawn: the markup around a text that a grammar made. `reason` is None while the engine writes, and
    after it was told to stop."""

    def __init__(self, dialect: Dialect, token_bytes: TokenBytes, terms: Terms) -> None:
        self._dialect = dialect
        self._token_bytes = token_bytes
        self._terms = terms
        self._parser = dialect.parser()
        self._spans = TokenSpans(token_bytes)
        self._stop = StopText(terms.stop)
        self._tops: list[list[tuple[int, float]]] = []
        self._text = ""
        self._answer_at = 0  # where the answer begins in the text
        self._told = 0  # the tokens whose logprobs went out with the answer, or lie before it
        self._action: Literal["answer", "call"] | None = None  # what a grammar makes
        self._closing = ""
        self._written = ""  # under the grammar
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.mask: list[int] = []
        self.versions: list[str] = []
        self.reason: FinishReason | None = None
        self.shown = ""  # of the answer
        self.committed = False  # the policy is answering, where a grammar is to make the answer

    @property
    def own_tokens(self) -> int:
        return sum(self.mask)

    @property
    def stopped(self) -> bool:
        """One of the client's stop strings came in the answer."""
        return self._stop.hit

    @property
    def cut(self) -> bool:
        """The limit of tokens came while it answered, or while it made a call that it had to make."""
        return self.reason == "length" and (self._parser.answering or self._action is not None)

    def feed(self, chunk: TokenChunk) -> list[Thinking | AnswerText]:
        self._add(chunk.token_ids, chunk.logprobs, chunk.top_logprobs, chunk.version)
        self.reason = chunk.finish_reason
        events: list[Thinking | AnswerText] = []
        for event in self._parser.feed(chunk.token_ids):
            if isinstance(event, Thinking):
                events.append(event)
            elif self._terms.forced is not None:
                self.committed = True
            else:
                events += self._show(self._stop.feed(event.text))
        return events

    def begin_forced(self, action: Literal["answer", "call"], last: bool) -> bool:
        """Go back to where the answer began, if it did, and open the action there; a grammar makes what comes next.

        What the policy had drawn of an answer of its own is gone: it was drawn only to see that it answers. The last
        generation of an answer opens the action even where the policy ended its turn without one.
        """
        at, begun = self._parser.answer_start, True
        if at is None or not (self.committed or self.reason in ("stop", "eos")):
            if not (last and self.reason == "eos"):
                return False
            while self.ids and self._token_bytes.is_added(self.ids[-1]):
                self._keep(len(self.ids) - 1)
            at, begun = len(self._text), False
        opening, self._closing = self._dialect.around(action)
        if begun and action == "answer":
            opening = ""
        elif begun:
            at -= len(self._dialect.around("answer")[0])
        text = self._text
        kept = bisect_right(self._spans.end, at)
        while kept and self._spans.start(kept - 1) == self._spans.end[kept - 1]:
            kept -= 1  # the first bytes of a character behind the cut
        self._keep(kept)
        self._force(text[len(self._text) : at] + opening)
        self._action, self.reason = action, None
        self._answer_at, self._told = len(self._text), len(self.ids)
        return True

    def feed_forced(self, chunk: TokenChunk) -> list[AnswerText]:
        """What comes under the grammar. The end of the turn isn't part of it: `end_forced` closes the action."""
        self.reason = chunk.finish_reason
        own = [i for i, token_id in enumerate(chunk.token_ids) if not self._token_bytes.is_added(token_id)]
        tops = chunk.top_logprobs and [chunk.top_logprobs[i] for i in own]
        ids, logprobs = [chunk.token_ids[i] for i in own], [chunk.logprobs[i] for i in own]
        grown = self._add(ids, logprobs, tops, chunk.version)
        self._written += grown
        return self._show(self._stop.feed(grown)) if self._action == "answer" else []

    def end_forced(self) -> None:
        if self.reason in ("eos", "stop"):
            self._force(self._closing)

    def finish(self) -> Parsed:
        """What the generation says, once no more of it comes."""
        if self._action is None:
            return self._parser.finish(stopped=self.reason == "stop", ended=self.reason == "eos")
        parser = self._dialect.parser()
        parser.feed(self.ids)
        parsed = replace(parser.finish(stopped=True, ended=True), unshown="")
        if self.reason not in ("eos", "stop"):
            return replace(parsed, action="invalid", input="", well_formed=False, tool="", tool_input="")
        if self._action == "answer":  # not the parser's: a JSON text may hold what looks like its end
            return replace(parsed, action="answer", input=self._written)
        try:
            call = read_call(self._written)
        except MalformedCall as error:
            return replace(parsed, action="invalid", input="", well_formed=False, problem=str(error))
        return replace(parsed, action="call", input=self._written, tool=call.tool, tool_input=call.input)

    def rest(self, unshown: str) -> list[AnswerText]:
        """The last of the answer: what the parser hadn't given, and what might have begun a stop string."""
        events = self._show(self._stop.feed(unshown))
        return events if self.stopped else events + self._show(self._stop.rest())

    def _add(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[list[tuple[int, float]]] | None,
        version: str | None,
    ) -> str:
        """`version`: the one that drew the tokens, None for markup."""
        self.ids += ids
        self.logprobs += logprobs
        self.mask += [int(version is not None)] * len(ids)
        self.versions += [version or ""] * len(ids)
        self._tops += tops or [[] for _ in ids]
        grown = self._spans.add(ids)
        self._text += grown
        return grown

    def _force(self, text: str) -> None:
        ids = self._dialect.encode_markup(text)
        self._add(ids, [0.0] * len(ids), None, None)

    def _keep(self, count: int) -> None:
        for parallel in (self.ids, self.logprobs, self.mask, self.versions, self._tops):
            del parallel[count:]
        self._spans = TokenSpans(self._token_bytes)
        self._text = self._spans.add(self.ids)

    def _show(self, text: str) -> list[AnswerText]:
        if not text:
            return []
        if not self.shown and self._action is None:
            self._answer_at = self._parser.answer_start or 0
        self.shown += text
        return [AnswerText(text, self._tokens())]

    def _tokens(self) -> tuple[TokenLogprob, ...]:
        """The tokens of what has been shown since they were last asked for."""
        if self._terms.top_logprobs is None:
            return ()
        tokens = []
        upto = self._answer_at + len(self.shown)
        while self._told < len(self.ids) and self._spans.start(self._told) < upto:
            at, self._told = self._told, self._told + 1
            if self.mask[at] and max(self._spans.end[at], self._spans.start(at) + 1) > self._answer_at:
                of = self._token_bytes.of
                top = tuple((of(id_), logprob) for id_, logprob in self._tops[at][: self._terms.top_logprobs])
                tokens.append(TokenLogprob(of(self.ids[at]), self.logprobs[at], top))
        return tuple(tokens)
