"""A Podman of the tests' own: its storage, configuration and socket lie in one folder, and go with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

IMAGE = "localhost/whetstone-test:1"
MISSING = [name for name in ("podman", "runc") if shutil.which(name) is None]
WHY_NOT = f"needs {' and '.join(MISSING)}" if MISSING else "needs root" if os.getuid() else ""
_LIMITS = """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "{runtime}"
[engine.runtimes]
runsc = ["{folder}/runsc"]
"""
OTHER = "localhost/whetstone-test:2"  # the same image, for tests that count their own containers
_STORAGE = """[storage]
driver = "{driver}"
runroot = "{folder}/run"
graphroot = "{folder}/images"
"""
_PACKAGES = """
numpy numpy.libs matplotlib mpl_toolkits PIL pillow.libs contourpy cycler dateutil fontTools kiwisolver packaging
pyparsing six.py
"""


class Podman:
    """A running engine with one image. `url` is its socket's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/podman.sock"
        self._env = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }
        self._services: list[subprocess.Popen[bytes]] = []
        (folder / "containers.conf").write_text(_LIMITS.format(folder=folder, runtime="runc"))
        (folder / "storage.conf").write_text(_STORAGE.format(folder=folder, driver="overlay"))
        gvisor = folder / "runsc"
        gvisor.write_text('#!/bin/sh\nexec runsc --network=none --ignore-cgroups --platform=ptrace "$@"\n')
        gvisor.chmod(0o755)
        self._before = set(Path("/sys/fs/cgroup").glob("**/libpod_parent"))
        try:
            _pack(folder / "image.tar")
            self.command("import", "--quiet", str(folder / "image.tar"), IMAGE)
            self.command("tag", IMAGE, OTHER)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"Podman doesn't work here: {error.stderr}") from error
        (folder / "image.tar").unlink()
        self._serve(self.url)

    def gvisor(self) -> str:
        """The URL of a second service on the same storage, whose runtime is gVisor's."""
        conf = self.folder / "gvisor.conf"
        conf.write_text(_LIMITS.format(folder=self.folder, runtime="runsc"))
        url = f"unix://{self.folder}/gvisor.sock"
        self._serve(url, CONTAINERS_CONF=str(conf))
        return url

    def _serve(self, url: str, **env: str) -> None:
        service = subprocess.Popen(
            ["podman", "system", "service", "--time=0", url],
            env={**self._env, **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._services.append(service)
        deadline = time.monotonic() + 20
        while not Path(url.removeprefix("unix://")).exists():
            if service.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"podman system service ended with {service.poll()}")
            time.sleep(0.02)

    def command(self, *arguments: str) -> str:
        ran = subprocess.run(
            ["podman", *arguments], env=self._env, capture_output=True, text=True, check=True, timeout=60
        )
        return ran.stdout

    def _remove_all(self) -> None:
        for attempt in range(5):  # a container that removes itself meanwhile is an error to Podman
            try:
                self.command("rm", "--all", "--force", "--time=0")
                self.command("rmi", "--all", "--force")
                return
            except subprocess.CalledProcessError:
                if attempt == 4:
                    raise
                time.sleep(0.5)

    def containers(self, image: str = OTHER) -> list[str]:
        lines = self.command("ps", "--all", "--format", "{{.ID}} {{.Image}}").splitlines()
        return [line.split()[0] for line in lines if line.endswith(f" {image}")]

    def close(self) -> None:
        for service in self._services:
            service.terminate()
            service.wait(10)
        self._remove_all()
        subprocess.run(["umount", str(self.folder / "images" / "overlay")], capture_output=True, check=False)
        for left in set(Path("/sys/fs/cgroup").glob("**/libpod_parent")) - self._before:
            for path, _, _ in os.walk(left, topdown=False):
                os.rmdir(path)


def _pack(target: Path) -> None:
    """An image of the interpreter at hand, its standard library, and what draws figures."""
    base = Path(sys.base_prefix)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = f"usr/local/lib/{version}"
    with tarfile.open(target, "w") as out:
        out.add(Path(os.path.realpath(sys.executable)), "usr/local/bin/python3")
        for entry in sorted((base / "lib" / version).iterdir()):
            if entry.name not in ("site-packages", "dist-packages"):
                out.add(entry, f"{library}/{entry.name}", filter=_needed)
        import numpy

        site = Path(numpy.__file__).parent.parent
        for name in _PACKAGES.split():
            if (site / name).exists():
                out.add(site / name, f"{library}/site-packages/{name}", filter=_needed)
        binaries = [Path(os.path.realpath(sys.executable)), *(base / "lib" / version / "lib-dynload").glob("*.so")]
        for name in ("numpy", "matplotlib", "PIL", "contourpy", "kiwisolver"):
            binaries += (site / name).glob("**/*.so")
        for path in _libraries(binaries):
            out.add(os.path.realpath(path), f"lib/{path.name}" if base in path.parents else str(path).lstrip("/"))
        for folder, mode in (("tmp", 0o1777), ("mnt", 0o755), ("proc", 0o555), ("sys", 0o555), ("dev", 0o755)):
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, mode
            out.addfile(member)


def _needed(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    left_out = {"test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3"}
    parts = Path(member.name).parts
    return None if left_out & set(parts) or any(part.startswith("config-") for part in parts) else member


def _libraries(binaries: Iterable[Path]) -> set[Path]:
    """The shared libraries that they load from outside their own packages."""
    said = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout
    found = {Path(path) for path in re.findall(r"(/\S+) \(0x", said)}
    return {path for path in found if "site-packages" not in path.parts}
