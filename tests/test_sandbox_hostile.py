"""Hostile programs: what each must not achieve; that the next program runs as if nothing had been; and as two users."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.hostile_programs import ALL, Hostile
from tests.sandbox_watch import (
    NOBODY,
    REPOSITORY,
    Rest,
    as_ordinary_user,
    descendants,
    forget_peak,
    memory,
    peak,
    statuses,
)
from tools.python import Bubblewrap, Limits, PythonResult

pytestmark = [
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap"),
    pytest.mark.asyncio(loop_scope="module"),
]

LIMITS = Limits(
    wall_s=30.0, cpu_s=1, memory_bytes=256 << 20, tmp_bytes=8 << 20, files_bytes=8 << 20, file_bytes=4 << 20, images=2
)  # a busy machine may take its time, the program may not
HURRIED = Limits(wall_s=0.6, cpu_s=1, memory_bytes=256 << 20, tmp_bytes=8 << 20)
GROWTH = 64 << 20  # of the server, in bytes, while one hostile program runs
SECRET = "hunter2"
LOOK_ROUND = "import os\n6 * 7, os.listdir('/tmp'), os.listdir('/mnt/data'), os.listdir('/dev/shm')"


@dataclass
class OtherRun:
    """This file, run by an ordinary user at the same time."""

    process: subprocess.Popen[bytes] | None
    output: Path
    why_not: str

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherRun]:
    output = tmp_path_factory.mktemp("ordinary") / "output.txt"
    command, why_not = as_ordinary_user([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__])
    process = None
    if not why_not:
        environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", "LANG": "C.UTF-8"}
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
    yield OtherRun(process, output, why_not)
    if process is not None:
        process.kill()
        process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandboxes(other_run: OtherRun) -> AsyncIterator[dict[bool, Bubblewrap]]:
    """By whether the program is hurried. Each keeps a session, which no program may disturb."""
    os.environ["WHETSTONE_API_KEY"] = SECRET
    found = {False: Bubblewrap(LIMITS, ("numpy",), idle=2), True: Bubblewrap(HURRIED, ("numpy",), idle=2)}
    for backend in found.values():
        assert (await backend.run("kept = 'here'", session="neighbour")).fresh
    yield found
    for backend in found.values():
        backend.close()
    del os.environ["WHETSTONE_API_KEY"]
    assert descendants(os.getpid(), other_run.pid) == set()


@pytest.fixture(scope="module")
def listening() -> Iterator[socket.socket]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.setblocking(False)
        yield server


@pytest.fixture(scope="module")
def abstract_name() -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as server:
        server.bind(f"\0whetstone-test-{os.getpid()}")
        server.setblocking(False)
        yield server


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("server") / "secret.txt"
    path.write_text(SECRET)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rest(
    sandboxes: dict[bool, Bubblewrap], listening: socket.socket, abstract_name: socket.socket, other_run: OtherRun
) -> Rest:
    return await Rest.of_now(without=other_run.pid)


@pytest.mark.parametrize("hostile", ALL, ids=lambda hostile: hostile.name)
async def test_hostile(
    hostile: Hostile,
    sandboxes: dict[bool, Bubblewrap],
    rest: Rest,
    listening: socket.socket,
    abstract_name: socket.socket,
    secret: Path,
) -> None:
    if hostile.x86 and platform.machine() != "x86_64":
        pytest.skip("names system calls by their numbers on x86-64")
    backend, limits = sandboxes[hostile.hurried], HURRIED if hostile.hurried else LIMITS
    before, had = descendants(os.getpid(), rest.without), memory()
    forget_peak()

    result = await backend.run(hostile.source(server=os.getpid(), port=listening.getsockname()[1], secret=secret))

    told = f"{hostile.name} must not {hostile.must_not}:\n{result}"
    assert "ESCAPED" not in result.text, told
    assert SECRET not in result.text, told
    assert re.search(hostile.shows, result.text), told
    assert hostile.exit_code is None or result.exit_code == hostile.exit_code, told
    assert result.timed_out or not hostile.timed_out, told
    assert result.truncated == hostile.truncated, told
    check_bounds(result, limits)
    assert peak() < had + GROWTH, told
    assert os.listdir(secret.parent) == [secret.name], told
    with pytest.raises(BlockingIOError):
        listening.accept()
    with pytest.raises(BlockingIOError):
        abstract_name.recv(10)

    kept = await backend.run("kept", session="neighbour")
    assert (kept.text, kept.fresh) == ("'here'\n", False), told
    after = await sandboxes[False].run(LOOK_ROUND)
    assert (after.text, after.exit_code, after.fresh) == ("(42, [], [], [])\n", 0, True), told
    await rest.comes_back(before, gone=4)  # its interpreter and the supervisor of that, and the next program's


def check_bounds(result: PythonResult, limits: Limits) -> None:
    assert len(result.text.encode()) <= 3 * limits.output_bytes + 100  # a byte that is no text is shown by three
    assert 0 <= result.exit_code <= 255
    assert len(result.files) <= limits.files
    assert len(result.images) <= limits.images
    assert sum(len(file.data) for file in result.files) <= limits.files_bytes
    for file in result.files:
        assert "/" not in file.name
        assert file.name.isprintable()
        assert file.name[0] != "."
        assert len(file.name.encode()) <= 255
    if not result.timed_out:
        assert result.seconds < limits.wall_s + 2  # one that hangs up is given a moment to end


async def test_there_are_enough_of_them() -> None:
    assert len({(hostile.name, hostile.code) for hostile in ALL}) == len(ALL) >= 250


async def test_who_runs_them(sandboxes: dict[bool, Bubblewrap], rest: Rest) -> None:
    """Seen from outside, a root server's programs are nobody's, and any other server's are its own user's."""
    assert sandboxes[False].mode == ("warm, as nobody" if os.getuid() == 0 else "warm")
    await rest.comes_back()
    await asyncio.sleep(0.3)  # what has just been forked gives up its rights
    found = statuses(descendants(os.getpid(), rest.without)).values()
    python = [status for status in found if status["Name"] != "bwrap"]
    assert len(python) == 2 * (1 + 2 * 3)  # a zygote; two that wait and one that is kept, each with its supervisor
    user = NOBODY if os.getuid() == 0 else os.getuid()
    assert {status["Uid"] for status in python} == {f"{user}\t{user}\t{user}\t{user}"}
    interpreters = [status for status in python if status["Seccomp"] == "2"]
    assert len(interpreters) == 2 * 3
    for status in interpreters:
        assert status["NoNewPrivs"] == "1"
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}


async def test_the_server_hasn_t_grown(sandboxes: dict[bool, Bubblewrap]) -> None:
    """What a hundred floods and forgeries leave in its memory."""
    backend = sandboxes[False]
    flood = "import os\nos.write(1, bytes(60_000))"
    for _ in range(5):
        await backend.run(flood)
    had = memory()
    for _ in range(100):
        assert (await backend.run(flood)).truncated
    assert memory() - had < 8 << 20


async def test_the_same_for_an_ordinary_user(other_run: OtherRun) -> None:
    """All of this file once more, with a server that isn't root."""
    if other_run.process is None:
        pytest.skip(other_run.why_not)
    code = await asyncio.to_thread(other_run.process.wait, 300)
    said = other_run.output.read_text()
    assert code == 0, said[-8000:]
    passed = re.search(r"(\d+) passed, 1 skipped", said)
    assert passed, said[-1000:]
    assert int(passed[1]) >= len(ALL)
