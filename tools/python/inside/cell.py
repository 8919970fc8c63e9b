"""Runs one program as a notebook cell would: a last expression's value is shown, a traceback cut to what helps."""

import sys

NAME = "<code>"
FRAMES = 3  # of a deep recursion, the innermost frames say enough
_PART = 2000  # characters of a line in a traceback
IMAGE_BYTES = 4 << 20
_MAX_PIXELS = 4000  # of a figure's longer side


def run(source: bytes, scope: dict[str, object]) -> int:
    """Execute `source`; a last expression's value is printed as its repr. Returns the exit code."""
    import _ast

    text = source.decode()  # so that no coding cookie says otherwise
    try:
        tree: _ast.Module = compile(text, NAME, "exec", _ast.PyCF_ONLY_AST, True)  # type: ignore[assignment]
        last = tree.body[-1] if tree.body else None
        if isinstance(last, _ast.Expr):
            tree.body.pop()
        exec(compile(tree, NAME, "exec", dont_inherit=True), scope)
        if isinstance(last, _ast.Expr):
            value = eval(compile(_ast.Expression(last.value), NAME, "eval", dont_inherit=True), scope)
            if value is not None and not text.rstrip().endswith(";"):
                print(repr(value))
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        sys.stderr.write(f"{error.code}\n")
        return 1
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
        cause = told.__cause__ or (None if told.__suppress_context__ else told.__context__)
        if cause is not None:  # its last line says enough
            sys.stderr.write("After " + _shorter([*cause.format_exception_only()][-1]))
        sys.stderr.write("".join(map(_shorter, told.format(chain=False))))
    except BaseException:  # an exception whose __str__ fails, or no memory left: its name is always at hand
        sys.stderr.write(type(error).__name__ + "\n")


def _shorter(part: str) -> str:
    """A line of a traceback, which may be a program's only line or an error's whole data."""
    return part if len(part) <= _PART else f"{part[: _PART // 2]} [...] {part[-_PART // 2 :]}"


def figures(most: int) -> list[bytes]:
    """The open matplotlib figures as PNG, at most `most` of them; they are closed. ValueError: one is too large."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or not pyplot.get_fignums():
        return []
    from io import BytesIO

    drawn = []
    if len(pyplot.get_fignums()) > most:
        sys.stderr.write(f"Of {len(pyplot.get_fignums())} figures the first {most} are shown.\n")
    for number in pyplot.get_fignums()[:most]:
        figure = pyplot.figure(number)
        dpi = min(figure.dpi, _MAX_PIXELS / max(*figure.get_size_inches(), 0.01))
        png = BytesIO()
        figure.savefig(png, format="png", dpi=dpi)
        if png.tell() > IMAGE_BYTES:
            raise ValueError(f"figure {number} has {png.tell()} bytes as PNG; at most {IMAGE_BYTES} are shown")
        drawn.append(png.getvalue())
    pyplot.close("all")
    return drawn
