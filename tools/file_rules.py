"""What a conversation's workspace takes in: which names and figures, and the errors that say why not."""

from __future__ import annotations

import io
import mimetypes
import unicodedata
import warnings

from PIL import Image

NAME_BYTES = 120
MAX_SIDE = 4096  # pixels of a figure
UNKNOWN = "application/octet-stream"


class WorkspaceError(Exception):
    """A file can't be had or kept. The message names it and the way out."""


class FileMissing(WorkspaceError):
    """There is no such file in this conversation."""


class BadName(WorkspaceError):
    """A file can't be called that, or an id isn't one."""


class BadImage(WorkspaceError):
    """What should be a figure isn't a PNG that a page could show."""


class WorkspaceFull(WorkspaceError):
    """The conversation's files would be too many or too large."""


def check_name(name: str) -> str:
    """`name`, if a file may be called that: one plain name in NFC. Raises BadName with the reason."""
    shown = repr(name if len(name) <= NAME_BYTES else name[:NAME_BYTES] + "…")
    if not name.strip() or name != name.strip():
        raise BadName(f"A file can't be called {shown}: a name isn't empty and has no space at its ends.")
    if "/" in name or "\\" in name:
        raise BadName(f"A file can't be called {shown}: give a plain name, without a folder.")
    if name.startswith("."):
        raise BadName(f"A file can't be called {shown}: a name doesn't begin with a dot.")
    if any(unicodedata.category(character)[0] == "C" or character in "\u2028\u2029" for character in name):
        raise BadName(f"A file can't be called {shown}: it has characters that can't be seen.")
    if not unicodedata.is_normalized("NFC", name):
        raise BadName(f"A file can't be called {shown}: write its letters composed (Unicode NFC).")
    if len(name.encode()) > NAME_BYTES:
        raise BadName(f"A file can't be called {shown}: a name has at most {NAME_BYTES} bytes.")
    return name


def check_png(data: bytes) -> None:
    """That `data` is a PNG whose parts add up and that a page can show. Its pixels aren't decoded. Raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the sides are bounded below
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                width, height = image.size
                image.verify()
    except Exception as error:  # whatever a parser says about bytes that were made to confuse it
        raise BadImage(f"The figure isn't a PNG: {type(error).__name__}.") from error
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"The figure has {width} by {height} pixels; at most {MAX_SIDE} by {MAX_SIDE} are shown.")


def media_type_of(name: str) -> str:
    """By the name's ending; what is in the file may be something else."""
    media_type, encoding = mimetypes.guess_type(name, strict=False)
    return UNKNOWN if media_type is None or encoding else media_type


def look_of(name: str) -> str:
    """The same for names that a person, or another file system, takes for one another."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
