"""When two golds mean the same: one spelling for each, so that the record can compare what people say is right."""

from __future__ import annotations

from online_rl.verifiers import exact, math_answer
from online_rl.verifiers.numbers import read_number


def gold_key(verifier: str, gold: str) -> str:
    """Equal for golds that the verifiers hold to be the same, across verifiers: "1,407,567" and "1407567.0", or "The
    Peru" and "peru". "" for `no_tool`, whose gold is no answer. Quick, at the price that symbolic golds (1/\\sqrt{2},
    \\sqrt{2}/2) only count as the same where their typesetting is."""
    if verifier == "no_tool":
        return ""
    value = read_number(gold).value
    if value is not None:
        return f"{value.normalize():f}" if value else "0"
    if verifier == "math":
        return math_answer.bare(gold)
    return " ".join(exact.words(gold)) or gold.strip()
