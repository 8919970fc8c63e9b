"""What the backend "container" asks of a Docker Engine or of Podman's socket: start, talk to, and end containers.

Blocks: call it from threads. The engine's own errors become SandboxUnavailable with the way out.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.python import process
from tools.python.backend import Limits, SandboxUnavailable

_LABEL = "whetstone.sandbox"  # on every container; its value names the process that started it
_ENGINE_S = 60.0
_REMOVE_S = 15.0
_NOBODY = "65534:65534"
_STREAM = struct.Struct(">BxxxI")  # the engine's own framing of stdout and stderr: the stream, the length
_STDERR = 2
_LIBRARIES_BYTES = 384 << 20  # an interpreter with the batteries imported, twice: its pages part after the fork
_KERNEL_BYTES = 256 << 20  # of a runtime that brings a kernel of its own
_KERNEL_THREADS = 256
_START_THREADS = 16  # of the runtime itself, before it becomes Python
_USER_THREADS = 8192
_CGROUPS = "Give it control groups: delegate them to a rootless engine, or mount them where it runs."
_PLAIN_RUNTIMES = (None, "runc", "crun", "io.containerd.runc.v2")


@dataclass(frozen=True)
class Shape:
    """What a container is made of. `cpus` in cores; `url` of the engine, None: DOCKER_HOST or a usual socket."""

    image: str
    runtime: str | None = None
    cpus: float = 1.0
    url: str | None = None
    python: str = "python3"


class Gone(Exception):
    """The container has ended, or the connection to it."""


class Late(Exception):
    """The deadline passed first."""


class Container:
    """One running container and the connection to its first process."""

    def __init__(self, identity: str, connection: Any, remove: Callable[[str], None]) -> None:
        self.identity = identity
        self._connection = connection  # keeps the HTTP response alive, and with it the socket
        self._socket: socket.socket = getattr(connection, "_sock", connection)
        self._remove = remove
        self._stream, self._left = 0, 0
        self.complaint = bytearray()  # the beginning of its stderr: why Python didn't start

    def send(self, data: bytes, deadline: float) -> None:
        """Raises Gone or Late."""
        with self._within(deadline):
            self._socket.sendall(data)

    def receive(self, deadline: float) -> bytes:
        """The next piece of its stdout, at most 64 KiB. Raises Gone or Late."""
        while True:
            if self._left == 0:
                head = b""
                while len(head) < _STREAM.size:
                    head += self._piece(_STREAM.size - len(head), deadline)
                self._stream, self._left = _STREAM.unpack(head)
                continue
            chunk = self._piece(min(self._left, 1 << 16), deadline)
            self._left -= len(chunk)
            if self._stream != _STDERR:
                return chunk
            self.complaint += chunk[: 4096 - len(self.complaint)]

    def _piece(self, most: int, deadline: float) -> bytes:
        with self._within(deadline):
            chunk = self._socket.recv(most)
        if not chunk:
            raise Gone
        return chunk

    @contextlib.contextmanager
    def _within(self, deadline: float) -> Iterator[None]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Late
        try:
            self._socket.settimeout(left)
            yield
        except TimeoutError:
            raise Late from None
        except OSError:
            raise Gone from None

    def hang_up(self) -> None:
        """From any thread: whoever sends or receives gets Gone, and the first process ends itself."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Kill and remove it. Never raises; what an engine that is away leaves behind is swept at the next start."""
        self.hang_up()
        with contextlib.suppress(OSError):
            self._connection.close()
            self._socket.close()
        self._remove(self.identity)


class Engine:
    """A connection to the engine, opened by the first call and safe to use from several threads."""

    def __init__(self, shape: Shape, limits: Limits) -> None:
        self.shape, self._limits = shape, limits
        self._lock = threading.Lock()
        self._client: Any = None

    def start(self, text: str) -> Container:
        """A started container whose first process is Python with the program `text`. Raises SandboxUnavailable."""
        sdk = _sdk()
        client = self._connect()
        identity = ""
        try:
            made = client.api.create_container(**self._parts(client, text))
            identity = made["Id"]
            self._check(client, identity, made.get("Warnings") or [])
            channels = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
            connection = client.api.attach_socket(identity, params=channels)
            client.api.start(identity)
            return Container(identity, connection, self._remove)
        except (sdk.errors.DockerException, OSError) as error:
            if identity:
                self._remove(identity)
            raise self._explained(error) from error

    def sweep(self) -> int:
        """Remove what servers that no longer run have left on this engine; returns how many containers."""
        removed = 0
        client = self._connect()
        try:
            found = client.api.containers(all=True, filters={"label": [_LABEL]})
        except (_sdk().errors.DockerException, OSError) as error:
            raise self._explained(error) from error
        for entry in found:
            if _is_left_over(entry.get("Labels", {}).get(_LABEL, ""), entry.get("State", "")):
                self._remove(entry["Id"])
                removed += 1
        return removed

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _connect(self) -> Any:
        sdk = _sdk()
        with self._lock:
            if self._client is None:
                try:
                    if url := self.shape.url or _usual_socket():
                        client = sdk.DockerClient(base_url=url, version="auto", timeout=_ENGINE_S)
                    else:
                        client = sdk.from_env(version="auto", timeout=_ENGINE_S)
                    able = client.info()
                except (sdk.errors.DockerException, OSError, ValueError) as error:
                    where = self.shape.url or os.environ.get("DOCKER_HOST") or "its usual sockets"
                    raise SandboxUnavailable(
                        f"No container engine answers at {where}: {error}. Start Docker, or `podman system service "
                        "--time=0`, name its socket in DOCKER_HOST, and let this user open it."
                    ) from error
                if missing := [name for name in ("MemoryLimit", "PidsLimit") if able.get(name) is False]:
                    client.close()
                    raise SandboxUnavailable(
                        f"The container engine can't limit its containers ({' and '.join(missing)}). {_CGROUPS}"
                    )
                self._client = client
            return self._client

    def _remove(self, identity: str) -> None:
        """Kill a container and wait until the engine has forgotten it, or seems unable to."""
        errors = _sdk().errors
        deadline = time.monotonic() + _REMOVE_S
        with contextlib.suppress(SandboxUnavailable, errors.DockerException, OSError):
            api = self._connect().api
            while time.monotonic() < deadline:
                try:
                    api.remove_container(identity, v=True, force=True)
                    return
                except errors.NotFound:
                    return
                except errors.APIError:  # it is just ending, or being removed, by itself: Podman calls that an error
                    time.sleep(0.05)

    def _check(self, client: Any, identity: str, warnings: list[str]) -> None:
        """Raises SandboxUnavailable if the engine left out a limit, or took another runtime, as Podman does."""
        if left_out := [warning for warning in warnings if "discarded" in warning.lower()]:
            self._remove(identity)
            raise SandboxUnavailable(f"The container engine doesn't limit its containers: {left_out[0]} {_CGROUPS}")
        wanted = self.shape.runtime
        if wanted is None:
            return
        got = client.api.inspect_container(identity)["HostConfig"].get("Runtime")
        if got != wanted:
            own = client.api.get(f"{client.api.base_url}/v4.0.0/libpod/containers/{identity}/json")
            got = Path(own.json().get("OCIRuntime") or "").name if own.ok else got
        if got != wanted:
            self._remove(identity)
            raise SandboxUnavailable(
                f"The container engine would use the runtime {got!r} instead of {wanted!r}. Podman takes it from "
                f'containers.conf alone: write runtime = "{wanted}" under [engine] there, and start its service anew.'
            )

    def _parts(self, client: Any, text: str) -> dict[str, Any]:
        sdk, limits, shape = _sdk(), self._limits, self.shape
        kernel = shape.runtime not in _PLAIN_RUNTIMES
        memory = limits.memory_bytes + 2 * limits.tmp_bytes + limits.files_bytes + _LIBRARIES_BYTES
        memory += _KERNEL_BYTES if kernel else 0
        host = client.api.create_host_config(
            auto_remove=True,
            cap_drop=["ALL"],
            init=False,
            ipc_mode="private",
            log_config={"type": "none", "config": {}},  # else a flood of output would fill the host's disk
            mem_limit=memory,
            memswap_limit=memory,
            nano_cpus=int(shape.cpus * 1e9),
            network_mode="none",
            pids_limit=max(limits.threads + 1, _START_THREADS) + (_KERNEL_THREADS if kernel else 0),
            read_only=True,
            runtime=shape.runtime,
            security_opt=["no-new-privileges"],
            shm_size=limits.tmp_bytes,
            tmpfs={
                "/tmp": f"rw,nosuid,nodev,noexec,size={limits.tmp_bytes},mode=1777",
                "/mnt/data": f"rw,nosuid,nodev,noexec,size={limits.files_bytes},mode=1777",
            },
            ulimits=[
                sdk.types.Ulimit(name="core", soft=0, hard=0),
                sdk.types.Ulimit(name="fsize", soft=limits.file_bytes, hard=limits.file_bytes),
                sdk.types.Ulimit(name="nofile", soft=limits.open_files, hard=limits.open_files),
                # counted for the user, not the container (pids_limit does that); named so that Podman doesn't raise it
                sdk.types.Ulimit(name="nproc", soft=_USER_THREADS, hard=_USER_THREADS),
            ],
        )
        return {
            "image": shape.image,
            "entrypoint": [shape.python, "-I", "-B", "-u", "-X", "utf8", "-c", text],
            "command": [],
            "environment": {"HOME": "/tmp", "LANG": "C.UTF-8", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"},
            "host_config": host,
            "hostname": "sandbox",
            "labels": {_LABEL: _who(os.getpid())},
            "network_disabled": True,
            "stdin_open": True,
            "stop_signal": "SIGKILL",
            "stop_timeout": 0,
            "use_config_proxy": False,  # a proxy's address may carry a password
            "user": _NOBODY,
            "working_dir": "/mnt/data",
        }

    def _explained(self, error: Exception) -> SandboxUnavailable:
        sdk, shape = _sdk(), self.shape
        if isinstance(error, sdk.errors.ImageNotFound):
            return SandboxUnavailable(
                f"The container engine has no image {shape.image!r}: run `docker pull {shape.image}` (or podman pull), "
                "or set container_image to one that it has."
            )
        said = str(getattr(error, "explanation", None) or error)
        hint = "Try the same by hand: docker run --rm --network none --read-only " + (
            f"--runtime {shape.runtime} {shape.image} {shape.python} -V"
            if shape.runtime
            else f"{shape.image} {shape.python} -V"
        )
        if shape.runtime and "runtime" in said.lower():
            hint = f"Install the runtime {shape.runtime!r} and register it with the engine, or unset container_runtime."
        return SandboxUnavailable(f"The container engine can't start a sandbox: {said}. {hint}")


@functools.cache
def _sdk() -> ModuleType:
    try:
        import docker
    except ImportError:
        raise SandboxUnavailable(
            "The sandbox backend 'container' needs the Docker SDK: pip install 'whetstone[container]'."
        ) from None
    return docker  # type: ignore[no-any-return]


def _usual_socket() -> str | None:
    """Podman's socket where Docker's is missing and DOCKER_HOST names none."""
    if os.environ.get("DOCKER_HOST") or Path("/var/run/docker.sock").exists():
        return None
    own = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    for path in (f"{own}/podman/podman.sock", "/run/podman/podman.sock"):
        if os.access(path, os.W_OK):
            return f"unix://{path}"
    return None


def _who(pid: int) -> str:
    """Names a process among all of the machines that may share an engine: its view of processes, id and start."""
    return f"{_place()}:{pid}:{process.started(pid)}"


@functools.cache
def _place() -> str:
    """Two processes are in the same place if each can see by an id whether the other runs."""
    parts = [socket.gethostname(), process.namespace()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _is_left_over(who: str, state: str) -> bool:
    """Only a server of this place can be known to be dead; what others left ends by itself, and is swept then."""
    if state in ("exited", "dead"):
        return True
    place, _, rest = who.partition(":")
    pid, _, start = rest.partition(":")
    return place == _place() and pid.isdecimal() and not process.runs(int(pid), start)
