"""Supervision of an SGLang server, on a stand-in for the `sglang` package that starts in a moment."""

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from serving.engines.base import EngineError
from serving.engines.sglang_server import LORA_TARGETS, SGLangConfig
from serving.engines.supervised import running_server

LAUNCH = '''
"""Answers /health when it has the right key, as long as BROKEN isn't in the environment."""
import http.server, os, subprocess, sys, time
print("loading weights", *sys.argv[1:], flush=True)
if os.environ.get("BROKEN"):
    sys.exit("CUDA out of memory")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
options = dict(zip(sys.argv[1:], sys.argv[2:]))
keys = open(options["--config"]).read()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        key = self.headers["Authorization"].removeprefix("Bearer ")
        self.send_response(200 if f"admin-api-key: {key}" in keys else 401)
        self.end_headers()
        self.wfile.write(str(child.pid).encode())
    def log_message(self, *_): pass

http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
'''


@pytest.fixture
def config(tmp_path):
    package = tmp_path / "package" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(LAUNCH)

    def make(env=None, **options):
        env = {"PYTHONPATH": str(tmp_path / "package")} | (env or {})
        return SGLangConfig("/models/some", tmp_path / "logs" / "sglang.log", env=env, **options)

    return make


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def group(pid):
    """The processes of this group that run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgid = file.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, ValueError):
            continue  # it has just ended
        if int(pgid) == pid and state != "Z":
            found.append(file.parent.name)
    return found


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


async def child_of(server):
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {server.key}"}) as client:
        return int((await client.get(f"{server.url}/health")).text)


async def test_it_is_started_with_its_settings_and_leaves_nothing_behind(config, tmp_path):
    told = []
    options = config(tensor_parallel=2, deterministic=True, memory_fraction=0.8, flags=("--device", "cpu"))
    async with running_server(options, told.append) as server:
        child, pid = await child_of(server), server.process.pid
        keys = tmp_path / "logs" / "sglang.keys.yaml"
        assert stat.S_IMODE(keys.stat().st_mode) == 0o600
        command = command_of(pid)
        assert server.key not in command
        assert os.getpgid(pid) == pid != os.getpgid(0)
    for pair in (("--tp-size", "2"), ("--mem-fraction-static", "0.8"), ("--max-lora-rank", "16"), ("--device", "cpu")):
        assert command[command.index(pair[0]) + 1] == pair[1]
    assert command[command.index("--lora-target-modules") + 1 :][:7] == list(LORA_TARGETS)
    assert "--enable-deterministic-inference" in command
    assert "--enable-memory-saver" not in command
    assert not lives(pid)
    assert not lives(child)
    assert not keys.exists()


async def test_one_that_cannot_start_says_why(config):
    with pytest.raises(EngineError, match=r"status 1(.|\n)*CUDA out of memory"):
        async with running_server(config({"BROKEN": "1"})):
            pass
    with pytest.raises(EngineError, match="nowhere"):
        async with running_server(config(python="/nowhere/python")):
            pass


async def test_a_crash_starts_it_again_at_the_same_address(config):
    async with running_server(config()) as server:
        first, child = server.process.pid, await child_of(server)
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(30):
            second = child
            while second == child:
                await asyncio.sleep(0.05)
                with contextlib.suppress(httpx.HTTPError):
                    second = await child_of(server)
        assert server.starts == 2
        assert not lives(child)  # the first one's own processes went with it


def test_it_ends_with_a_whetstone_that_is_killed(config, tmp_path):
    program = f"""
import asyncio
from pathlib import Path
from serving.engines.sglang_server import SGLangConfig
from serving.engines.supervised import running_server
async def main():
    config = SGLangConfig("m", Path({str(tmp_path / "log")!r}), env={dict(config().env)!r})
    async with running_server(config) as server:
        print(server.process.pid, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        assert len(group(pid)) >= 3  # the server, its own child, and what watches over them
        owner.kill()
    end = time.monotonic() + 20
    while group(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not group(pid)
