"""The bytes that a token stands for: of byte-level BPE, a character's bytes may lie in several tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenBytes:
    """Of one tokenizer. A token that isn't spelt in the byte-level alphabet (an added one) is its own text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.added_tokens_decoder)
        self._known: dict[int, bytes] = {}

    def is_added(self, token_id: int) -> bool:
        return token_id in self._added

    def of(self, token_id: int) -> bytes:
        if token_id not in self._known:
            token = str(self._tokenizer.convert_ids_to_tokens(token_id))
            spelt = token_id not in self._added and all(character in _BYTES for character in token)
            self._known[token_id] = bytes(_BYTES[c] for c in token) if spelt else token.encode()
        return self._known[token_id]


class TokenSpans:
    """Where each token lies in the text of them all, in characters: `start[i]` to `end[i]`.

    A token that holds only the beginning of a character lies, empty, before it; the token that ends it has it.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.end: list[int] = []

    def start(self, index: int) -> int:
        return self.end[index - 1] if index else 0

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        grown = ""
        for token_id in token_ids:
            text = self._decoder.decode(self._bytes.of(token_id))
            self.end.append(self.start(len(self.end)) + len(text))
            grown += text
        return grown
