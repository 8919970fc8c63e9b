"""The index of a person's own folders: what is read, what is skipped and named, and what survives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from typer.testing import CliRunner

from app.cli import app
from tools.documents import DocumentReader, Reading, Section, Unreadable, passages
from tools.documents.formats import decode, read
from tools.fetch import FetchTool
from tools.search import (
    BackendUnavailable,
    LocalIndex,
    Report,
    SearchHit,
    folders_of,
    index_folder,
    indexed_folders,
    open_library,
    remove_folder,
)
from tools.search.folder import shard_path

ROOT = Path(__file__).parents[1]
RUSSIAN = "Привет, как дела и что нового сегодня вечером"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the corpus in it; copying beats building it again."""
    home = tmp_path_factory.mktemp("library")
    open_library(home)
    return home / "search.sqlite"


@pytest.fixture
def home(tmp_path: Path, library: Path) -> Path:
    place = tmp_path / "home"
    place.mkdir()
    (place / "search.sqlite").write_bytes(library.read_bytes())
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "My papers"
    place.mkdir()
    return place


def add(home: Path, folder: Path) -> Report:
    return index_folder(folders_of(home), folder)


def counts(report: Report) -> tuple[int, int, int, int]:
    return report.new, report.changed, report.unchanged, report.removed


def find(home: Path, query: str, count: int = 1) -> list[SearchHit]:
    return asyncio.run(LocalIndex(home / "search.sqlite", folders_of(home)).search(query, count))


def pdf(path: Path, pages: list[str], title: str = "", password: str | None = None, algorithm: str = "RC4-128") -> None:
    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(300, 300)
        content = DecodedStreamObject()
        lines = "".join(f"({line}) Tj 0 -14 Td " for line in text.split("\n"))
        content.set_data(f"BT /F1 12 Tf 20 200 Td {lines}ET".encode("latin-1"))
        page[NameObject("/Contents")] = writer._add_object(content)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
    if title:
        writer.add_metadata({"/Title": title})
    if password is not None:
        writer.encrypt(password, owner_password="owner", algorithm=algorithm)
    writer.write(path)


def test_every_format_is_found_with_a_source_to_cite(home: Path, folder: Path) -> None:
    (folder / "manual.md").write_text("# Coffee machine\n\nDescale it monthly.\n\n## Warranty & repair\n\n731 days.\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "opening_hours.txt").write_text("The canteen opens at noon.")
    (folder / "trip.html").write_text(
        "<html><head><title>Trip</title><script>var canoe = 1</script></head><body><nav>Home</nav><article><h1>Trip to "
        "the lake</h1><p>We hired <b>canoes</b> &amp; paddles.</p><h2>Costs</h2><p>The ferry was 12 euros a person."
        "</p></article></body></html>"
    )
    pdf(
        folder / "lease.pdf",
        ["Nothing much here.", "The deposit is three rents, re-\nturnable in May."],
        "Lease of flat 7",
    )
    report = add(home, folder)
    assert counts(report) == (4, 0, 0, 0)
    assert (report.skipped, report.partial) == ((), ())
    for query, title, text, source, url in [
        ("When must I descale?", "Coffee machine", "Descale it monthly.", "manual.md", "manual.md#coffee-machine"),
        ("machine warranty", "Coffee machine: Warranty & repair", "731 days.", "manual.md",
         "manual.md#warranty-repair"),
        ("When does the canteen open?", "opening hours", "The canteen opens at noon.", "deep/opening_hours.txt",
         "deep/opening_hours.txt"),
        ("canoes", "Trip to the lake", "We hired canoes & paddles.", "trip.html", "trip.html#trip-to-the-lake"),
        ("price of the ferry", "Trip to the lake: Costs", "The ferry was 12 euros a person.", "trip.html",
         "trip.html#costs"),
        ("deposit", "Lease of flat 7", "The deposit is three rents, returnable in May.", "lease.pdf, page 2",
         "lease.pdf#page=2"),
    ]:  # fmt: skip
        assert find(home, query) == [SearchHit(title, text, source, f"My%20papers/{url}")]
    assert find(home, "capital of France")[0].title == "France"


def test_only_new_and_changed_files_are_read_again(home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = DocumentReader.read

    def counted(self: DocumentReader, data: bytes, *rest: str) -> Reading:
        reads.append(len(data))
        return real(self, data, *rest)

    monkeypatch.setattr(DocumentReader, "read", counted)
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"quokka {name}")
    assert counts(add(home, folder)) == (3, 0, 0, 0)
    assert counts(add(home, folder)) == (0, 0, 3, 0)
    assert len(reads) == 3
    os.utime(folder / "a.txt", (1, 1))  # touched, not changed
    assert counts(add(home, folder)) == (0, 0, 3, 0)
    assert len(reads) == 3
    (folder / "b.txt").write_text("wombat b, and quite some more")
    (folder / "c.txt").unlink()
    (folder / "d.txt").write_text("numbat d")
    report = add(home, folder)
    assert counts(report) == (1, 1, 1, 1)
    assert len(reads) == 5
    assert report.passages == 3
    assert [hit.source for hit in find(home, "quokka", 5)] == ["a.txt"]
    assert find(home, "wombat")[0].source == "b.txt"


def test_a_change_that_keeps_size_and_time_apart_is_seen(home: Path, folder: Path) -> None:
    (folder / "a.txt").write_text("quokka")
    add(home, folder)
    before = (folder / "a.txt").stat().st_mtime_ns
    (folder / "a.txt").write_text("wombat")
    os.utime(folder / "a.txt", ns=(before + 1, before + 1))
    assert counts(add(home, folder)) == (0, 1, 0, 0)
    assert find(home, "quokka") == []


def test_what_cannot_be_read_is_named_and_the_rest_is_searched(home: Path, folder: Path) -> None:
    (folder / "good.txt").write_text("quokka")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.md").write_text(" \n")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\n1 0 obj << /Type /Catalog /Pages 9 0 R >>")
    pdf(folder / "whole.pdf", ["text"])
    (folder / "half.pdf").write_bytes((folder / "whole.pdf").read_bytes()[:200])
    pdf(folder / "locked.pdf", ["secret"], password="hunter2")
    pdf(folder / "scan.pdf", [""])
    with (folder / "huge.txt").open("wb") as huge:
        huge.truncate(200 << 20)
    (folder / "nobody.txt").write_text("quokka")
    os.mkfifo(folder / "pipe.txt")
    (folder / "picture.png").write_bytes(b"quokka")
    (folder / ".hidden.txt").write_text("quokka")
    report = add(home, folder)
    reasons = {note.path: note.reason for note in report.skipped}
    assert set(reasons) == {
        "binary.txt", "empty.md", "broken.pdf", "half.pdf", "locked.pdf", "scan.pdf", "huge.txt", "pipe.txt",
    }  # fmt: skip
    assert "isn't text" in reasons["binary.txt"]
    assert "isn't a PDF that can be read" in reasons["broken.pdf"]
    assert "encrypted" in reasons["locked.pdf"]
    assert "scan" in reasons["scan.pdf"]
    assert reasons["huge.txt"] == "has 200 MB; at most 50 are read"
    assert {hit.source for hit in find(home, "quokka", 9)} == {"good.txt", "nobody.txt"}
    again = add(home, folder)
    assert again.new == again.changed == 0
    assert again.skipped == report.skipped


def test_a_pdf_with_an_empty_password_is_read(home: Path, folder: Path) -> None:
    pdf(folder / "printable.pdf", ["quokka"], password="")
    assert add(home, folder).skipped == ()
    assert find(home, "quokka")[0].url == "My%20papers/printable.pdf#page=1"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_named_and_read_when_it_has_them(home: Path, folder: Path) -> None:
    (folder / "private.txt").write_text("quokka")
    (folder / "private.txt").chmod(0)
    assert add(home, folder).skipped[0].path == "private.txt"
    (folder / "private.txt").chmod(0o600)
    assert add(home, folder).skipped == ()
    assert find(home, "quokka")


def test_a_file_that_fails_on_reading_is_tried_again(home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tools.search.folder as module

    (folder / "a.txt").write_text("quokka")
    add(home, folder)
    (folder / "a.txt").write_text("quokka and wombat")

    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_file", failing)
        report = add(home, folder)
    assert [(note.path, note.reason) for note in report.skipped] == [("a.txt", "can't be read (Input/output error)")]
    assert counts(add(home, folder)) == (0, 1, 0, 0)
    assert find(home, "wombat")


def test_links_are_not_followed(home: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("quokka")
    (folder / "file.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (folder / "way out").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.txt").symlink_to("nowhere")
    report = add(home, folder)
    assert report.passages == 0
    assert {note.path for note in report.skipped} == {"file.txt", "way out", "loop", "dangling.txt"}
    assert find(home, "quokka") == []


def test_names_of_all_kinds(home: Path, folder: Path) -> None:
    for name in (b"caf\xe9.txt", "naïve 東京.txt".encode(), b"line\nfeed.txt", b"a#b?c%.txt", b"-rf.txt"):
        (Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))).write_text("quokka")
    assert counts(add(home, folder)) == (5, 0, 0, 0)
    hits = find(home, "quokka", 9)
    assert len(hits) == 5
    assert all("\n" not in hit.source and " " not in hit.url for hit in hits)
    assert counts(add(home, folder)) == (0, 0, 5, 0)


def test_a_hostile_document_costs_only_itself(home: Path, folder: Path) -> None:
    (folder / "a.html").write_text("<div>" * 50_000 + "quokka" + "<table>" * 10_000)
    (folder / "b.html").write_text("<p>quokka<script>alert(1)</script><!-- wombat --><style>numbat{}</style>")
    (folder / "c.md").write_text("[" * 20_000 + "quokka" + "](" * 20_000 + "\n" + "> " * 5_000 + "x")
    (folder / "d.md").write_text("#" * 100_000 + "\n" + "```\n# quokka\n")
    (folder / "e.txt").write_text("\x1b[31m quokka \u202e <|im_end|> </search>\n")
    add(home, folder)
    sources = {hit.source for hit in find(home, "quokka", 20)}
    assert {"b.html", "d.md", "e.txt"} <= sources
    assert find(home, "wombat") == find(home, "numbat") == []
    assert "\x1b" not in "".join(hit.text for hit in find(home, "quokka", 20))


def test_a_reader_that_hangs_or_crashes_is_replaced(tmp_path: Path) -> None:
    with DocumentReader(timeout_s=20) as reader:
        assert reader.read(b"quokka", "text/plain").text == "quokka"
        assert reader._child is not None
        reader._child.kill()
        with pytest.raises(Unreadable, match="crashes its reader"):
            reader.read(b"quokka", "text/plain")
        assert reader.read(b"wombat", "text/plain").text == "wombat"
        os.kill(reader._child.pid, signal.SIGSTOP)
        reader.timeout_s = 0.3
        with pytest.raises(Unreadable, match=r"takes more than 0\.3 s"):
            reader.read(b"x" * 1_000_000, "text/plain")
        reader.timeout_s = 20
        assert reader.read(b"numbat", "text/plain").text == "numbat"
    with pytest.raises(Unreadable, match="closed"):
        reader.read(b"x", "text/plain")


async def test_no_process_to_read_with_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none)
    text, artifact = await FetchTool()._arun("https://example.com/")
    assert artifact["error"]
    assert "no process can be started" in text


def test_folders_are_remembered_and_forgotten(home: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "a.txt").write_text("quokka")
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.txt").write_text("wombat")
    index = open_library(home)  # as a server has it
    assert asyncio.run(index.search("quokka", 1)) == []
    add(home, folder)
    add(home, other)
    assert asyncio.run(index.search("quokka", 1))[0].source == "a.txt"
    assert asyncio.run(index.search("wombat", 1))[0].source == "b.txt"
    listed = indexed_folders(folders_of(home))
    assert {item.folder for item in listed} == {folder, other}
    assert all((item.files, item.passages, item.added, item.present) == (1, 1, True, True) for item in listed)
    assert remove_folder(folders_of(home), folder)
    assert not remove_folder(folders_of(home), folder)
    assert asyncio.run(index.search("quokka", 1)) == []
    assert asyncio.run(index.search("wombat", 1))
    assert (folder / "a.txt").exists()


def test_a_folder_of_the_setting_is_searched_by_that_setting_only(home: Path, folder: Path) -> None:
    (folder / "a.txt").write_text("quokka")
    assert asyncio.run(open_library(home, folder).search("quokka", 1))
    assert asyncio.run(open_library(home).search("quokka", 1)) == []
    add(home, folder)
    assert asyncio.run(open_library(home).search("quokka", 1))
    open_library(home, folder)  # the setting doesn't take away what a person added
    assert asyncio.run(open_library(home).search("quokka", 1))


def test_a_folder_that_vanishes_is_said(home: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "a.txt").write_text("quokka")
    add(home, folder)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(BackendUnavailable, match=r"My papers is gone; bring it back, or .*index remove"):
        find(home, "quokka")
    assert find(home, "capital of France")[0].title == "France"
    assert not indexed_folders(folders_of(home))[0].present
    with pytest.raises(NotADirectoryError, match="doesn't exist"):
        add(home, folder)
    with pytest.raises(NotADirectoryError, match="isn't a folder"):
        add(home, tmp_path / "elsewhere" / "a.txt")
    assert remove_folder(folders_of(home), folder)
    assert find(home, "quokka") == []


def test_an_index_that_vanishes_is_said(home: Path, folder: Path) -> None:
    (folder / "a.txt").write_text("quokka")
    index = open_library(home, folder)
    shard_path(folders_of(home), folder).unlink()
    with pytest.raises(BackendUnavailable, match="is gone; restart Whetstone"):
        asyncio.run(index.search("quokka", 1))
    assert asyncio.run(index.search("capital of Ghana", 1))[0].title == "Ghana"
    assert asyncio.run(open_library(home, folder).search("quokka", 1))
    index.path.unlink()
    with pytest.raises(BackendUnavailable, match="is gone; restart Whetstone"):
        asyncio.run(index.search("gold", 1))


@pytest.mark.parametrize("damage", [b"", b"not a database" * 2000, None])
def test_a_damaged_index_is_said_and_built_anew(home: Path, folder: Path, damage: bytes | None) -> None:
    (folder / "a.txt").write_text("quokka " * 100 + "wombat")
    add(home, folder)
    path = shard_path(folders_of(home), folder)
    if damage is None:  # right at the beginning, rubbish behind it
        data = bytearray(path.read_bytes())
        data[4096:] = os.urandom(len(data) - 4096)
        damage = bytes(data)
    path.write_bytes(damage)
    if damage:
        with pytest.raises(BackendUnavailable, match=r"can't be read .* run `whetstone index add`"):
            find(home, "wombat")
        assert find(home, "capital of France")[0].title == "France"
    assert counts(add(home, folder))[0] == 1
    assert find(home, "wombat")


def test_a_killed_build_leaves_a_whole_index_and_is_gone_on_with(home: Path, folder: Path) -> None:
    (folder / "a.txt").write_text("quokka before")
    add(home, folder)
    (folder / "a.txt").write_text("quokka afterwards")
    for number in range(300):
        (folder / f"b{number:03}.txt").write_text(f"wombat {number}")
    program = (
        "import os, signal, sys; from pathlib import Path; from tools.search import index_folder\n"
        "def step(done, total, name):\n"
        "    if done == 150: os.kill(os.getpid(), signal.SIGKILL)\n"
        "index_folder(Path(sys.argv[1]), Path(sys.argv[2]), progress=step)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, folders_of(home), folder], cwd=ROOT, check=False)
    assert ran.returncode == -signal.SIGKILL
    assert [hit.text for hit in find(home, "quokka", 3)] == ["quokka afterwards"]
    assert len(find(home, "wombat", 20)) == 20
    report = add(home, folder)
    assert counts(report) == (151, 0, 150, 0)
    with closing(sqlite3.connect(shard_path(folders_of(home), folder))) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM documents").fetchone() == (301,)


def test_searching_goes_on_while_a_folder_is_read(home: Path, folder: Path) -> None:
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"quokka {number}")
    seen = []

    def step(done: int, total: int, name: str) -> None:
        if done % 50 == 0:
            began = time.monotonic()
            seen.append(len(find(home, "quokka", 300)))
            assert time.monotonic() - began < 2
            assert find(home, "capital of France")[0].title == "France"

    index_folder(folders_of(home), folder, progress=step)
    assert seen == [0, 50, 50, 50, 50]  # a query looks at the 50 best of a folder


def test_two_builds_at_once_agree(home: Path, folder: Path) -> None:
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"quokka {number}")
    program = "import sys; from pathlib import Path; from tools.search import index_folder\n" + (
        "index_folder(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, str(folders_of(home)), str(folder)]
    builds = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [build.wait(60) for build in builds] == [0, 0]
    assert counts(add(home, folder)) == (0, 0, 40, 0)
    assert indexed_folders(folders_of(home))[0].passages == 40


def test_a_title_that_many_passages_share_doesnt_hide_the_right_one(home: Path, folder: Path) -> None:
    pages = [f"page {number} of plain words" for number in range(120)]
    pages[97] = "the quokka sleeps here"
    pdf(folder / "zoo guide.pdf", pages)
    add(home, folder)
    assert find(home, "where does the zoo guide say that the quokka sleeps?")[0].url.endswith("#page=98")


def test_the_corpus_answers_as_before_beside_a_folder(home: Path, folder: Path) -> None:
    (folder / "notes.md").write_text("# Notes\n\nI like the capital of France, its population and gold.\n")
    add(home, folder)
    for query, title in [
        ("capital of France", "France"),
        ("What is the population of Lyon?", "Lyon"),
        ("atomic mass gold", "Gold"),
        ("the capital of Georgia", "Georgia"),
    ]:
        (hit,) = find(home, query)
        assert (hit.title, hit.url) == (title, "")


def test_passages_are_short_and_whole() -> None:
    text = "\n\n".join(f"paragraph {n} " + "word " * (n % 400) for n in range(60)) + "\n\n" + "x" * 3000
    found = [passage.text for passage in passages(Reading("", (Section(text),)))]
    assert all(0 < len(passage) <= 700 for passage in found)
    assert "".join("".join(found).split()) == "".join(text.split())


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=400), media_type=st.sampled_from(["text/plain", "text/markdown"]))
def test_any_text_can_be_read(text: str, media_type: str) -> None:
    try:
        reading = read(text.encode("utf-8", "replace"), media_type)
    except Unreadable:
        return
    assert all(passage.text.strip() for passage in passages(reading))


def test_a_page_keeps_its_own_characters() -> None:
    page = (
        b"<html><head><title>Tips</title></head><body><article><h1>The a_b [x]</h1><p>If x &lt; 5, then a*b*c is "
        b"some_name[0] in C:\\dir and C:\\_d.</p><p># of 2</p><pre><code>if a &lt; b: print('\\*')</code></pre>"
        b"</article></body></html>"
    )
    reading = read(page, "text/html")
    assert reading.sections[0].heading == "The a_b [x]"
    for part in ("If x < 5, then a*b*c is some_name[0] in C:\\dir and C:\\_d.", "\n# of 2", "a < b: print('\\*')"):
        assert part in reading.text


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300), media_type=st.sampled_from(["text/plain", "text/html", "application/pdf"]))
def test_no_bytes_break_a_reader(data: bytes, media_type: str) -> None:
    try:
        text = read(data, media_type).text
    except Unreadable:
        return
    assert text.strip()


@pytest.mark.parametrize(
    ("data", "charset", "text"),
    [
        ("naïve".encode(), "", "naïve"),
        ("naïve".encode("latin-1"), "", "naïve"),
        ("naïve".encode("latin-1"), "iso-8859-1", "naïve"),
        ("naïve “quote”".encode("cp1252"), "iso-8859-1", "naïve “quote”"),
        ("naïve".encode(), "ascii-nonsense", "naïve"),
        ("東京の天気".encode("shift-jis"), "shift_jis", "東京の天気"),
        (RUSSIAN.encode("cp1251"), "utf-8", RUSSIAN),
        ("naïve".encode("utf-16"), "utf-8", "naïve"),
        ("\ufeffnaïve".encode(), "latin-1", "naïve"),
        (b"6e61", "hex", "6e61"),
        (b"naive", "punycode", "naive"),
    ],
)
def test_charsets(data: bytes, charset: str, text: str) -> None:
    assert decode(data, charset) == text


def test_a_heading_in_a_block_of_code_is_no_heading() -> None:
    text = "---\ntitle: The manual\n---\n# One\n\n```sh\n# not a heading\n```\n\nTwo\n===\nmore\n\n# Empty\n"
    reading = read(text.encode(), "text/markdown")
    assert reading.title == "The manual"
    assert [(section.heading, section.anchor) for section in reading.sections] == [("One", "one"), ("Two", "two")]


def test_the_command(tmp_path: Path, home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHETSTONE_HOME", str(home))
    (folder / "a.txt").write_text("quokka")
    (folder / "b.txt").write_bytes(b"\0\1\2")
    run = CliRunner()
    added = run.invoke(app, ["index", "add", str(folder), "--json"])
    report = json.loads(added.stdout)
    assert (report["new"], report["passages"], report["skipped"][0]["path"]) == (2, 1, "b.txt")
    monkeypatch.setenv("WHETSTONE_SEARCH_BACKENDS", "ddgs,local")
    assert "Search asks ddgs first" in run.invoke(app, ["index", "add", str(folder)]).stdout
    monkeypatch.setenv("WHETSTONE_SEARCH_BACKENDS", "ddgs")
    assert "search_backends lacks local" in run.invoke(app, ["index", "add", str(folder)]).stdout
    monkeypatch.setenv("WHETSTONE_SEARCH_BACKENDS", "local")
    assert "search_backends" not in run.invoke(app, ["index", "add", str(folder)]).stdout
    assert "b.txt isn't text" in run.invoke(app, ["index", "add", str(folder)]).stdout
    assert "My%20papers/a.txt" in run.invoke(app, ["index", str(folder), "--query", "quokka"]).stdout
    (listed,) = json.loads(run.invoke(app, ["index", "list", "--json"]).stdout)
    assert (listed["folder"], listed["files"], listed["skipped"]) == (str(folder), 1, 1)
    assert "Paris" in run.invoke(app, ["index", "--query", "capital of France"]).stdout
    assert run.invoke(app, ["index", "remove", str(folder)]).exit_code == 0
    missing = run.invoke(app, ["index", "remove", str(folder)])
    assert (missing.exit_code, "isn't indexed" in missing.stderr) == (1, True)
    nowhere = run.invoke(app, ["index", "add", str(tmp_path / "nowhere")])
    assert (nowhere.exit_code, "doesn't exist" in nowhere.stderr) == (1, True)
    assert "No folder is indexed" in run.invoke(app, ["index", "list"]).stdout
