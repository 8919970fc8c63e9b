"""A reader for each type of document. It runs in a process of its own (see process.py): libraries parse hostile bytes.

HTML by trafilatura, PDF by pypdf, Markdown by markdown-it-py, unknown charsets by charset-normalizer.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
from configparser import ConfigParser
from copy import deepcopy
from functools import cache

from tools.documents.reading import Reading, Section, Unreadable, slug
from tools.text import clean

log = logging.getLogger(__name__)
HTML = ("text/html", "application/xhtml+xml")
PDF = "application/pdf"
MAX_CHARS = 5_000_000
MAX_PAGES = 2_000
_SMALL_PAGE = 250  # characters; below, what the extractor took is compared with all that is there
_KEPT = 0.7  # a share of it
_SNIFFED = 64 << 10  # bytes that a charset is guessed from
_TELLING = 12  # bytes beyond ASCII
_SLOW_CODECS = {"idna", "punycode", "unicode-escape", "raw-unicode-escape", "utf-7"}  # no page needs one of these
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# Code as it stands (1), backslashes before what Markdown means something by (3), and a line's beginning (4).
_ESCAPED = re.compile(
    r"((?<![\\`])(`+)(?!`).+?(?<!`)\2(?!`))|(\\+)(?=[*_`~\[\]<])"
    r"|(^[ \t]*(?:(?:[-+]|\d+\.)[ \t]+)?\d{0,9})\\(?=[-#>+.)])",
    re.DOTALL | re.MULTILINE,
)
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})


def read(data: bytes, media_type: str, charset: str = "") -> Reading:
    """The text of `data`, at most 5 million characters. Raises Unreadable.

    `charset` is what the sender claimed; it is believed if the bytes agree. A type that isn't HTML, Markdown or PDF is
    text as it stands.
    """
    if media_type == PDF:
        reading = _pdf(data)
    else:
        text = decode(data, charset, html=media_type in HTML)
        cut = f"only its first {MAX_CHARS} characters were read" if len(text) > MAX_CHARS else ""
        text = text[:MAX_CHARS]
        if media_type in HTML:
            title, sections = _html(text)
        elif media_type == "text/markdown":
            title, sections = _markdown(text)
        else:
            title, sections = "", [Section(clean(text).strip())]
        reading = Reading(title, tuple(sections), cut)
    if not any(section.text for section in reading.sections):
        raise Unreadable("has no text" if media_type != PDF else "has no text: a scan, perhaps")
    return reading


def decode(data: bytes, charset: str = "", *, html: bool = False) -> str:
    """Text by its byte order mark, the claimed charset, the page's own word for it, UTF-8, or the likeliest guess."""
    for mark, name in _BOMS:
        if data.startswith(mark):
            return data.decode(name, errors="replace")
    if b"\0" in data[:_SNIFFED]:
        raise Unreadable("isn't text, whatever its name says")
    claimed = [charset]
    if html and (found := re.search(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", data[:4096], re.I)):
        claimed.append(found[1].decode("ascii"))
    for name in [*claimed, "utf-8"]:
        if codec := _codec(name):
            try:
                return data.decode(codec)
            except (UnicodeError, ValueError):
                continue  # it isn't what it claims to be
    from charset_normalizer import from_bytes

    sample = data[:_SNIFFED]
    few = sum(byte > 127 for byte in sample) < _TELLING  # a guess from them would be a whim
    best = None if few else from_bytes(sample, cp_exclusion=["utf_16", "utf_32", "utf_7"]).best()
    return data.decode(best.encoding if best else "cp1252", errors="replace")


def _codec(name: str) -> str | None:
    """Python's name of a charset, as a browser understands it: Latin-1 is read as Windows-1252."""
    try:
        found = codecs.lookup(name.strip()) if name else None
    except (LookupError, ValueError):
        return None
    if found is None or not getattr(found, "_is_text_encoding", True) or found.name in _SLOW_CODECS:
        return None
    return "cp1252" if found.name in ("iso8859-1", "ascii") else found.name


def _markdown(text: str) -> tuple[str, list[Section]]:
    from markdown_it import MarkdownIt

    title = ""
    if front := re.match(r"---\n(.*?)\n(?:---|\.\.\.)(?:\n|$)", text, re.DOTALL):
        if named := re.search(r"^title:[ \t]*(.+)$", front[1], re.MULTILINE):
            title = _line(named[1]).strip("\"' ")
        text = text[front.end() :]
    # Only what tells a heading from a comment in a block of code: the text itself stays as it was written.
    tokens = MarkdownIt("zero").enable(["fence", "code", "heading", "lheading", "html_block"]).parse(text)
    lines = text.split("\n")
    starts = [
        (token.map, _line(tokens[at + 1].content))
        for at, token in enumerate(tokens)
        if token.type == "heading_open" and token.map and not token.level
    ]
    begins, heading, sections = 0, "", []
    for (start, end), following in [*starts, ([len(lines), 0], "")]:
        body = clean("\n".join(lines[begins:start])).strip()
        if body:
            sections.append(Section(body, heading, slug(heading)))
        heading, begins = following, end
    return title or (starts[0][1] if starts else ""), sections


def _html(text: str) -> tuple[str, list[Section]]:
    """The main part of a page, without its menus; everything there is where a page is too small to have parts."""
    import trafilatura

    page = None
    try:
        page = trafilatura.extract_with_metadata(
            text, output_format="markdown", favor_recall=True, include_comments=False, config=_small_pages_too()
        )
    except MemoryError:
        raise
    except Exception as error:
        log.debug("trafilatura failed, reading all text of the page: %r", error)
    title = _line(page.title or "") if page else ""
    main = re.sub(r"\*\*(?=\S)(.+?)(?<=\S)\*\*", r"\1", (page.text or "") if page else "")
    sections = [Section(_unescaped(one.text), _unescaped(one.heading), one.anchor) for one in _markdown(main)[1]]
    chars = sum(len(section.text) + len(section.heading) for section in sections)
    if chars < _SMALL_PAGE:
        plain_title, plain = _plain_html(text)
        title = title or plain_title
        if chars < _KEPT * len(plain):
            sections = [Section(plain)]
    return title, sections


def _unescaped(text: str) -> str:
    """What trafilatura wrote as Markdown with the page's own characters again: `a_b`, not `a\\_b`."""
    return _ESCAPED.sub(lambda found: found[1] or (found[4] or "") + "\\" * (len(found[3] or "") // 2), text)


@cache
def _small_pages_too() -> ConfigParser:
    from trafilatura.settings import DEFAULT_CONFIG

    config = deepcopy(DEFAULT_CONFIG)
    config.set("DEFAULT", "MIN_EXTRACTED_SIZE", "1")
    return config


def _plain_html(text: str) -> tuple[str, str]:
    """All text of a page that has no main part, or is too small to tell."""
    from lxml import etree, html

    try:
        root = html.document_fromstring(text.encode("utf-8", "replace"), html.HTMLParser(encoding="utf-8"))
    except (etree.ParserError, etree.ParseError, ValueError):
        return "", ""
    title = _line(root.findtext(".//title") or "")
    etree.strip_elements(root, "script", "style", "template", "noscript", "title", etree.Comment, with_tail=False)
    return title, "\n\n".join(line for part in root.itertext() if (line := _line(str(part))))


def _pdf(data: bytes) -> Reading:
    from pypdf import PdfReader

    try:
        document = PdfReader(io.BytesIO(data), strict=False)
        if document.is_encrypted and not document.decrypt(""):
            raise Unreadable("is encrypted: save a copy of it without its password")
        count = len(document.pages)
        title = _line((document.metadata.title if document.metadata else "") or "")
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # pypdf raises of everything on a broken file
        if "cryptography" in str(error):
            raise Unreadable("is encrypted with AES: save a copy of it without its password") from error
        raise Unreadable(f"isn't a PDF that can be read ({type(error).__name__}: {_line(str(error))[:100]})") from error
    sections, broken, chars = [], 0, 0
    cut = f"only its first {MAX_PAGES} of {count} pages were read" if count > MAX_PAGES else ""
    for number in range(min(count, MAX_PAGES)):
        try:
            text = _pdf_text(document.pages[number].extract_text())
        except MemoryError:
            raise
        except Exception:  # one bad page; the others may be good, and the reading says that it lacks this one
            broken += 1
            continue
        chars += len(text)
        if chars > MAX_CHARS:
            cut = f"only its first {number} of {count} pages were read"
            break
        if text:
            sections.append(Section(text, "", f"page={number + 1}"))
    if broken:
        cut = "; ".join(filter(None, [cut, f"{broken} of its {count} pages can't be read"]))
    if not sections and broken:
        raise Unreadable(f"isn't a PDF that can be read: all {broken} pages are broken")
    return Reading(title, tuple(sections), cut)


def _pdf_text(text: str) -> str:
    """Without ligatures and with words whole that a line's end had split."""
    return re.sub(r"(?<=[^\W\d_])-\n(?=[a-zà-ÿ])", "", clean(text).translate(_LIGATURES)).strip()


def _line(text: str) -> str:
    return " ".join(clean(text).split())
