"""The sandbox backend "container", on a real Podman where one is installed: the seam's promises, hostile programs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.container_engine import IMAGE, OTHER, WHY_NOT, Podman
from tools.python.backend import File, Limits, PythonResult, SandboxUnavailable
from tools.python.container import ContainerBackend

pytest.importorskip("docker", reason="needs the extra 'container'")
REPOSITORY = Path(__file__).resolve().parent.parent
SECRET = "hunter2-of-the-server"

LIMITS = Limits(wall_s=30.0, cpu_s=2, memory_bytes=192 << 20, files_bytes=8 << 20, tmp_bytes=8 << 20, files=5, images=2)

FORGE = """
import os
for descriptor in range(3, 64):
    try: os.write(descriptor, {})
    except OSError: pass
"""
real = [pytest.mark.container, pytest.mark.skipif(bool(WHY_NOT), reason=f"a real engine {WHY_NOT}")]


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    engine = Podman(tmp_path_factory.mktemp("podman"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def backend(podman: Podman) -> Iterator[ContainerBackend]:
    os.environ["WHETSTONE_TEST_SECRET"] = SECRET
    made = ContainerBackend(LIMITS, image=IMAGE, pool=4, running=4, url=podman.url)
    yield made
    made.close()
    assert podman.containers(IMAGE) == []
    del os.environ["WHETSTONE_TEST_SECRET"]


def other(podman: Podman, limits: Limits = LIMITS, **options: object) -> ContainerBackend:
    return ContainerBackend(limits, image=OTHER, **{"url": podman.url, "pool": 0, **options})  # type: ignore[arg-type]


@pytest.mark.usefixtures("podman")
class TestPrograms:
    pytestmark = real

    @pytest.mark.parametrize(
        ("code", "text", "exit_code"),
        [
            ("1 + 1", "2\n", 0),
            ("x = 3\nprint('a'); x", "a\n3\n", 0),
            ("'é€😀\\ud800'", "'é€😀\\ud800'\n", 0),
            ("", "", 0),
            ("None", "", 0),
            ("import sys\nprint(1)\nprint(2, file=sys.stderr)\nprint(3)", "1\n2\n3\n", 0),
            ("raise SystemExit('bye')", "bye\n", 1),
            ("import sys; sys.exit(7)", "", 7),
            ("import os; os._exit(9)", "", 9),
            ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "", 139),
            ("import os; os.getuid(), os.getgid(), os.getcwd()", "(65534, 65534, '/mnt/data')\n", 0),
            ("import __main__\n__main__.__name__", "'__main__'\n", 0),
            ("len(str(2**20000))", "6021\n", 0),
            ("import sys\nsys.stdin.read()", "''\n", 0),
        ],
    )
    async def test_result(self, backend: ContainerBackend, code: str, text: str, exit_code: int) -> None:
        result = await backend.run(code)
        assert (result.text, result.exit_code) == (text, exit_code)
        assert result.fresh
        assert not result.timed_out
        assert not result.truncated

    async def test_traceback_has_the_programs_frames_alone(self, backend: ContainerBackend) -> None:
        result = await backend.run("def f():\n    return 1 / 0\nf()")
        assert result.text == dedent("""\
            Traceback (most recent call last):
              File "<code>", line 3, in <module>
                f()
              File "<code>", line 2, in f
                return 1 / 0
                       ~~^~~
            ZeroDivisionError: division by zero
            """)
        assert result.exit_code == 1

    async def test_files_go_in_and_changed_ones_come_out(self, backend: ContainerBackend) -> None:
        code = """
            open("made.bin", "wb").write(bytes(range(256)))
            print(open("in.csv").read(), open("kept.txt").read())
            open("in.csv", "r+").write("x")
            import os; os.mkdir("folder"); open("folder/below", "w"); _ = open(".hidden", "w")
        """
        given = [File("in.csv", b"a,b"), File("kept.txt", b"same"), File("größe 1.txt", b"")]
        result = await backend.run(dedent(code), given)
        assert result.text == "a,b same\n"
        assert result.files == (File("in.csv", b"x,b"), File("made.bin", bytes(range(256))))

    async def test_files_of_a_program_that_dies_come_out_too(self, backend: ContainerBackend) -> None:
        result = await backend.run("import os\nopen('a', 'w').write('1')\nos._exit(3)")
        assert result.files == (File("a", b"1"),)

    async def test_a_figure_is_an_image(self, podman: Podman) -> None:
        backend = other(podman, Limits(wall_s=60.0, cpu_s=50), packages=["matplotlib", "no_such_package"])
        result = await backend.run("from matplotlib import pyplot as p\np.plot([1, 2]); p.figure(); p.show()")
        backend.close()
        assert result.text == ""
        assert [image[:8] for image in result.images] == [b"\x89PNG\r\n\x1a\n"] * 2

    async def test_code_that_is_too_long_is_refused(self, backend: ContainerBackend) -> None:
        result = await backend.run("#" * (LIMITS.code_bytes + 1))
        assert result.text == "The program is 100001 bytes long; at most 100000 are run."


@pytest.mark.usefixtures("podman")
class TestSessions:
    pytestmark = real

    async def test_variables_live_on(self, backend: ContainerBackend) -> None:
        first = await backend.run("x = 41", session="a")
        second = await backend.run("x + 1", [File("n", b"1")], session="a")
        elsewhere = await backend.run("'x' in globals()", session="b")
        third = await backend.run("open('n').read()", session="a")
        assert (first.fresh, second.fresh, elsewhere.fresh) == (True, False, True)
        assert (second.text, elsewhere.text, third.text) == ("42\n", "False\n", "'1'\n")

    async def test_an_error_keeps_and_an_end_loses_them(self, backend: ContainerBackend) -> None:
        await backend.run("x = 1", session="c")
        await backend.run("1 / 0", session="c")
        assert (await backend.run("x", session="c")).text == "1\n"
        assert (await backend.run("import os; os._exit(0)", session="c")).exit_code == 0
        after = await backend.run("'x' in globals()", session="c")
        assert (after.text, after.fresh) == ("False\n", True)

    async def test_one_program_of_a_session_at_a_time(self, backend: ContainerBackend) -> None:
        await backend.run("n = 0", session="d")
        code = "import time\nm = n\ntime.sleep(0.05)\nn = m + 1"
        await asyncio.gather(*(backend.run(code, session="d") for _ in range(5)))
        assert (await backend.run("n", session="d")).text == "5\n"

    async def test_nothing_runs_between_programs(self, backend: ContainerBackend) -> None:
        code = """
            import threading, time
            n = 0
            def count():
                global n
                while True:
                    n += 1
                    time.sleep(0.01)
            threading.Thread(target=count, daemon=True).start()
        """
        await backend.run(dedent(code), session="e")
        before = int((await backend.run("n", session="e")).text)
        await asyncio.sleep(1.0)
        assert int((await backend.run("n", session="e")).text) - before < 50

    async def test_places_are_bounded_and_idle_sessions_end(self, podman: Podman) -> None:
        backend = other(podman, running=2, idle_s=1.5)
        for session in "abc":
            await backend.run(f"x = '{session}'", session=session)
        await until(lambda: len(podman.containers()) == 2)
        assert not (await backend.run("x", session="c")).fresh
        assert (await backend.run("1", session="a")).fresh
        await until(lambda: podman.containers() == [])
        backend.close()


@pytest.mark.usefixtures("podman")
class TestEnds:
    pytestmark = real

    async def test_time_limits(self, podman: Podman) -> None:
        backend = other(podman, Limits(wall_s=1.0, cpu_s=1))
        asleep = await backend.run("print('so far', flush=True)\nimport time; time.sleep(60)")
        backend.close()
        assert (asleep.text, asleep.exit_code, asleep.timed_out) == ("so far\n", 137, True)
        assert asleep.seconds < 10

    async def test_cpu_limit_in_c(self, backend: ContainerBackend) -> None:
        result = await backend.run("pow(3, 10**9)")
        assert (result.exit_code, result.timed_out) == (152, True)

    async def test_cancelling_ends_the_program(self, podman: Podman) -> None:
        backend = other(podman)
        call = asyncio.create_task(backend.run("import time; time.sleep(60)"))
        await until(lambda: len(podman.containers()) == 1)
        await asyncio.sleep(0.3)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: podman.containers() == [])
        assert (await backend.run("1")).text == "1\n"
        backend.close()

    async def test_closing_ends_all_and_the_next_call_starts_anew(self, podman: Podman) -> None:
        backend = other(podman, running=2)
        await backend.run("1", session="kept")
        calls = [asyncio.create_task(backend.run("import time; time.sleep(60)")) for _ in range(3)]
        await until(lambda: len(podman.containers()) >= 2)
        await asyncio.to_thread(backend.close)
        assert podman.containers() == []
        for call in calls:
            with pytest.raises(SandboxUnavailable, match="closed"):
                await call
        assert (await backend.run("1", session="kept")).fresh
        backend.close()

    async def test_containers_end_with_a_killed_server(self, podman: Podman) -> None:
        code = f"""
import asyncio
from tools.python.container import ContainerBackend
backend = ContainerBackend(image={OTHER!r}, url={podman.url!r}, pool=1)
asyncio.run(backend.run("1", session="kept"))
print("ready", flush=True)
asyncio.run(backend.run("import time; time.sleep(60)"))
"""
        server = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE
        )
        assert server.stdout is not None
        assert await server.stdout.readline() == b"ready\n"
        await until(lambda: len(podman.containers()) == 3)
        await asyncio.sleep(1.5)  # one that is just being made would stay behind, for the next start to sweep
        server.kill()
        await server.wait()
        await until(lambda: podman.containers() == [])

    async def test_what_a_dead_server_left_is_swept(self, podman: Podman, backend: ContainerBackend) -> None:
        from tools.python import container_engine

        await backend.run("1", session="mine")
        gone = await asyncio.create_subprocess_exec("true")
        await gone.wait()
        place = container_engine._place()
        start = ["run", "--detach", "--network=none", "--ulimit=nofile=64", "--ulimit=nproc=99", "--stop-timeout=0"]
        sleep = [OTHER, "python3", "-c", "import time; time.sleep(60)"]
        left = podman.command(*start, f"--label={container_engine._LABEL}={place}:{gone.pid}:1", *sleep).strip()
        foreign = podman.command(*start, f"--label={container_engine._LABEL}=elsewhere:{gone.pid}:1", *sleep).strip()
        other_server = other(podman)
        await other_server.check()
        await until(lambda: left[:12] not in podman.containers())
        assert foreign[:12] in podman.containers()
        assert not (await backend.run("1", session="mine")).fresh
        other_server.close()
        podman.command("rm", "--force", "--time=0", foreign)


async def attack(backend: ContainerBackend, code: str) -> PythonResult:
    """Run a hostile program, then see that the next one works as if nothing had been."""
    result = await backend.run(dedent(code))
    assert SECRET not in result.text
    after = await backend.run("import os\n6 * 7, os.listdir('/tmp'), os.listdir()")
    assert after.text == "(42, [], [])\n"
    return result


@pytest.mark.usefixtures("podman")
class TestHostile:
    pytestmark = real

    @pytest.mark.parametrize(
        "code",
        [
            "import socket\nsocket.create_connection(('127.0.0.1', 22), 2)",
            "import socket\nsocket.create_connection(('169.254.169.254', 80), 2)",
            "import socket\nsocket.create_connection(('8.8.8.8', 53), 2)",
            "import urllib.request\nurllib.request.urlopen('https://example.com')",
            "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
            "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
            "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/podman/podman.sock')",
            "open('/etc/shadow').read()",
            "open('/root/x', 'w')",
            "open('/usr/local/bin/python3', 'ab')",
            "import os\nos.mkdir('/new')",
            "import os\nos.setuid(0)",
            "import os\nos.chroot('/tmp')",
            "import os\nos.mknod('/tmp/disk', 0o60600, os.makedev(254, 0))",
            "import os\nos.kill(1, 9)\nos.waitpid(1, 0)",
            "import os\nos.readlink('/proc/1/cwd')",
            "open('/proc/1/mem', 'r+b')",
            "open('/proc/1/environ').read()",
            "import os\nos.listdir('/proc/1/fd')",
            "open('/proc/sys/kernel/core_pattern', 'w')",
            "open('/proc/sysrq-trigger', 'w')",
            "open('/sys/fs/cgroup/memory/cgroup.procs', 'w')",
            "open('/dev/mem', 'rb')",
            "open('/dev/sda', 'rb')",
            "import ctypes\nassert ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0",
            "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
            "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
            "import ctypes\nassert ctypes.CDLL(None).syscall(175, b'', 0, b'') == 0",
            "import ctypes\nassert ctypes.CDLL(None).syscall(321, 0, b'', 0) >= 0",
            "import ctypes\nassert ctypes.CDLL(None).sethostname(b'mine', 4) == 0",
            "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
            "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (10000, 10000))",
            "import os\nos.nice(-5)",
            "import os\nopen('/tmp/x', 'w').write('#!/usr/local/bin/python3')\nos.chmod('/tmp/x', 0o4755)\n"
            "os.execv('/tmp/x', ['x'])",
            "open('/tmp/big', 'wb').truncate(64 << 20)",
            "[open('/dev/null') for _ in range(100)]",
            "x = bytearray(8 << 30)",
            "'a' * 10**12",
        ],
    )
    async def test_refused(self, backend: ContainerBackend, code: str) -> None:
        result = await attack(backend, f"{code}\nprint('esc' + 'aped')")
        assert "escaped" not in result.text
        assert "Error" in result.text
        assert result.exit_code == 1

    async def test_the_servers_environment_and_files_are_out_of_sight(self, backend: ContainerBackend) -> None:
        result = await attack(
            backend,
            """
            import os
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try: print(open(f"/proc/{pid}/environ").read(), os.listdir(f"/proc/{pid}/fd"))
                except OSError: pass
            print(dict(os.environ), sorted(os.listdir("/")), open("/proc/self/mountinfo").read())
            """,
        )
        assert str(REPOSITORY) not in result.text
        assert "whetstone.toml" not in result.text

    @pytest.mark.parametrize(
        "code",
        [
            "import os\nwhile True: os.fork()",
            "import subprocess\nsubprocess.run(['/usr/local/bin/python3', '-V'])",
            "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
            "import os\nos.execv('/usr/local/bin/python3', ['python3', '-V'])",
            "import os\nassert os.system('true') == 0",
        ],
    )
    async def test_no_way_to_another_process(self, backend: ContainerBackend, code: str) -> None:
        result = await attack(backend, f"{code}\nprint('esc' + 'aped')")
        assert "escaped" not in result.text
        assert result.exit_code == 1

    async def test_thread_bomb(self, backend: ContainerBackend) -> None:
        code = """
            import threading, time
            n = 0
            try:
                while True:
                    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
                    n += 1
            except RuntimeError:
                print(n, flush=True)
        """
        assert int((await attack(backend, code)).text.split()[0]) <= LIMITS.threads

    async def test_the_engine_holds_the_limits(self, podman: Podman) -> None:
        backend = other(podman)
        await backend.run("1", session="s")
        (container,) = podman.containers()
        found = json.loads(podman.command("inspect", container))[0]
        backend.close()
        host = found["HostConfig"]
        assert (LIMITS.memory_bytes, LIMITS.memory_bytes) < (host["Memory"], host["MemorySwap"]) < (1 << 30, 1 << 30)
        assert host["Memory"] == host["MemorySwap"]
        assert host["PidsLimit"] == LIMITS.threads + 1
        assert host["NanoCpus"] == 10**9
        assert host["ReadonlyRootfs"]
        assert host["NetworkMode"] == "none"
        assert host["LogConfig"]["Type"] == "none"
        assert host["AutoRemove"]
        assert not host["Privileged"]
        assert found["EffectiveCaps"] in ([], None)
        assert found["Mounts"] == []
        assert found["Config"]["User"] == "65534:65534"

    async def test_the_memory_of_the_container_is_bounded(self, backend: ContainerBackend) -> None:
        """The address space isn't: what the limit of the interpreter lets through, the engine's doesn't."""
        result = await attack(backend, "import mmap\nmaps = [mmap.mmap(-1, 64 << 20) for _ in range(1000)]")
        assert result.text.splitlines()[-1].startswith("OSError")

    @pytest.mark.parametrize("folder", ["/tmp", "/dev/shm", "/mnt/data"])
    async def test_a_folder_fills_up_at_its_size(self, backend: ContainerBackend, folder: str) -> None:
        code = f"""
            n = 0
            try:
                while True:
                    open(f"{folder}/{{n}}", "wb").write(bytes(1 << 20))
                    n += 1
            except OSError as error:
                print(n, error.strerror)
        """
        written, _, reason = (await attack(backend, code)).text.partition(" ")
        assert int(written) <= 8
        assert reason == "No space left on device\n"

    async def test_output_flood(self, backend: ContainerBackend) -> None:
        result = await attack(backend, "while True: print('x' * 100_000)")
        assert result.truncated
        assert LIMITS.output_bytes <= len(result.text) <= LIMITS.output_bytes + 100
        assert result.exit_code == 137

    async def test_flood_from_a_thread_after_the_end(self, backend: ContainerBackend) -> None:
        code = """
            import os, threading
            def flood():
                while True: os.write(1, b"x" * 100_000)
            threading.Thread(target=flood, daemon=True).start()
        """
        assert len((await attack(backend, code)).text) <= LIMITS.output_bytes + 100

    @pytest.mark.parametrize(
        "code",
        [
            "import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass",
            FORGE.format(r"b'D\\xff\\xff\\xff\\xff'"),
            FORGE.format(r"b'I\\0\\0\\0\\4evil'"),
            FORGE.format(r"b'D\\0\\0\\0\\3abc'"),
            FORGE.format(r"b'D\\0\\0\\0\\1' b'0' * 99"),
            "import sys\nsys.stdout = sys.stderr = None",
            "import sys, builtins\nbuiltins.print = sys.modules['os'] = None\nsys.exit = None\nsys.modules.clear()",
            "import sys\nfor name in list(sys.modules): sys.modules[name].__dict__.clear()",
            "import os, signal\nos.kill(-1, signal.SIGKILL)",
            "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nos.kill(os.getppid(), signal.SIGTERM)",
            "import os, signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except: pass",
            "import gc\nfor o in gc.get_objects():\n    try: o.clear()\n    except BaseException: pass",
        ],
    )
    async def test_the_channel_may_be_broken_by_the_program_for_itself_alone(
        self, backend: ContainerBackend, code: str
    ) -> None:
        result = await attack(backend, code)
        assert result.files == ()
        assert result.images == ()
        assert len(result.text) <= LIMITS.output_bytes + 100

    async def test_made_files_are_bounded(self, backend: ContainerBackend) -> None:
        code = """
            import os
            os.symlink("/etc/passwd", "link"); os.mkfifo("pipe"); open("new\\nline", "w"); os.mkdir("d")
            open("unreadable", "w").close(); os.chmod("unreadable", 0)
            open("sparse", "wb").truncate(32 << 20)
            for n in range(20): open(f"many{n:02}", "w").write("x")
            open(b"\\xff\\xfe", "w")
        """
        result = await attack(backend, code)
        assert [file.name for file in result.files] == [f"many{n:02}" for n in range(LIMITS.files)]

    async def test_a_session_that_left_traps_for_files(self, backend: ContainerBackend) -> None:
        await backend.run("import os\nos.mkfifo('a'); os.symlink('/tmp/b', 'b'); os.mkdir('c')", session="traps")
        files = [File(name, b"data") for name in "abc"]
        result = await backend.run("print(open('a').read(), open('b').read())", files, session="traps")
        assert result.text == "c can't be put into /mnt/data: Is a directory\ndata data\n"


@pytest.mark.skipif(shutil.which("runsc") is None, reason="needs runsc (gVisor)")
@pytest.mark.usefixtures("podman")
class TestGvisor:
    pytestmark = real

    async def test_programs_see_its_kernel_and_sessions_work(self, podman: Podman) -> None:
        url = podman.gvisor()
        backend = other(podman, url=url, runtime="runsc")
        try:
            kernel = await backend.run("import os\nos.uname().release", session="s")
            assert kernel.text != f"{os.uname().release!r}\n"
            assert kernel.exit_code == 0
            made = await backend.run("open('a', 'w').write('1')", [File("b", b"2")], session="s")
            assert (made.fresh, made.files) == (False, (File("a", b"1"),))
            refused = await backend.run("import socket\nsocket.create_connection(('8.8.8.8', 53), 2)")
            assert "Error" in refused.text
            assert refused.exit_code == 1
        finally:
            backend.close()


class TestUnavailable:
    async def test_no_engine(self, tmp_path: Path) -> None:
        backend = ContainerBackend(url=f"unix://{tmp_path}/none.sock")
        with pytest.raises(SandboxUnavailable, match=r"No container engine answers at .*Start Docker"):
            await backend.check()
        backend.close()

    async def test_an_address_that_is_none(self) -> None:
        backend = ContainerBackend(url="nonsense://")
        with pytest.raises(SandboxUnavailable, match="nonsense"):
            await backend.check()
        backend.close()

    async def test_an_engine_without_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import docker

        monkeypatch.setattr(docker.DockerClient, "__init__", lambda self, **_: None)
        monkeypatch.setattr(docker.DockerClient, "info", lambda self: {"MemoryLimit": False, "PidsLimit": True})
        monkeypatch.setattr(docker.DockerClient, "close", lambda self: None)
        backend = ContainerBackend(url="unix:///any")
        with pytest.raises(SandboxUnavailable, match=r"can't limit its containers \(MemoryLimit\).*control groups"):
            await backend.check()
        backend.close()

    async def test_no_sdk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tools.python import container_engine

        container_engine._sdk.cache_clear()
        monkeypatch.setitem(sys.modules, "docker", None)
        backend = ContainerBackend()
        with pytest.raises(SandboxUnavailable, match=r"pip install 'whetstone\[container\]'"):
            await backend.run("1")
        backend.close()

    @pytest.mark.container
    @pytest.mark.skipif(bool(WHY_NOT), reason=f"a real engine {WHY_NOT}")
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"image": "localhost/none:1"}, "no image 'localhost/none:1'.*docker pull"),
            ({"image": IMAGE, "runtime": "nothing"}, "'runc' instead of 'nothing'.*containers.conf"),
        ],
    )
    async def test_the_engine_refuses(self, podman: Podman, options: dict[str, str], says: str) -> None:
        backend = ContainerBackend(url=podman.url, pool=1, **options)  # type: ignore[arg-type]
        with pytest.raises(SandboxUnavailable, match=says):
            await backend.check()
        backend.close()


async def until(done: object, seconds: float = 15.0) -> None:
    assert callable(done)
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(done):
        assert time.monotonic() < deadline, "it didn't come about in time"
        await asyncio.sleep(0.05)
