"""What reading a document gives: its text by sections, and the passages that an index holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

PASSAGE_CHARS = 700  # about what one observation can show


class Unreadable(ValueError):
    """This document has no text to give. The message says why, as the end of a sentence about the document."""


@dataclass(frozen=True)
class Section:
    """`anchor` points into the document, as a URL's fragment does: "page=3" or a heading's slug."""

    text: str
    heading: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class Reading:
    """`title` is empty where the document has none; `cut` says what was left out of it, if anything was."""

    title: str
    sections: tuple[Section, ...]
    cut: str = ""

    @property
    def text(self) -> str:
        """Everything, with the headings where they stood."""
        parts = (part for section in self.sections for part in (section.heading, section.text))
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Passage:
    heading: str
    text: str
    anchor: str


def passages(reading: Reading) -> Iterator[Passage]:
    """Paragraphs joined up to 700 characters, long ones split between words; a passage ends where its section does."""
    for section in reading.sections:
        held = ""
        for paragraph in re.split(r"\n\s*\n", section.text):
            for piece in _pieces(" ".join(paragraph.split())):
                if held and len(held) + len(piece) >= PASSAGE_CHARS:
                    yield Passage(section.heading, held, section.anchor)
                    held = ""
                held = f"{held} {piece}".strip()
        if held:
            yield Passage(section.heading, held, section.anchor)


def slug(heading: str) -> str:
    """A heading as the fragment that renderers of Markdown commonly give it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.casefold()).strip())


def _pieces(line: str) -> Iterator[str]:
    while len(line) > PASSAGE_CHARS:
        at = line.rfind(" ", 0, PASSAGE_CHARS)
        at = at if at > 0 else PASSAGE_CHARS
        yield line[:at]
        line = line[at:].strip()
    if line:
        yield line
