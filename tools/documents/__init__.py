"""Documents of a person's folder and pages of the web, made into text: plain text, Markdown, HTML, PDF."""

from tools.documents.process import DocumentReader
from tools.documents.reading import Passage, Reading, Section, Unreadable, passages, slug

__all__ = ["DocumentReader", "Passage", "Reading", "Section", "Unreadable", "passages", "slug"]
