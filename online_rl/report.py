"""A run's report: one page for people (report.md with a curve), the same as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SHOWN = 8  # examples of each change


def write_report(folder: Path, report: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> None:
    """Write report.json, report.md and curve.png into the run's folder."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_curve(metrics, folder / "curve.png")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: dict[str, Any]) -> str:
    """The page: verdict, the gate's table, behaviour, examples, cost."""
    gate = report["gate"]
    lines = [
        f"# Run {report['run']}: {report['version']} {report['status']}",
        "",
        f"{report['version']} was trained from {report['parent']} in {report['steps']} steps on "
        + ", ".join(f"{n} {kind}" for kind, n in report["tasks"].items())
        + ".",
        "",
        *(f"- {reason}" for reason in report["reasons"]),
        *(f"- set aside: {n}, {reason}" for reason, n in report.get("set_aside", {}).items()),
        "",
        "![reward and accuracy by step](curve.png)",
        "",
        *accuracy_table(gate["rows"]),
        "",
        "| behaviour | before | after |",
        "|---|---|---|",
        *(
            f"| {name} | {gate['before'][key]:{spec}} | {gate['after'][key]:{spec}} |"
            for name, key, spec in (
                ("tool calls per answer", "calls_per_answer", ".2f"),
                ("tool errors per call", "error_rate", ".1%"),
                ("own tokens per answer", "own_tokens", ".1f"),
                ("well-formed answers", "well_formed", ".1%"),
            )
        ),
    ]
    for change in ("fixed", "broken"):
        of_kind = [e for e in report["examples"] if e["change"] == change]
        lines += ["", f"## {change.capitalize()}: {len(of_kind)}"]
        lines += [
            f"- {_short(e['question'])} Right: `{_short(e['gold'])}`. "
            f"Before: `{_short(e['before'])}`. After: `{_short(e['after'])}`."
            for e in of_kind[:_SHOWN]
        ]
    cost = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report["seconds"].items())
    return "\n".join([*lines, "", f"Time: {cost}.", ""])


def accuracy_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The gate's rows as lines of a Markdown table."""
    return [
        "| held-out tasks | n | before | after | difference (95 % interval) | p |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['kind']} | {row['n']} | {row['before']:.1%} | {row['after']:.1%} | {row['difference']:+.1%} "
            f"({row['interval'][0]:+.1%} to {row['interval'][1]:+.1%}) | {row['p']:.2g} |"
            for row in rows
        ),
    ]


def plot_curve(metrics: Sequence[dict[str, Any]], file: Path, title: str = "Training") -> None:
    """Reward and accuracy of the rollouts by step, with a running mean: what was sampled, not only what was trained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in metrics]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, colour in (("reward", "reward", "#b4530a"), ("accuracy", "accuracy", "#0b6e99")):
        values = [row[key] for row in metrics]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, running_mean(values, 5), color=colour, linewidth=2, label=f"{label}, mean of 5 steps")
    axes.set(xlabel="step", ylabel="mean over the step's rollouts", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with up to `window` - 1 values before it."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])]


def _short(text: str, limit: int = 100) -> str:
    flat = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
