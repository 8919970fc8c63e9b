"""Texts as ids in which nothing is markup, whatever stands in them."""

from __future__ import annotations

import itertools
import re
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode


class PlainEncoder:
    """`encode(text)`: ids in which every added token is spelt out, encoded apart from its own first character.

    All added tokens: tokenizers split only those that they call special, and many a model's `<tool_call>` or `[INST]`
    isn't. `added` has their ids by name, and `control` finds them in a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        names = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        names += [str(token) for token in tokenizer.all_special_tokens]
        self.added = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in names if name.strip()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def at_least(self, text: str) -> int:
        """How many tokens `text` takes at the very least, told in a moment however long it is.

        Byte-level BPE loses no byte of a normalized text, so that it has no fewer tokens than its bytes divided by
        those of the longest token. 0 for a tokenizer of another kind.
        """
        if not self._longest:
            return 0
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        written = text if normalizer is None else normalizer.normalize_str(text)
        return len(written.encode(errors="replace")) // self._longest

    @cached_property
    def _longest(self) -> int:
        """The bytes of the longest token that a text can be encoded as; 0 where tokens don't stand for bytes."""
        added = self._tokenizer.added_tokens_decoder
        names = [name for name, id_ in self._tokenizer.get_vocab().items() if id_ not in added]
        if not set("".join(names)) <= set(bytes_to_unicode().values()):
            return 0
        return max(map(len, names), default=0)  # a character of the byte-level alphabet for each byte

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        cuts = [match.start() + 1 for match in self.control.finditer(text)]
        for start, end in itertools.pairwise([0, *cuts, len(text)]):
            part = text[start:end]
            ids += self._tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True) if part else []
        return ids
