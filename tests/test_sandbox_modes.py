"""The ways of starting interpreters that are second choice: what they must confine all the same."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import tools.python.sandbox as sandbox_module
from tests.hostile_programs import FILES, FORGERIES, KERNEL, NETWORK, OUTPUT, PRELUDE, PROCESSES, SIGNALS, Hostile
from tests.sandbox_watch import NOBODY, descendants, statuses
from tools.python import Bubblewrap, Limits
from tools.python.spawn import spawners

pytestmark = [
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap"),
    pytest.mark.asyncio(loop_scope="module"),
]

LIMITS = Limits(
    wall_s=30.0, cpu_s=2, memory_bytes=256 << 20, tmp_bytes=8 << 20, files_bytes=8 << 20, file_bytes=4 << 20, images=2
)
# The kernel counts no threads of root's, who is the user outside: there the address space ends a thread bomb
ROOT_S = {"thread bomb"} if os.getuid() == 0 else set()
# A cold interpreter may execute, and what it executes is as confined; it has no /proc at all, and no supervisor
COLD_S = {
    "exec in its place", "exec of a written file", "mapping a written file", "setuid files", "the channel closed",
    "walking through /proc", "stopping its parent", "interrupting its parent", "devices", "nothing else can be written",
}  # fmt: skip
WARM = [*PROCESSES, *KERNEL, *SIGNALS, *FILES, *NETWORK, *OUTPUT, *FORGERIES]
COLD = [*PROCESSES, *SIGNALS, *FILES, *NETWORK]
CASES = [("warm", hostile) for hostile in WARM if hostile.name not in ROOT_S and not hostile.hurried]
CASES += [("cold", hostile) for hostile in COLD if hostile.name not in ROOT_S | COLD_S and not hostile.hurried]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandboxes() -> AsyncIterator[dict[str, Bubblewrap]]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for mode in ("warm", "cold"):
            patch.setattr(sandbox_module, "spawners", lambda *a, mode=mode, **k: (only(mode, *a, **k), ""))
            found[mode] = Bubblewrap(LIMITS, (), idle=2)
    yield found
    for backend in found.values():
        await asyncio.to_thread(backend.close)
    assert descendants(os.getpid()) == set()


def only(mode: str, *arguments: object, **options: object) -> list[object]:
    return [one for one in spawners(*arguments, **options)[0] if one.mode == mode]  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "hostile"), CASES, ids=lambda value: getattr(value, "name", value))
async def test_hostile(mode: str, hostile: Hostile, sandboxes: dict[str, Bubblewrap], tmp_path: Path) -> None:
    if mode == "warm" and os.getuid() != 0:
        pytest.skip("an ordinary user's first choice, which all of the hostile programs attack")
    if hostile.x86 and platform.machine() != "x86_64":
        pytest.skip("names system calls by their numbers on x86-64")
    (tmp_path / "secret").write_text("hunter2")
    facts = {"server": os.getpid(), "port": 9, "secret": tmp_path / "secret"}
    result = await sandboxes[mode].run(hostile.source(**facts))
    told = f"{hostile.name} must not {hostile.must_not}:\n{result}"
    assert sandboxes[mode].mode == mode
    assert "ESCAPED" not in result.text, told
    assert "hunter2" not in result.text, told
    assert re.search(hostile.shows, result.text), told
    assert hostile.exit_code is None or result.exit_code == hostile.exit_code, told
    assert result.truncated == hostile.truncated, told
    assert (await sandboxes[mode].run("6 * 7")).text == "42\n"


async def test_another_program_in_its_place_is_as_confined(sandboxes: dict[str, Bubblewrap]) -> None:
    inner = "import os; print(os.getuid(), os.path.exists('/etc/passwd')); os.fork()"
    program = f"import os\nos.execv('/python/bin/python', ['/python/bin/python', '-S', '-c', {inner!r}])"
    text = (await sandboxes["cold"].run(program)).text
    assert f"{NOBODY} False\n" in text
    assert "PermissionError" in text


async def test_a_cold_interpreter_can_t_change_the_machine_s_devices(sandboxes: dict[str, Bubblewrap]) -> None:
    """Not even with a server that owns them, whose user a cold interpreter is outside."""
    change = "for file in [*('/dev/' + name for name in os.listdir('/dev') if name != 'shm'), 0, 1, 2]:\n"
    change += "    if stat.S_ISCHR(os.stat(file).st_mode): attempt(file, lambda: same_mode(file))\nprint('tried')"
    text = (await sandboxes["cold"].run(PRELUDE + change)).text
    assert re.fullmatch("(refused .*\n)*tried\n", text), text


async def test_what_a_program_leaves_is_gone(sandboxes: dict[str, Bubblewrap]) -> None:
    look = "import os\n[os.listdir(folder) for folder in ('/tmp', '/mnt/data', '/dev/shm')]"
    leave = "for folder in ('/tmp', '/mnt/data', '/dev/shm'): open(folder + '/leak', 'w').close()"
    for mode in ("warm", "cold"):
        await sandboxes[mode].run(leave)
        assert (await sandboxes[mode].run(look)).text == "[[], [], []]\n"
        await sandboxes[mode].run("x = 1", session="s")
        kept = await sandboxes[mode].run("x", session="s")
        assert (kept.text, kept.fresh) == ("1\n", False)


@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user's programs are its own in every way of starting them")
async def test_who_runs_them(sandboxes: dict[str, Bubblewrap]) -> None:
    """In a user namespace a server that is root stays root outside, as the sandbox's docstring says."""
    found = statuses(descendants(os.getpid())).values()
    assert {status["Uid"].split()[0] for status in found if status["Name"].startswith("python")} == {"0"}
