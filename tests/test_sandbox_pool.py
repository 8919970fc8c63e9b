"""The pool of interpreters: bursts, sessions, cancelling, and what happens when any part of it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.sandbox_watch import REPOSITORY, Rest, alive, descendants, statuses
from tools.python import Bubblewrap, Limits, PythonResult, SandboxUnavailable

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")

LIMITS = Limits(wall_s=30.0, cpu_s=10)
SLEEP = "import time\ntime.sleep(30)"
Make = Callable[..., Bubblewrap]


@pytest_asyncio.fixture
async def make() -> AsyncIterator[Make]:
    """A backend that must leave nothing behind."""
    made: list[Bubblewrap] = []
    before = Rest(len(descendants(os.getpid())), len(os.listdir("/proc/self/fd")))

    def new(**options: object) -> Bubblewrap:
        limits = options.pop("limits", LIMITS)
        made.append(Bubblewrap(limits, (), **options))  # type: ignore[arg-type]
        return made[-1]

    yield new
    for backend in made:
        await asyncio.to_thread(backend.close)
    await before.comes_back()


async def ready(backend: Bubblewrap) -> Rest:
    assert (await backend.run("6 * 7")).text == "42\n"
    return await Rest.of_now()


def zygote() -> int:
    """The only child of bubblewrap that is Python and has children."""
    found = statuses(descendants(os.getpid()))
    named = {str(pid) for pid, own in found.items() if own["Name"] == "bwrap"}
    return next(pid for pid, own in found.items() if own["Name"] == "python" and own["PPid"] in named)


def bubblewrap() -> int:
    """The one that this process has started."""
    return next(pid for pid, own in statuses(descendants(os.getpid())).items() if own["PPid"] == str(os.getpid()))


async def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_a_burst_is_served_and_the_pool_is_full_again(make: Make) -> None:
    backend = make(idle=3, running=8)
    rest = await ready(backend)
    assert rest.processes == 3 + 2 * 3  # bubblewrap, its first process, the zygote; interpreters and supervisors
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(descendants(os.getpid())))
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    timed = "import time\nbegan = time.monotonic()\ntime.sleep(0.02)\nprint({}, began, time.monotonic())"
    results = await asyncio.gather(*(backend.run(timed.format(n)) for n in range(64)))
    watching.cancel()
    assert [int(result.text.split()[0]) for result in results] == list(range(64))
    assert all(result.fresh for result in results)
    times = sorted((float(result.text.split()[which]), 3 - 2 * which) for result in results for which in (1, 2))
    at_once = [sum(step for _, step in times[: n + 1]) for n in range(len(times))]
    assert 2 <= max(at_once) <= 8
    assert most <= 3 + 2 * (8 + 8 + 3) + 8  # at work, made for who waits, waiting; a few that are just going
    await rest.comes_back()


async def test_no_interpreter_serves_two_programs(make: Make) -> None:
    backend = make(idle=2, running=2)
    mark = "import builtins, os\nseen = hasattr(builtins, 'mark')\nbuiltins.mark = 1\nos.environ['MARK'] = '1'\nseen"
    results = await asyncio.gather(*(backend.run(mark) for _ in range(20)))
    assert {result.text for result in results} == {"False\n"}


async def test_what_a_program_leaves_is_gone(make: Make) -> None:
    backend = make(idle=1)
    leave = """
import builtins, json, os, sys
builtins.leak = leak = json.leak = sys.leak = 1
os.environ["LEAK"] = "1"
sys.path.append("/tmp")
sys.modules["leak"] = sys
for folder in ("/tmp", "/dev/shm", "/mnt/data"):
    open(folder + "/leak", "w").close()
os.chdir("/tmp")
"""
    assert (await backend.run(leave)).exit_code == 0
    look = """
import json, os, sys
leaks = ["leak" in globals(), hasattr(__builtins__, "leak"), hasattr(json, "leak"), hasattr(sys, "leak")]
leaks += ["LEAK" in os.environ, "/tmp" in sys.path, "leak" in sys.modules]
any(leaks), os.listdir("/tmp"), os.listdir("/dev/shm"), os.listdir("/mnt/data"), os.getcwd()
"""
    assert (await backend.run(look)).text == "(False, [], [], [], '/mnt/data')\n"


async def test_a_call_is_quick(make: Make) -> None:
    backend = make()
    await ready(backend)
    times = sorted([(await backend.run("2 + 2")).seconds for _ in range(9)])
    assert times[0] < 0.1  # 0.001 s on an idle machine


async def test_calls_run_side_by_side(make: Make) -> None:
    backend = make(running=4)
    await ready(backend)
    began = time.monotonic()
    results = await asyncio.gather(*(backend.run(f"import time\ntime.sleep(1)\n{n}") for n in range(4)))
    assert [result.text for result in results] == [f"{n}\n" for n in range(4)]
    assert time.monotonic() - began < 3


async def test_waiting_for_a_turn_isn_t_on_a_program_s_clock(make: Make) -> None:
    backend = make(running=1, limits=Limits(wall_s=1.5))
    results = await asyncio.gather(*(backend.run("import time\ntime.sleep(0.8)\n'in time'") for _ in range(3)))
    assert [result.text for result in results] == ["'in time'\n"] * 3


# -- sessions


async def test_a_session_keeps_its_state_and_nobody_else_sees_it(make: Make) -> None:
    backend = make()
    first = await backend.run("x = 1\nopen('/tmp/a', 'w').close()\nimport os\nos.chdir('/tmp')", session="one")
    assert (first.fresh, first.exit_code) == (True, 0)
    again = await backend.run("x += 1\nx, os.listdir('.')", session="one")
    assert (again.text, again.fresh) == ("(2, ['a'])\n", False)
    for session in ("two", None):
        other = await backend.run("import os\n'x' in globals(), os.listdir('/tmp')", session=session)
        assert (other.text, other.fresh) == ("(False, [])\n", True)


async def test_an_error_keeps_a_session_and_a_killed_program_ends_it(make: Make) -> None:
    backend = make(limits=Limits(wall_s=1.0, cpu_s=30))
    await backend.run("x = 1", session="s")
    assert (await backend.run("1 / 0", session="s")).exit_code == 1
    assert (await backend.run("raise SystemExit(3)", session="s")).exit_code == 3
    assert (await backend.run("x", session="s")).text == "1\n"
    for end in ("while True: pass", "import os\nos._exit(3)", "while True: print(1)", "import os\nos.abort()"):
        ended = await backend.run(end, session="s")
        assert (ended.exit_code, ended.fresh) != (0, True)
        after = await backend.run("'x' in globals()", session="s")
        assert (after.text, after.fresh) == ("False\n", True)
        await backend.run("x = 1", session="s")


async def test_a_session_s_interpreter_that_is_killed_is_replaced(make: Make) -> None:
    backend = make(idle=1)
    await ready(backend)
    before = descendants(os.getpid())
    await backend.run("x = 1", session="s")
    kept: list[int] = []
    while not kept:
        await asyncio.sleep(0.01)
        now = statuses(before & descendants(os.getpid()))
        kept = [pid for pid, own in now.items() if own["State"].startswith("T")]
    os.kill(kept[0], signal.SIGKILL)
    await until(lambda: not alive(kept[0]))
    after = await backend.run("'x' in globals()", session="s")
    assert (after.text, after.fresh, after.exit_code) == ("False\n", True, 0)


async def test_between_its_programs_a_session_has_no_time(make: Make) -> None:
    backend = make()
    spin = "import threading, time\ndef spin():\n    while True: pass\n"
    spin += "threading.Thread(target=spin, daemon=True).start()\ntime.process_time()"
    used = float((await backend.run(spin, session="s")).text)
    await asyncio.sleep(1.5)
    after = await backend.run("time.process_time()", session="s")
    assert not after.fresh
    assert float(after.text) - used < 0.4


@pytest.mark.parametrize(
    "wake",
    [
        "signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)\nsignal.signal(signal.SIGALRM, lambda *_: os.kill(0, 18))",
        "again(lambda: [os.kill(1, number) for number in range(3, 31)])",
        "again(lambda: os.kill(os.getpid(), signal.SIGCONT))",
        "for _ in range(8): again(lambda: os.kill(os.getpid(), signal.SIGCONT))",
    ],
    ids=["by alarm", "by its supervisor", "by itself", "by many threads"],
)
async def test_a_session_can_t_wake_itself(make: Make, wake: str) -> None:
    backend = make()
    tick = "import os, signal, threading, time\nlast = gap = 0\ndef tick():\n    global last, gap\n    while True:\n"
    tick += "        now = time.monotonic()\n        gap = max(gap, now - (last or now))\n        last = now\n"
    tick += "        time.sleep(0.001)\nthreading.Thread(target=tick, daemon=True).start()\n"
    tick += "def again(act):\n    def loop():\n        while True: act()\n"
    tick += "    threading.Thread(target=loop, daemon=True).start()\n"
    await backend.run(tick + wake, session="s")
    await asyncio.sleep(2.5)
    after = await backend.run("import time\ntime.sleep(0.1)\nglobals().get('gap', 'ended')", session="s")
    assert (after.fresh and after.text == "'ended'\n") or float(after.text) > 1


async def test_a_forged_result_doesn_t_reach_the_next_program(make: Make) -> None:
    backend = make()
    forge = """
import json, os, socket, stat, struct, threading
found = []
for fd in range(3, 64):
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode): found.append(fd)
    except OSError: pass
text = {"number": 1, "exit_code": 0, "files": ["forged.txt"], "images": 0, "gone": [], "blobs": [1]}
text = json.dumps(text).encode()
os.write(found[0], struct.pack(">I", len(text)) + text + b"x")
import time
time.sleep(0.2)
"""
    assert [file.name for file in (await backend.run(forge, session="s")).files] == ["forged.txt"]
    after = await backend.run("time.sleep(0.2)", session="s")
    assert "broke the channel" in after.text  # its runner's own result came now
    assert (after.files, after.exit_code) == ((), 137)
    again = await backend.run("print('mine')", session="s")
    assert (again.text, again.fresh) == ("mine\n", True)


async def test_programs_of_a_session_take_turns(make: Make) -> None:
    backend = make()
    await backend.run("n = 0", session="s")
    step = "import time\nm = n\ntime.sleep(0.02)\nn = m + 1\nn"
    results = await asyncio.gather(*(backend.run(step, session="s") for _ in range(8)))
    assert sorted(int(result.text) for result in results) == list(range(1, 9))


async def test_sessions_end_when_nobody_uses_them(make: Make) -> None:
    backend = make(idle=1, session_idle_s=0.6)
    rest = await ready(backend)
    await asyncio.gather(*(backend.run("x = 1", session=str(n)) for n in range(4)))
    await until(lambda: len(descendants(os.getpid())) == rest.processes + 8)
    await rest.comes_back()  # without a further call
    assert (await backend.run("1", session="0")).fresh


async def test_the_longest_unused_session_makes_room(make: Make) -> None:
    backend = make(sessions=2)
    for name in "abac":  # b is the longest unused when c comes
        await backend.run(f"x = {name!r}", session=name)
    assert (await backend.run("x", session="a")).text == "'a'\n"
    assert (await backend.run("x", session="c")).text == "'c'\n"
    assert (await backend.run("'x' in globals()", session="b")).fresh
    assert (await backend.run("'x' in globals()", session="a")).fresh


async def test_many_threads_and_loops_share_a_backend(make: Make) -> None:
    """With sessions that expire all the time, by number and by time."""
    backend = make(idle=2, running=4, sessions=2, session_idle_s=0.05)
    wrong: list[object] = []

    async def call(n: int) -> None:
        session = [None, "a", "b", "c"][n % 4]
        result = await backend.run(f"y = globals().get('y', 0) + 1\n{n}, y", session=session)
        number, times = eval(result.text)
        if number != n or result.fresh != (times == 1) or (session is None and times != 1):
            wrong.append((n, result))

    def loop(start: int) -> None:
        async def main() -> None:
            for n in range(start, start + 24, 6):
                await asyncio.gather(*(call(m) for m in range(n, n + 6)))

        try:
            asyncio.run(main())
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=loop, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert wrong == []


# -- cancelling


async def cancelled(task: asyncio.Task[PythonResult]) -> float:
    """How long it took."""
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return time.monotonic() - began


@pytest.mark.parametrize("session", [None, "s"])
async def test_cancelling_kills_the_program(make: Make, session: str | None) -> None:
    backend = make(idle=1)
    rest = await ready(backend)
    task = asyncio.create_task(backend.run(SLEEP, session=session))
    await asyncio.sleep(0.3)
    assert await cancelled(task) < 3
    await rest.comes_back()
    assert (await backend.run("1", session=session)).fresh


async def test_cancelling_what_is_queued_doesn_t_wait_for_its_turn(make: Make) -> None:
    backend = make(idle=1, running=1)
    first = asyncio.create_task(backend.run("import time\ntime.sleep(2)\n'done'"))
    await asyncio.sleep(0.2)
    queued = [asyncio.create_task(backend.run("print('ran')")) for _ in range(5)]
    await asyncio.sleep(0.1)
    for task in queued:
        assert await cancelled(task) < 1
    assert (await first).text == "'done'\n"


async def test_cancelling_what_waits_for_its_session(make: Make) -> None:
    backend = make()
    first = asyncio.create_task(backend.run("import time\ntime.sleep(2)\n'done'", session="s"))
    await asyncio.sleep(0.2)
    second = asyncio.create_task(backend.run("print('ran')", session="s"))
    await asyncio.sleep(0.1)
    assert await cancelled(second) < 1
    assert (await first).text == "'done'\n"


async def test_cancelling_what_waits_for_an_interpreter(make: Make) -> None:
    backend = make(idle=0)
    rest = await ready(backend)
    held = zygote()
    os.kill(held, signal.SIGSTOP)
    try:
        waiting = [asyncio.create_task(backend.run("1")) for _ in range(3)]
        await asyncio.sleep(0.3)
        for task in waiting:
            assert await cancelled(task) < 3
    finally:
        os.kill(held, signal.SIGCONT)
    assert (await backend.run("1")).text == "1\n"
    await rest.comes_back()  # without those that were made for nobody


async def test_cancelling_at_any_moment_frees_everything(make: Make) -> None:
    backend = make(idle=2, running=4)
    rest = await ready(backend)
    tasks = []
    for n in range(40):
        tasks.append(asyncio.create_task(backend.run("import time\ntime.sleep(0.01)", session=[None, "a"][n % 2])))
        await asyncio.sleep(0.0007 * (n % 7))
        if n % 3:
            tasks[n // 2].cancel()
            tasks[n // 3].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(backend._expire)
    await backend.run("1", session="a")
    assert (await backend.run("6 * 7")).text == "42\n"
    await until(lambda: len(descendants(os.getpid())) == rest.processes + 2)  # the session's


async def test_a_time_limit_of_the_caller_s(make: Make) -> None:
    backend = make()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(backend.run(SLEEP), 0.3)
    assert (await backend.run("1")).text == "1\n"


# -- what dies


@pytest.mark.parametrize("which", ["zygote", "bubblewrap"])
async def test_a_killed_zygote_is_started_anew(make: Make, which: str) -> None:
    backend = make(idle=2)
    rest = await ready(backend)
    await backend.run("x = 1", session="s")
    running = [asyncio.create_task(backend.run(SLEEP)) for _ in range(3)]
    await asyncio.sleep(0.5)
    old = descendants(os.getpid())
    os.kill(zygote() if which == "zygote" else bubblewrap(), signal.SIGKILL)
    ended = await asyncio.gather(*running, return_exceptions=True)
    for one in ended:
        assert isinstance(one, SandboxUnavailable) or (isinstance(one, PythonResult) and one.exit_code == 137), one
    await until(lambda: not any(alive(pid) for pid in old))  # the kernel ends the last of them a little later
    assert (await backend.run("6 * 7")).text == "42\n"
    assert (await backend.run("'x' in globals()", session="s")).text == "False\n"
    await until(lambda: not old & descendants(os.getpid()))
    await until(lambda: len(descendants(os.getpid())) <= rest.processes + 2)  # one more is let go in its own time
    old = descendants(os.getpid())
    os.kill(zygote(), signal.SIGKILL)  # while nothing runs
    await until(lambda: not any(alive(pid) for pid in old))
    assert (await backend.run("6 * 7")).text == "42\n"
    after = await backend.run("1", session="s")
    assert (after.text, after.fresh) == ("1\n", True)


@pytest.mark.parametrize("session", [None, "s"])
async def test_closing_ends_what_runs(make: Make, session: str | None) -> None:
    backend = make(idle=2, running=2)
    await ready(backend)
    running = [asyncio.create_task(backend.run(SLEEP, session=session)) for _ in range(4)]
    await asyncio.sleep(0.3)
    await asyncio.to_thread(backend.close)
    ended = await asyncio.gather(running[0], return_exceptions=True)
    assert isinstance(ended[0], SandboxUnavailable) or getattr(ended[0], "exit_code", None) == 137
    for task in running[1:]:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await asyncio.to_thread(backend.close)  # what was queued began after the first
    backend.close()
    assert (await backend.run("6 * 7", session=session)).text == "42\n"


async def test_a_killed_server_takes_all_along() -> None:
    code = f"""
import asyncio
from tools.python import Bubblewrap, Limits
async def main():
    backend = Bubblewrap(Limits(wall_s=60), (), idle=2)
    await backend.run("x = 1", session="s")
    running = [asyncio.create_task(backend.run({SLEEP!r})) for _ in range(2)]
    await asyncio.sleep(0.3)
    print("ready", flush=True)
    await asyncio.gather(*running)
asyncio.run(main())
"""
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        assert await server.stdout.readline() == b"ready\n"
        orphans = descendants(server.pid)
        assert len(orphans) >= 3 + 2 * 3
    finally:
        server.kill()
        await server.wait()
    await until(lambda: not any(alive(pid) for pid in orphans), 10)


# -- what isn't there


def put_bwrap(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    broken = folder / "bwrap"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setattr("tools.python.spawn.shutil.which", lambda name: str(broken))
    return broken


async def test_without_bubblewrap_it_refuses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.python.spawn.shutil.which", lambda name: None)
    with pytest.raises(
        SandboxUnavailable, match=r"bwrap isn't installed.*apt install bubblewrap.*unsafe_without_sandbox"
    ):
        await make().run("2 + 2")


async def test_on_a_machine_without_a_filter_it_refuses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.python.spawn.seccomp.supported", lambda: False)
    with pytest.raises(SandboxUnavailable, match="no system call filter"):
        await make().run("2 + 2")


async def test_a_bubblewrap_that_doesn_t_work_is_reported(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "bwrap: No permissions to create new namespace"
    put_bwrap(tmp_path, monkeypatch, f"echo '{said}' >&2; exit 1")
    backend = make()
    began = time.monotonic()
    results = await asyncio.gather(*(backend.run("2 + 2") for _ in range(8)), return_exceptions=True)
    assert time.monotonic() - began < 10
    for result in results:
        assert isinstance(result, SandboxUnavailable)
        assert said in str(result)


async def test_a_bubblewrap_that_hangs_is_reported(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_bwrap(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr("tools.python.spawn._START_S", 0.3)
    monkeypatch.setattr("tools.python.spawn._SPAWN_S", 0.3)
    with pytest.raises(SandboxUnavailable, match="didn't start"):
        await make().run("2 + 2")


async def test_a_bubblewrap_that_is_mended_is_used(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("bwrap")
    broken = put_bwrap(tmp_path, monkeypatch, "exit 1")
    backend = make()
    with pytest.raises(SandboxUnavailable):
        await backend.run("2 + 2")
    broken.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    assert (await backend.run("2 + 2")).text == "4\n"
    broken.unlink()  # an upgrade under way
    assert (await backend.run("2 + 2")).text == "4\n"
    old = descendants(os.getpid())
    os.kill(zygote(), signal.SIGKILL)
    await until(lambda: not any(alive(pid) for pid in old))
    with pytest.raises(SandboxUnavailable, match="can't be run"):
        await backend.run("2 + 2")
    put_bwrap(tmp_path, monkeypatch, f'exec {real} "$@"')
    assert (await backend.run("2 + 2")).text == "4\n"


async def test_a_start_that_is_killed_is_tried_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, once = shutil.which("bwrap"), tmp_path / "once"
    put_bwrap(tmp_path, monkeypatch, f'if [ -e {once} ]; then rm {once}; kill -9 $$; fi; exec {real} "$@"')
    backend = make()
    await ready(backend)
    once.touch()
    old = descendants(os.getpid())
    os.kill(zygote(), signal.SIGKILL)
    await until(lambda: not any(alive(pid) for pid in old))
    assert (await backend.run("2 + 2")).text == "4\n"
    assert not once.exists()


async def test_a_server_without_descriptors_says_so_and_goes_on(make: Make) -> None:
    backend = make(idle=0)
    await backend.run("x = 1", session="s")
    running = asyncio.create_task(backend.run("import time\ntime.sleep(1.5)\n'undisturbed'"))
    await asyncio.sleep(0.3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        os.close(taken.pop())  # what the event loop's own needs
        with pytest.raises(SandboxUnavailable, match="Too many open files"):
            await backend.run("2 + 2")
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (await backend.run("2 + 2")).text == "4\n"
    assert (await running).text == "'undisturbed'\n"
    assert (await backend.run("x", session="s")).text == "1\n"


async def test_a_server_with_thousands_of_descriptors(make: Make) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"may have {hard} descriptors at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    taken = [os.dup(0) for _ in range(1200)]
    try:
        backend = make(idle=1)
        assert (await backend.run("print('x' * 100)\n2 + 2", session="s")).text.endswith("\n4\n")
        assert (await backend.run("2 + 2", session="s")).text == "4\n"
        assert (await backend.run("while True: print(1)")).truncated
        await asyncio.to_thread(backend.close)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_program_too_long_isn_t_run(make: Make) -> None:
    result = await make().run("#" * 100_001)
    assert result.exit_code == 1
    assert "at most 100000" in result.text


async def test_a_trivial_program_proves_that_it_works(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make().check()
    put_bwrap(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(SandboxUnavailable):
        await make().check()


def test_a_package_that_isn_t_installed_is_named() -> None:
    with pytest.raises(ValueError, match=r"'no-such-thing'.*WHETSTONE_PYTHON_PACKAGES"):
        Bubblewrap(packages=("no-such-thing",))
