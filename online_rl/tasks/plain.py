"""Plain tasks: what people say to an assistant that needs neither code nor search."""

from __future__ import annotations

import json
import random
from functools import cache
from importlib import resources

from online_rl.tasks.base import Task, ask


@cache
def prompts() -> tuple[tuple[str, str], ...]:
    """Every (prompt, a good reply) of `plain.jsonl`."""
    lines = resources.files("online_rl.tasks").joinpath("plain.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    return tuple((row["question"], row["reply"]) for row in rows)


def plain(rng: random.Random) -> Task:
    """One prompt with the verifier `no_tool`. The gold is empty; `meta["reply"]` is one good answer."""
    question, reply = rng.choice(prompts())
    return ask(question, "no_tool", "", "plain", key=f"prompt:{' '.join(question.lower().split())}", reply=reply)
