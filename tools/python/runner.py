"""What runs inside the sandbox: limits itself, then runs the program from stdin as a notebook cell would.

`sandbox.py` hands this file's text to `python -I -S -c`, so it may import only what is cheap, and nothing of ours.
Everything here is in the program's reach: it serves the program, and no promise of the sandbox rests on it.
"""

import resource
import sys

NAME = "<code>"
FRAMES = 3  # of a deep recursion, the innermost frames say enough


def limit(cpu_s: int, memory: int, threads: int, file_bytes: int, open_files: int) -> None:
    """Hard limits for good. `threads` 0 leaves the host's: outside a user namespace the count is the whole user's."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    if threads:
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))


def run(source: bytes, scope: dict[str, object]) -> int:
    """Execute `source`; a last expression's value is printed as its repr. Returns the exit code."""
    import _ast

    try:
        tree: _ast.Module = compile(source, NAME, "exec", _ast.PyCF_ONLY_AST, True)  # type: ignore[assignment]
        last = tree.body[-1] if tree.body else None
        if isinstance(last, _ast.Expr):
            tree.body.pop()
        exec(compile(tree, NAME, "exec", dont_inherit=True), scope)
        if isinstance(last, _ast.Expr):
            value = eval(compile(_ast.Expression(last.value), NAME, "eval", dont_inherit=True), scope)
            if value is not None:
                print(repr(value))
    except SystemExit:
        raise
    except BaseException as error:
        report(error, source)
        return 1
    return 0


def report(error: BaseException, source: bytes) -> None:
    """Print the traceback of the program's own frames; without the memory for that, the error's name."""
    try:
        import linecache
        import traceback

        text = source.decode("utf-8", "replace")
        linecache.cache[NAME] = (len(text), None, text.splitlines(keepends=True), NAME)
        told = traceback.TracebackException.from_exception(error, compact=True)
        told.stack = traceback.StackSummary.from_list([f for f in told.stack if f.filename == NAME][-FRAMES:])
        sys.stderr.write("".join(told.format(chain=False)))
    except BaseException:  # an exception whose __str__ fails, or no memory left: its name is always at hand
        sys.stderr.write(type(error).__name__ + "\n")


def main() -> None:
    limit(*(int(value) for value in sys.argv[1:6]))
    sys.argv[:] = [""]
    sys.set_int_max_str_digits(0)  # time is limited already, and 2**20000 is a fair question
    source = sys.stdin.buffer.read()
    module = sys.modules["__main__"] = type(sys)("__main__")  # dataclasses and pickle look names up there
    sys.exit(run(source, module.__dict__))


if __name__ == "__main__":
    main()
