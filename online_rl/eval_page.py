"""An evaluation as one HTML file: its tables, plots and answers, with nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from online_rl.measures import Difference, Item, Slice, slices

_COLOURS = ("#0b6e99", "#b4530a")
_SHOWN = 40
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2226 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100%; font-size: .88rem } th { text-align: left; font-weight: 600 }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #d8dde1; vertical-align: top }
.n { text-align: right } td.n { white-space: nowrap } td.text { overflow-wrap: anywhere } .right { color: #1a7f37 }
.wrong { color: #b42318 } img { max-width: 100% } .note { color: #5a6570; font-size: .88rem }
"""
Measured = Mapping[str, Sequence[Item]]  # by version, one or two


def page(title: str, settings: Mapping[str, Any], measured: Measured, compared: Sequence[Difference]) -> str:
    """The whole page. `settings` are shown as they are: sets, temperature, k, seed."""
    rows = {version: slices(items) for version, items in measured.items()}
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=note>{escape(', '.join(f'{name}: {value}' for name, value in settings.items()))}</p>",
    ]
    for version, its in rows.items():
        parts += [f"<h2>{escape(version)}</h2>", _table(_COLUMNS, [_cells(row) for row in its])]
    if compared:
        before, after = measured
        parts += [f"<h2>{escape(after)} against {escape(before)}, the same items and tool results</h2>"]
        parts.append(_table(("kind", "n", before, after, "difference (95 % interval)", "p (McNemar)"),
                            [difference_cells(row) for row in compared]))  # fmt: skip
    parts += ["<h2>Plots</h2>", _accuracy_plot(rows), _behaviour_plot(rows), _latency_plot(measured)]
    parts += ["<h2>Answers</h2>", _answers(measured), f"<p class=note>{escape(_NOTE)}</p>"]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'


_COLUMNS = (
    "kind", "n", "accuracy (95 % interval)", "calls per answer", "per right answer", "useless calls", "failed calls",
    "own tokens", "well-formed", "latency p50", "p95",
)  # fmt: skip
_NOTE = (
    "Intervals: Wilson's for one answer an item, else a bootstrap over items. Useless calls: the share of calls in "
    "answers that were the same, or right as well, with the tools off. Latency: seconds from prompt to answer, with "
    "other answers in flight."
)


def _cells(row: Slice) -> list[str]:
    low, high = row.interval
    return [
        row.kind, str(row.n), f"{row.accuracy:.1%} ({low:.1%} to {high:.1%})", f"{row.calls_per_answer:.2f}",
        _maybe(row.calls_per_right, ".2f"), _maybe(row.useless_calls, ".1%"), f"{row.error_rate:.1%}",
        f"{row.own_tokens:.0f}", f"{row.well_formed:.1%}", f"{row.latency_p50:.2f} s", f"{row.latency_p95:.2f} s",
    ]  # fmt: skip


def difference_cells(row: Difference) -> list[str]:
    low, high = row.interval
    return [row.kind, str(row.n), f"{row.before:.1%}", f"{row.after:.1%}",
            f"{row.difference:+.1%} ({low:+.1%} to {high:+.1%})", _maybe(row.p, ".2g")]  # fmt: skip


def _maybe(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th{' class=n' if i else ''}>{escape(column)}</th>" for i, column in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td{' class=n' if i else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _answers(measured: Measured) -> str:
    """The first items with gold and each version's first answer; the rest is in the JSON."""
    versions = list(measured)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("question", "gold", *versions))
    lines = []
    for items in list(zip(*measured.values(), strict=True))[:_SHOWN]:
        cells = [_cut(items[0].task.question, 240), _cut(items[0].task.gold, 80)]
        told = "".join(f"<td class=text>{escape(cell)}</td>" for cell in cells)
        for item in items:
            first = item.samples[0]
            verdict = "right" if first.result.correct else "wrong"
            calls = f" <span class=note>({first.result.tool_calls} calls)</span>" if first.result.tool_calls else ""
            told += f'<td class="text {verdict}">{escape(_cut(first.answer, 160)) or "no answer"}{calls}</td>'
        lines.append(f"<tr>{told}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cut(text: str, limit: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[: limit - 1]}…"


Draw = Callable[[Any, Sequence[Slice], list[float], float, str, str], None]
"""`draw(axes, slices, places, height, version, colour)`: one version's bars."""


def _bars(rows: Mapping[str, Sequence[Slice]], draw: Draw, what: str, **axis: Any) -> str:
    """A bar for each kind and version."""
    plt = _pyplot()
    kinds = [row.kind for row in next(iter(rows.values()))]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(kinds) * len(rows) + 1.4), layout="constrained")
    height = 0.8 / len(rows)
    for number, (version, its) in enumerate(rows.items()):
        places = [index + number * height for index in range(len(its))]
        draw(axes, its, places, height, version, _COLOURS[number])
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(kinds))], kinds)
    axes.invert_yaxis()
    axes.set(**axis)
    return _shown(plt, figure, axes, what)


def _accuracy_plot(rows: Mapping[str, Sequence[Slice]]) -> str:
    def draw(axes: Any, its: Sequence[Slice], places: list[float], height: float, version: str, colour: str) -> None:
        spread = [[max(0.0, row.accuracy - row.interval[0]) for row in its],
                  [max(0.0, row.interval[1] - row.accuracy) for row in its]]  # fmt: skip
        axes.barh(places, [row.accuracy for row in its], height, color=colour, label=version,
                  xerr=spread, error_kw={"ecolor": "#444", "capsize": 3, "linewidth": 1})  # fmt: skip

    return _bars(rows, draw, "accuracy by kind", xlim=(0, 1), xlabel="accuracy, with 95 % intervals")


def _behaviour_plot(rows: Mapping[str, Sequence[Slice]]) -> str:
    def draw(axes: Any, its: Sequence[Slice], places: list[float], height: float, version: str, colour: str) -> None:
        calls = [row.calls_per_answer for row in its]
        useless = [row.calls_per_answer * (row.useless_calls or 0.0) for row in its]
        axes.barh(places, calls, height, color=colour, alpha=0.45, label=f"{version}: calls")
        axes.barh(places, useless, height, color=colour, hatch="///", label=f"{version}: of these useless")

    return _bars(rows, draw, "tool calls by kind", xlabel="tool calls per answer")


def _latency_plot(measured: Measured) -> str:
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
    for number, (version, items) in enumerate(measured.items()):
        seconds = sorted(sample.seconds for item in items for sample in item.samples)
        shares = [(index + 1) / len(seconds) for index in range(len(seconds))]
        axes.step(seconds, shares, where="post", color=_COLOURS[number], label=version)
    axes.set(xlabel="seconds to the end of an answer", ylabel="share of answers", ylim=(0, 1.02))
    return _shown(plt, figure, axes, "latency, cumulative")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _shown(plt: Any, figure: Any, axes: Any, what: str) -> str:
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=110)
        encoded = base64.b64encode(file.getvalue()).decode()
    plt.close(figure)
    return f'<p><img alt="{escape(what)}" src="data:image/png;base64,{encoded}"></p>'
