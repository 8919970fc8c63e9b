"""The system calls that a sandboxed program has no use for, as the filter that bubblewrap loads before it starts.

Without `fork` the memory limit of one process is the limit of the whole program; without `socket` not even the
families that a network namespace doesn't cover (vsock) are left. Classic BPF over `struct seccomp_data`, see
Documentation/userspace-api/seccomp_filter.rst of Linux.
"""

from __future__ import annotations

import errno
import platform
import struct

# name: (x86_64, aarch64), from the kernel's syscall tables; None where the architecture lacks the call
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # processes (threads are let through by the rule for clone)
    "fork": (57, None),
    "vfork": (58, None),
    # network; socketpair stays, asyncio wakes itself by it
    "socket": (41, 198),
    # descriptors in flight between sockets count against the user, who may be the server's as well; and what the
    # server sends could be received with a descriptor of the server's process
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "recvmsg": (47, 212),
    "recvmmsg": (299, 243),
    # memory that neither the address space nor a mount's size limits
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # what the whole machine, or all programs of a user, have a fixed number of
    "io_setup": (206, 0),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "sync": (162, 81),
    "syncfs": (306, 267),
    # a timer could wake an interpreter that has been stopped until its conversation goes on
    "timer_create": (222, 107),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # other processes, and handles that walk around paths
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # the kernel's large and seldom needed doors
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kcmp": (312, 272),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
}
_EXEC = ((59, 221), (322, 281))  # execve, execveat
_CLONE, _CLONE3 = (56, 220), (435, 435)
_FCNTL, _GETSOCKOPT = (72, 25), (55, 209)
# F_SETSIG, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ: signals of one's choice, a hold on files of the system that others
# open, and more than one's share of the memory that a user's pipes may have
_FCNTL_DENIED = (10, 1024, 1026, 1031)
_SO_PEERPIDFD = 77  # a descriptor of the process at the channel's other end
_LATER = 451  # calls of Linux 6.5 and newer, on both machines: statmount, for one, tells paths outside of the sandbox
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_MACHINES = {"x86_64": 0, "aarch64": 1, "arm64": 1}
_X32_BIT = 0x40000000  # the x32 calls would be a second table beside the one that is filtered
_CLONE_THREAD = 0x00010000

_LOAD, _AND, _RETURN, _EQUAL, _AT_LEAST = 0x20, 0x54, 0x06, 0x15, 0x35  # BPF opcodes on the 32-bit accumulator
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH, _ARG0, _ARG1, _ARG2 = 0, 4, 16, 24, 32  # offsets in struct seccomp_data, little-endian


def supported(machine: str | None = None) -> bool:
    """Is there a table for this machine (default: the one at hand)?"""
    return (machine or platform.machine()) in _MACHINES


def program(machine: str | None = None, *, allow_exec: bool = True) -> bytes:
    """The filter as an array of `struct sock_filter`. KeyError for a machine that isn't `supported`.

    Without `allow_exec` no program can be executed: only for a filter that is loaded when the interpreter runs.
    """
    column = _MACHINES[machine or platform.machine()]
    deny = _op(_RETURN, _ERRNO | errno.EPERM)
    code = [_op(_LOAD, _ARCH), _op(_EQUAL, _AUDIT_ARCH[column], yes=1), _op(_RETURN, _KILL), _op(_LOAD, _NR)]
    if column == 0:
        code += [_op(_AT_LEAST, _X32_BIT, no=1), deny]
    code += [_op(_AT_LEAST, _LATER, no=1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    for numbers in (*_DENIED.values(), *(() if allow_exec else _EXEC)):
        number = numbers[column]
        if number is not None:
            code += [_op(_EQUAL, number, no=1), deny]
    # clone3 hides its flags behind a pointer; told that it doesn't exist, libc makes threads by clone
    code += [_op(_EQUAL, _CLONE3[column], no=1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    code += [_op(_EQUAL, _CLONE[column], no=5), _op(_LOAD, _ARG0), _op(_AND, _CLONE_THREAD)]
    code += [_op(_EQUAL, _CLONE_THREAD, yes=1), deny, _op(_RETURN, _ALLOW)]
    code += [_op(_EQUAL, _GETSOCKOPT[column], no=4), _op(_LOAD, _ARG2)]
    code += [_op(_EQUAL, _SO_PEERPIDFD, no=1), deny, _op(_RETURN, _ALLOW)]
    code += [_op(_EQUAL, _FCNTL[column], yes=1), _op(_RETURN, _ALLOW), _op(_LOAD, _ARG1)]
    for command in _FCNTL_DENIED:
        code += [_op(_EQUAL, command, no=1), deny]
    code += [_op(_RETURN, _ALLOW)]
    return b"".join(code)


def _op(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    """One instruction; `yes` and `no` are how many instructions a comparison skips."""
    return struct.pack("<HBBI", code, yes, no, value)
