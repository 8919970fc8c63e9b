"""What a program gets and what it gives back: libraries, values, files and figures, in each way of starting it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from PIL import Image

from tests.hostile_programs import PRELUDE
from tools.context import ToolContext, config_of
from tools.python import Bubblewrap, File, Limits, PythonTool, SandboxUnavailable
from tools.python.packages import top_levels
from tools.python.pool import WarmPool
from tools.python.spawn import Alone, ForkServer
from tools.workspace import Workspaces

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")

LIMITS = Limits(wall_s=30.0, cpu_s=10, files=5, files_bytes=2 << 20, file_bytes=1 << 20, images=3)
PACKAGES = ("numpy", "scipy", "sympy", "pandas", "matplotlib")


@pytest.fixture(scope="module")
def backend() -> Iterator[Bubblewrap]:
    made = Bubblewrap(LIMITS, PACKAGES, idle=1)
    yield made
    made.close()


@pytest.fixture
def bare() -> Iterator[Callable[..., Bubblewrap]]:
    """A backend with one given way of starting interpreters."""
    made: list[Bubblewrap] = []

    def new(*spawners: ForkServer | Alone) -> Bubblewrap:
        one = Bubblewrap(LIMITS, (), idle=1)
        one._pool = WarmPool(list(spawners), 1)
        made.append(one)
        return one

    yield new
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("program", "shows"),
    [
        ("import numpy as np\nnp.arange(4).sum()", "np.int64(6)\n"),
        ("from scipy import optimize\nround(optimize.brentq(lambda x: x**2 - 2, 0, 2), 6)", "1.414214\n"),
        ("import sympy as s\nx = s.Symbol('x')\ns.integrate(2 * x, x)", "x**2\n"),
        ("import pandas as pd\npd.Series([1, 2, 3]).mean()", "np.float64(2.0)\n"),
        ("import torch", "ModuleNotFoundError: No module named 'torch'\n"),
        ("import gradio", "ModuleNotFoundError: No module named 'gradio'\n"),
        ("import importlib.metadata as m\nm.version('numpy') > '1'", "True\n"),
    ],
)
async def test_the_libraries_are_there_and_no_others(backend: Bubblewrap, program: str, shows: str) -> None:
    result = await backend.run(program)
    assert result.text.endswith(shows)


async def test_they_are_imported_already(backend: Bubblewrap) -> None:
    seen = await backend.run(f"import sys\n[name for name in {PACKAGES} if name not in sys.modules]")
    assert (seen.text, backend.mode) == ("[]\n", "warm, as nobody" if os.getuid() == 0 else "warm")


async def test_random_numbers_differ_between_programs(backend: Bubblewrap) -> None:
    program = "import numpy, random, sympy.core.random as s\n(numpy.random.rand(), random.random(), s.rng.random())"
    drawn = [(await backend.run(program)).text for _ in range(3)]
    assert len({value for text in drawn for value in text.strip("()\n").split(", ")}) == 9


async def test_files_go_in_and_those_made_or_changed_come_out(backend: Bubblewrap) -> None:
    given = [File("a.csv", b"1\n2\n"), File("kept.txt", b"same"), File("gone.txt", b"")]
    result = await backend.run(
        "import os\nopen('sum.txt', 'w').write(str(sum(map(int, open('a.csv')))))\n"
        "open('a.csv', 'a').write('3\\n')\nos.remove('gone.txt')\nos.mkdir('below'); open('below/x', 'w').close()\n"
        "open('.hidden', 'w').close()\nos.symlink('/python/bin/python', 'link'); os.mkfifo('pipe')\n"
        "print(os.getcwd(), open('kept.txt').read())",
        given,
    )
    assert result.text == "/mnt/data same\n"
    assert {file.name: file.data for file in result.files} == {"sum.txt": b"3", "a.csv": b"1\n2\n3\n"}


async def test_a_file_of_the_same_size_and_time_comes_out(backend: Bubblewrap) -> None:
    given = [File("a", b"1"), File("b", b"1")]
    result = await backend.run("with open('a', 'r+b') as file: print(file.write(b'2'))", given)
    assert result.files == (File("a", b"2"),)


@pytest.mark.parametrize(
    "way", ["os.mkfifo('a')", "os.mkdir('a')", "os.symlink('/tmp/out', 'a')", "os.symlink('a', 'a')"]
)
async def test_what_lies_in_a_file_s_way_is_no_trap(backend: Bubblewrap, way: str) -> None:
    made = await backend.run(f"import os\n{way}", session=way)
    assert (made.exit_code, made.files) == (0, ())
    then = await backend.run("print(os.path.exists('/tmp/out'), 'goes on')", [File("a", b"1"), File("b", b"2")], way)
    assert then.text.startswith("The file a isn't there: ")
    assert then.text.endswith("False goes on\n")
    assert (await backend.run("open('b').read()", [File("a", b"1"), File("b", b"2")], way)).text.endswith("'2'\n")


async def test_files_too_large_for_the_folder_are_named(backend: Bubblewrap) -> None:
    large = [File("large.bin", bytes(LIMITS.file_bytes + 1)), File("small.txt", b"1")]
    result = await backend.run("import os\nos.listdir()", large)
    assert result.text == "The file large.bin isn't there: File too large.\n['small.txt']\n"
    many = [File(f"f{n}", bytes(LIMITS.file_bytes - 1)) for n in range(4)]
    result = await backend.run("import os\nlen(os.listdir())", many)
    assert "No space left on device" in result.text
    assert result.exit_code == 0


async def test_a_deleted_file_is_there_again_for_the_next_program(backend: Bubblewrap) -> None:
    given = [File("a", b"1")]
    assert (await backend.run("import os\nos.remove('a')", given, "deletes")).files == ()
    again = await backend.run("open('a').read()", given, "deletes")
    assert (again.text, again.fresh) == ("'1'\n", False)


@pytest.mark.parametrize(
    "name", ["a\nb", "x\u202ey", "a\x00b", "\udc80", ".hidden", "n" * 255, "日本.txt", "a b.csv", "\\"]
)
async def test_odd_names_neither_come_out_nor_break_anything(backend: Bubblewrap, name: str) -> None:
    program = f"try:\n    open({name!r}, 'w').close()\nexcept ValueError: pass\nopen('plain', 'w').close()\n'done'"
    result = await backend.run(program.encode("utf-8", "backslashreplace").decode())
    assert (result.text, result.exit_code) == ("'done'\n", 0)
    odd = [name] if name.isprintable() and name[0] != "." else []
    assert sorted(file.name for file in result.files) == sorted(["plain", *odd])


async def test_programs_don_t_move_each_other_s_place_in_open_files(backend: Bubblewrap) -> None:
    places = "import os, stat\ndef is_file(n):\n    try: return stat.S_ISREG(os.fstat(n).st_mode)\n"
    places += "    except OSError: pass\nopened = [n for n in range(3, 64) if is_file(n)]\n"
    await backend.run(places, session="reads")
    await backend.run(places + "[os.lseek(n, 12345, os.SEEK_SET) for n in opened]", session="moves")
    assert "12345" not in (await backend.run("[os.lseek(n, 0, os.SEEK_CUR) for n in opened]", session="reads")).text
    drawn = await backend.run("import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1)).suptitle('$x^2$ and x')\n0")
    assert (drawn.text, len(drawn.images)) == ("0\n", 1)


async def test_a_figure_is_shown_once(backend: Bubblewrap) -> None:
    plot = "import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1)).savefig('kept.png')"
    first = await backend.run(plot, session="draws")
    assert ([file.name for file in first.files], len(first.images)) == (["kept.png"], 1)
    assert (await backend.run("1", session="draws")).images == ()
    assert (await backend.run(plot + "\nplt.close()", session="draws")).images == ()


async def test_a_figure_of_noise_is_too_large(backend: Bubblewrap) -> None:
    noise = "import matplotlib.pyplot as plt, numpy as np\nplt.figure(figsize=(15, 15), dpi=100)\n"
    noise += "plt.figimage(np.random.randint(0, 255, (1500, 1500, 3), dtype='uint8'))\n0"
    result = await backend.run(noise)
    assert (result.images, result.exit_code) == ((), 1)
    assert "as PNG; at most" in result.text


async def test_a_traceback_is_cut_to_what_helps(backend: Bubblewrap) -> None:
    deep = await backend.run("def f(n): return f(n - 1) if n else 1 / 0\n\n\nf(500)")
    assert deep.text.count('File "<code>"') == 3
    assert deep.text.endswith("ZeroDivisionError: division by zero\n")
    library = await backend.run("import numpy as np\nnp.linalg.inv(np.zeros((2, 2)))")
    assert library.text.count("File") == 1
    assert library.text.endswith("numpy.linalg.LinAlgError: Singular matrix\n")


async def test_an_error_in_handling_another_names_both(backend: Bubblewrap) -> None:
    code = "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('x')"
    for cause in (" from e", ""):
        lines = (await backend.run(code + cause)).text.splitlines()
        assert lines[:2] == ["After ZeroDivisionError: division by zero", "Traceback (most recent call last):"]
        assert lines[-1] == "KeyError: 'x'"
    assert (await backend.run(code + " from None")).text.startswith("Traceback")


async def test_printing_much_costs_neither_files_nor_state(backend: Bubblewrap) -> None:
    code = "x = 7\nopen('a', 'w').close()\nprint('begin' + 'y' * 200_000)\n'end'"
    result = await backend.run(code, session="much")
    assert (result.truncated, result.exit_code, [file.name for file in result.files]) == (True, 0, ["a"])
    assert result.text.startswith("beginyyy")
    assert result.text.endswith("yyy\n'end'\n")
    assert "bytes left out" in result.text
    assert len(result.text) < backend.limits.output_bytes + 100
    after = await backend.run("x", session="much")
    assert (after.text, after.fresh) == ("7\n", False)


async def test_forged_figures_and_names_aren_t_kept(backend: Bubblewrap, tmp_path: Path) -> None:
    """The backend checks the frame, the workspace what is in it."""
    workspaces = Workspaces(tmp_path)
    tool = PythonTool(backend=backend, workspaces=workspaces)
    forge = PRELUDE + "forge(GOOD | {'files': ['n' * 200], 'images': 1, 'blobs': [1, 9]}, b'x', b'<svg/onlo')\n"
    message = await used(tool, forge + "import time\ntime.sleep(9)", config_of(ToolContext("ann", "conv_9")))
    assert (message.artifact["files"], message.artifact["images"]) == ([], [])
    assert message.content.count("wasn't kept") == 2
    assert workspaces.files("conv_9") == []


async def test_a_session_is_sent_only_what_changed(backend: Bubblewrap) -> None:
    first = await backend.run("open('b', 'w').write('mine')\nopen('a').read()", [File("a", b"1")], "conversation")
    assert [file.name for file in first.files] == ["b"]
    again = await backend.run("open('a').read(), open('b').read()", [File("a", b"2"), *first.files], "conversation")
    assert (again.text, again.files, again.fresh) == ("('2', 'mine')\n", (), False)


async def test_what_a_person_deletes_is_gone_from_a_session(backend: Bubblewrap) -> None:
    both = [File("a", b"1"), File("b", b"2")]
    assert (await backend.run("open('own', 'w').close()", both, "deleting")).exit_code == 0
    left = await backend.run("import os\nsorted(os.listdir())", both[:1], "deleting")
    assert left.text == "['a', 'own']\n"


async def test_what_is_left_out_is_told(backend: Bubblewrap) -> None:
    files = await backend.run("for n in range(9): open(f'f{n}', 'w').write('x')")
    assert files.text == "4 files weren't kept: too many or too large.\n"
    figures = await backend.run("import matplotlib.pyplot as plt\nfor _ in range(4): plt.figure(figsize=(1, 1))")
    assert figures.text == "Of 4 figures the first 3 are shown.\n"


async def test_a_semicolon_hides_the_value_as_in_a_notebook(backend: Bubblewrap) -> None:
    assert (await backend.run("x = 5\nx;")).text == ""


async def test_its_files_are_not_the_program_s_memory(backend: Bubblewrap) -> None:
    given = [File(f"f{n}", bytes(400_000)) for n in range(4)]
    assert (await backend.run(f"len(bytearray({backend.limits.memory_bytes - (16 << 20)}))", given)).exit_code == 0


@pytest.mark.parametrize(
    ("program", "most"),
    [
        ("for n in range(50): open(f'f{n}', 'w').write('x')", 5),
        ("for n in range(5): open(f'f{n}', 'wb').write(bytes(900_000))", 3),
        ("open('huge', 'wb').write(bytes(3 << 20))", 1),
    ],
)
async def test_files_have_limits(backend: Bubblewrap, program: str, most: int) -> None:
    result = await backend.run(program)
    assert len(result.files) <= most
    assert all(len(file.data) <= LIMITS.file_bytes for file in result.files)
    assert sum(len(file.data) for file in result.files) <= LIMITS.files_bytes
    assert (await backend.run("1")).text == "1\n"


async def test_figures_come_out_as_png(backend: Bubblewrap) -> None:
    plot = "import matplotlib.pyplot as plt\nfor n in range(2):\n    plt.figure(figsize=(3, 2), dpi=100)\n"
    result = await backend.run(plot + "    plt.plot([1, 2]); plt.title('$x^2$')\nplt.show()")
    assert (result.text, result.exit_code) == ("", 0)
    assert [Image.open(io.BytesIO(png)).size for png in result.images] == [(300, 200), (300, 200)]


@pytest.mark.parametrize(
    ("draw", "images", "shows"),
    [
        ("[plt.figure(figsize=(1, 1)) for _ in range(9)]\n0", 3, ""),
        ("plt.figure(figsize=(900, 1), dpi=100)\n0", 1, ""),
        ("plt.title('$\\\\frac{$')\n0", 0, "ParseException|ValueError"),
    ],
)
async def test_odd_figures_are_bounded_or_an_error(backend: Bubblewrap, draw: str, images: int, shows: str) -> None:
    result = await backend.run(f"import matplotlib.pyplot as plt\n{draw}")
    assert len(result.images) == images
    assert all(max(Image.open(io.BytesIO(png)).size) <= 4000 for png in result.images)
    assert not shows or any(part in result.text for part in shows.split("|"))


async def used(tool: PythonTool, code: str, config: RunnableConfig) -> Any:
    return await tool.ainvoke({"type": "tool_call", "name": "code", "id": "1", "args": {"code": code}}, config)


async def test_the_tool_keeps_a_conversations_files_and_figures(backend: Bubblewrap, tmp_path: Path) -> None:
    workspaces = Workspaces(tmp_path)
    tool = PythonTool(backend=backend, workspaces=workspaces)
    workspaces.write("conv_1", "a.csv", b"20\n22\n")
    program = "import matplotlib.pyplot as plt\nplt.plot([1])\nt = sum(map(int, open('a.csv')))\n"
    program += "open('t.txt', 'w').write(str(t)); print(t)"
    message = await used(tool, program, config_of(ToolContext("ann", "conv_1")))
    assert message.content == "42\nDrew 1 figure.\nWrote t.txt."
    assert message.artifact["files"] == [{"name": "t.txt", "bytes": 2, "media_type": "text/plain"}]
    assert workspaces.read("conv_1", "t.txt") == b"42"
    (image,) = message.artifact["images"]
    assert workspaces.image_path("conv_1", image["name"]).stat().st_size > 0
    other = await used(tool, "import os\nos.listdir()", config_of(ToolContext("ann", "conv_2")))
    assert other.content == "[]"
    alone = await used(tool, "open('x', 'w').close()", config_of(ToolContext()))
    assert "files" not in alone.artifact


async def test_variables_live_on_in_a_conversation_by_option(backend: Bubblewrap, tmp_path: Path) -> None:
    tool = PythonTool(backend=backend, workspaces=Workspaces(tmp_path), keep_state=True)
    here, there = config_of(ToolContext("ann", "conv_3")), config_of(ToolContext("bob", "conv_3"))
    await used(tool, "x = 41", here)
    assert (await used(tool, "x + 1", here)).content == "42"
    told = (await used(tool, "x + 1", there)).content.splitlines()
    assert told[-2] == "NameError: name 'x' is not defined"
    assert told[-1] == "The interpreter is new: it has no variables of earlier programs."


HOSTILE = [
    ("import os\nos.fork()\nprint('ESC' + 'APED')", "Operation not permitted"),
    ("import socket\nsocket.socket()\nprint('ESC' + 'APED')", "Operation not permitted"),
    ("print(open('/etc/passwd').read(), 'ESC' + 'APED')", "No such file"),
    ("import os\nprint(os.environ.get('SECRET', 'none'))", "none"),
    ("x = bytearray(8 << 30)\nprint('ESC' + 'APED')", "MemoryError"),
    ("open('/usr/lib/x', 'w')\nprint('ESC' + 'APED')", "Read-only file system|Permission denied"),
]


@pytest.mark.parametrize("way", ["warm", "as nobody", "cold"])
async def test_each_way_of_starting_confines(
    bare: Callable[..., Bubblewrap], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    if way == "as nobody" and os.getuid() != 0:
        pytest.skip("only root can give its rights up")
    bwrap = shutil.which("bwrap") or ""
    forked = ForkServer(bwrap, LIMITS, {}, (), as_nobody=way == "as nobody")
    one = bare(Alone(bwrap, LIMITS, {}) if way == "cold" else forked)
    assert (await one.run("6 * 7")).text == "42\n"
    assert way in (one.mode or "")
    for program, shows in HOSTILE:
        said = (await one.run(program)).text
        assert "ESCAPED" not in said
        assert any(part in said for part in shows.split("|"))
    made = await one.run("open('a', 'w').write('x')")
    assert [file.name for file in made.files] == ["a"]
    assert "ModuleNotFoundError" in (await one.run("import numpy")).text  # it isn't among the packages


async def test_cold_interpreters_have_the_libraries_too(bare: Callable[..., Bubblewrap]) -> None:
    one = bare(Alone(shutil.which("bwrap"), LIMITS, top_levels(("numpy",))))
    assert (await one.run("import numpy as np\nnp.eye(2).sum()")).text == "np.float64(2.0)\n"


async def test_without_a_sandbox_the_limits_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.python.spawn.shutil.which", lambda name: None)
    monkeypatch.setenv("SECRET", "hunter2")
    refusing = Bubblewrap(LIMITS, (), idle=0)
    with pytest.raises(SandboxUnavailable, match="apt install bubblewrap"):
        await refusing.run("1")
    refusing.close()
    unsafe = Bubblewrap(Limits(wall_s=20.0, cpu_s=1), ("numpy",), idle=0, unsafe_without_sandbox=True)
    try:
        assert (await unsafe.run("import numpy\n2 + 2")).text == "4\n"
        assert unsafe.mode == "without a sandbox"
        assert "hunter2" not in (await unsafe.run("import os\nos.environ")).text
        assert (await unsafe.run("while True: pass")).timed_out
        assert "MemoryError" in (await unsafe.run("bytearray(8 << 30)")).text
        assert (await unsafe.run("while True: print('x' * 999)")).truncated
        folder = (await unsafe.run("import os\nos.getcwd()")).text.strip("'\n")
    finally:
        unsafe.close()
    assert not os.path.exists(folder)  # noqa: ASYNC240 (nothing else runs)
