"""Texts as ids in which nothing is markup, whatever stands in them."""

from __future__ import annotations

import itertools
import re
from typing import Any


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

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        cuts = [match.start() + 1 for match in self.control.finditer(text)]
        for start, end in itertools.pairwise([0, *cuts, len(text)]):
            part = text[start:end]
            ids += self._tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True) if part else []
        return ids
