"""A conversation's files: kept whole, within bounds, and where no name or link leads out of."""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tools.file_rules import check_name
from tools.python.backend import File
from tools.workspace import BadImage, BadName, FileMissing, WorkspaceError, WorkspaceFull, Workspaces

CONVERSATION = "conv_01jd8v0s3kx7q2m4np"


@pytest.fixture
def workspaces(tmp_path: Path) -> Workspaces:
    return Workspaces(tmp_path / "files", max_bytes=10_000, max_files=5)


def png(width: int = 4, height: int = 4) -> bytes:
    drawn = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(drawn, "PNG")
    return drawn.getvalue()


def test_a_file_is_kept_listed_read_replaced_and_removed(workspaces: Workspaces) -> None:
    assert workspaces.files(CONVERSATION) == []
    workspaces.write(CONVERSATION, "sales.csv", b"a,b\n")
    info = workspaces.write(CONVERSATION, "sales.csv", b"a,b\n1,2\n")
    workspaces.write(CONVERSATION, "Überblick 2024 (1).txt", b"")
    assert (info.name, info.bytes, info.media_type) == ("sales.csv", 8, "text/csv")
    assert info.modified_at.tzinfo is not None
    assert [file.name for file in workspaces.files(CONVERSATION)] == ["sales.csv", "Überblick 2024 (1).txt"]
    assert workspaces.read(CONVERSATION, "sales.csv") == b"a,b\n1,2\n"
    assert workspaces.path(CONVERSATION, "sales.csv").read_bytes() == b"a,b\n1,2\n"
    assert workspaces.load(CONVERSATION)[1] == File("Überblick 2024 (1).txt", b"")
    workspaces.remove(CONVERSATION, "sales.csv")
    with pytest.raises(FileMissing, match=r"sales\.csv"):
        workspaces.read(CONVERSATION, "sales.csv")
    with pytest.raises(FileMissing):
        workspaces.remove(CONVERSATION, "sales.csv")


def test_a_figure_is_kept_once_by_its_content_and_apart_from_files(workspaces: Workspaces) -> None:
    name = workspaces.write_image(CONVERSATION, png())
    assert workspaces.write_image(CONVERSATION, png()) == name
    assert workspaces.write_image(CONVERSATION, png(5)) != name
    assert workspaces.read_image(CONVERSATION, name) == png()
    assert workspaces.image_path(CONVERSATION, name).is_file()
    assert workspaces.files(CONVERSATION) == []
    with pytest.raises(FileMissing):
        workspaces.read(CONVERSATION, name)


def test_conversations_are_apart_and_forgetting_leaves_nothing(workspaces: Workspaces) -> None:
    workspaces.write(CONVERSATION, "mine.txt", b"mine")
    workspaces.write_image(CONVERSATION, png())
    workspaces.write("conv_other", "theirs.txt", b"theirs")
    with pytest.raises(FileMissing):
        workspaces.read("conv_other", "mine.txt")
    workspaces.forget(CONVERSATION)
    workspaces.forget(CONVERSATION)
    assert workspaces.files(CONVERSATION) == []
    assert sorted(os.listdir(workspaces.root)) == ["conv_other"]
    workspaces.write(CONVERSATION, "new.txt", b"")
    assert len(workspaces.files(CONVERSATION)) == 1


BAD_NAMES = [
    "", " ", ".", "..", ".profile", "../up", "/etc/passwd", "a/b", "a\\b", "..\\up", "a\x00b", "a\nb", "a\u202egnp.exe",
    "zero\u200bwidth", "cafe\u0301", " lead", "trail ", "\udc80", "line\u2028", "x" * 121, "é" * 61, "\x7f", "a\tb",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_everywhere(workspaces: Workspaces, name: str) -> None:
    for call in (workspaces.read, workspaces.path, workspaces.remove, workspaces.image_path, workspaces.open):
        with pytest.raises(BadName, match="can't be called"):
            call(CONVERSATION, name)
    with pytest.raises(BadName):
        workspaces.write(CONVERSATION, name, b"")
    assert not workspaces.root.exists()


@pytest.mark.parametrize("id_", ["", ".", "..", "../x", "a/b", "a b", "a\n", "x" * 65, "conv\x00", "ä"])
def test_an_id_that_is_none_is_refused(workspaces: Workspaces, id_: str) -> None:
    for call in (workspaces.files, workspaces.load, workspaces.forget):
        with pytest.raises(BadName):
            call(id_)
    with pytest.raises(BadName):
        workspaces.write(id_, "a", b"")


@given(name=st.text(max_size=150))
def test_what_passes_as_a_name_stays_in_its_folder(name: str) -> None:
    try:
        check_name(name)
    except BadName:
        return
    assert os.path.basename(name) == name not in (".", "..")
    assert len(os.fsencode(name)) <= 120
    assert name.isprintable() or any(character.isspace() for character in name)


@pytest.mark.parametrize(("first", "second"), [("Data.csv", "data.CSV"), ("K.txt", "\u212a.txt"), ("ss.md", "ß.md")])
def test_names_that_look_alike_are_not_two_files(workspaces: Workspaces, first: str, second: str) -> None:
    workspaces.write(CONVERSATION, first, b"1")
    with pytest.raises(BadName):
        workspaces.write(CONVERSATION, second, b"2")
    with pytest.raises(BadName, match=r"looks like|composed"):
        workspaces.write_all("conv_2", [File(first, b""), File(second, b"")])
    assert workspaces.files("conv_2") == []


def test_several_are_kept_together_or_not_at_all(workspaces: Workspaces) -> None:
    workspaces.write(CONVERSATION, "old.txt", b"old")
    refused = [
        [File("a", b""), File("../b", b"")],
        [File("a", b""), File("a", b"")],
        [File("a", b"x" * 9_000), File("b", b"x" * 2_000)],
        [File(str(number), b"") for number in range(5)],
    ]
    for files in refused:
        with pytest.raises(WorkspaceError):
            workspaces.write_all(CONVERSATION, files)
        assert [file.name for file in workspaces.files(CONVERSATION)] == ["old.txt"]
    assert len(workspaces.write_all(CONVERSATION, [File("a", b"1"), File("old.txt", b"new")])) == 2
    assert workspaces.read(CONVERSATION, "old.txt") == b"new"


def test_the_room_of_a_conversation_is_bounded_and_says_the_way_out(workspaces: Workspaces) -> None:
    workspaces.write(CONVERSATION, "big", b"x" * 9_990)
    with pytest.raises(WorkspaceFull, match="WHETSTONE_FILES_MB"):
        workspaces.write(CONVERSATION, "more", b"x" * 11)
    with pytest.raises(WorkspaceFull):
        workspaces.write_image(CONVERSATION, png())
    workspaces.write(CONVERSATION, "more", b"x" * 10)
    workspaces.write(CONVERSATION, "big", b"")  # what it takes the place of doesn't count
    for number in range(3):
        workspaces.write(CONVERSATION, str(number), b"")
    with pytest.raises(WorkspaceFull, match="may have 5"):
        workspaces.write(CONVERSATION, "sixth", b"")
    workspaces.write(CONVERSATION, "2", b"again")


def test_links_and_other_things_in_the_way_are_never_followed(workspaces: Workspaces, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    workspaces.write(CONVERSATION, "real", b"")
    folder = workspaces.root / CONVERSATION / "files"
    (folder / "link").symlink_to(secret)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for name in ("link", "folder", "pipe"):
        with pytest.raises(FileMissing):
            workspaces.read(CONVERSATION, name)
        with pytest.raises(FileMissing):
            workspaces.path(CONVERSATION, name)
    assert [file.name for file in workspaces.load(CONVERSATION)] == ["real"]
    workspaces.write(CONVERSATION, "link", b"mine")
    assert secret.read_text() == "secret"
    assert workspaces.read(CONVERSATION, "link") == b"mine"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (workspaces.root / "conv_link").symlink_to(elsewhere)
    for call in (workspaces.files, workspaces.forget):
        with pytest.raises(FileMissing, match="isn't a folder"):
            call("conv_link")
    with pytest.raises(FileMissing):
        workspaces.write("conv_link", "a", b"")
    assert list(elsewhere.iterdir()) == []


def test_forgetting_does_not_follow_a_link(workspaces: Workspaces, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    workspaces.write(CONVERSATION, "a", b"")
    (workspaces.root / CONVERSATION / "files" / "away").symlink_to(kept)
    workspaces.forget(CONVERSATION)
    assert (kept / "file").read_text() == "kept"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_sides(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        png()[:-20],
        png()[:40] + b"\xff" + png()[41:],
        png_of_sides(4097, 1),
        png_of_sides(65_000, 65_000),
        png_of_sides(0, 4),
    ],
)
def test_what_is_no_figure_is_refused(workspaces: Workspaces, data: bytes) -> None:
    with pytest.raises(BadImage, match="figure"):
        workspaces.write_image(CONVERSATION, data)
    assert not (workspaces.root / CONVERSATION).exists()


def test_a_jpeg_is_no_figure(workspaces: Workspaces) -> None:
    drawn = io.BytesIO()
    Image.new("RGB", (4, 4)).save(drawn, "JPEG")
    with pytest.raises(BadImage):
        workspaces.write_image(CONVERSATION, drawn.getvalue())


def test_a_writer_that_died_leaves_nothing_that_counts(workspaces: Workspaces) -> None:
    workspaces.write(CONVERSATION, "a", b"")
    folder = workspaces.root / CONVERSATION / "files"
    (folder / ".part-dead").write_bytes(b"x" * 50_000)
    assert [file.name for file in workspaces.files(CONVERSATION)] == ["a"]
    workspaces.write(CONVERSATION, "b", b"")
    assert sorted(os.listdir(folder)) == ["a", "b"]


def test_threads_do_not_pass_the_bounds_together(workspaces: Workspaces) -> None:
    def write(number: int) -> bool:
        try:
            workspaces.write(CONVERSATION, f"{number}.txt", b"x" * 10)
        except WorkspaceFull:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(24))) == 5
    assert len(workspaces.files(CONVERSATION)) == 5


def test_a_reader_sees_one_version_or_the_other(workspaces: Workspaces) -> None:
    versions = [bytes([letter]) * 4_000 for letter in b"ab"]
    workspaces.write(CONVERSATION, "f", versions[0])
    done = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(workspaces.read(CONVERSATION, "f"))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        workspaces.write(CONVERSATION, "f", versions[number % 2])
    done.set()
    reader.join()
    assert seen <= set(versions)


def _write_and_forget(root: Path, mine: int) -> None:
    workspaces = Workspaces(root)
    for number in range(15):
        workspaces.write(CONVERSATION, f"{mine}-{number}", b"x")
        if number % 5 == 4:
            workspaces.forget(CONVERSATION)


def test_processes_write_and_forget_at_the_same_time(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=_write_and_forget, args=(tmp_path, mine)) for mine in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    Workspaces(tmp_path).forget(CONVERSATION)
    assert list(tmp_path.iterdir()) == []
