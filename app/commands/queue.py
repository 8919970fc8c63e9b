"""`whetstone queue`: what waits for training or for a person, whose golds don't count, what failed."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Annotated

import typer

from app.commands import console
from app.commands.console import AsJson

if TYPE_CHECKING:
    from feedback_store import Review

queue = typer.Typer(help="The tasks that wait for training, oldest first.", invoke_without_command=True)
review = typer.Typer(help="The questions whose gold a person must decide.", invoke_without_command=True)
quarantine = typer.Typer(help="Owners whose golds don't count.", invoke_without_command=True)
queue.add_typer(review, name="review")
queue.add_typer(quarantine, name="quarantine")
Limit = Annotated[int, typer.Option(min=1, help="How many to show.")]
AReview = Annotated[str, typer.Argument(help="A question's id, or that of one of its tasks.")]
AnOwner = Annotated[str, typer.Argument(help="As `whetstone keys list` names them: key-…, or local.")]
Reason = Annotated[str, typer.Option(help="Kept in the audit.")]
_STATES = ("pending", "claimed", "done", "dead", "withdrawn", "review", "rejected", "expired")


@queue.callback()
def list_tasks(context: typer.Context, as_json: AsJson = False, limit: Limit = 20) -> None:
    """The tasks that wait for training, oldest first."""
    if context.invoked_subcommand is not None:
        return
    with console.opened_store() as store:
        stats, waiting = store.queue_stats(), store.tasks("pending", limit)
    if as_json:
        console.print_json({"stats": stats, "pending": waiting})
        return
    rows = [(task.id, task.kind, task.source, task.gold, _line(task.messages)) for task in waiting]
    counts = ", ".join(f"{stats[state]} {state}" for state in _STATES)
    empty = "Nothing waits for training: an answer that is corrected or verified puts its question there."
    console.table(f"Queue: {counts}", ("task", "verifier", "from", "gold", "question"), rows, empty, "task")
    if not rows and any(stats[state] for state in _STATES):
        console.out.print(f"Queue: {counts}", style="dim")


@review.callback()
def list_reviews(context: typer.Context, as_json: AsJson = False, limit: Limit = 20) -> None:
    """The questions whose gold a person must decide: the longest waiting first."""
    if context.invoked_subcommand is not None:
        return
    with console.opened_store() as store:
        found = store.reviews(limit)
    if as_json:
        console.print_json(found)
        return
    rows = [
        (one.id, _line(one.messages), "; ".join(f"{g.gold} ({g.trust:.1f})" for g in one.golds), one.reason)
        for one in found
    ]
    empty = "Nothing waits for a person."
    console.table("Review", ("question", "asked", "golds (trust)", "why"), rows, empty, "question")


@review.command("show")
def show(question: AReview, as_json: AsJson = False) -> None:
    """A question with its golds and who gave them."""
    with console.opened_store() as store:
        found = store.review(question)
    if as_json:
        console.print_json(found)
        return
    _show(found)


@review.command("accept")
def accept(
    question: AReview,
    gold: Annotated[str, typer.Argument(help="The right one of those that were given.")],
    reason: Reason = "",
) -> None:
    """Decide for a gold: it trains, the others don't, and their owners are judged by it."""
    with console.opened_store() as store:
        _show(store.decide_review(question, gold, getpass.getuser(), reason))


@review.command("reject")
def reject(question: AReview, reason: Reason = "") -> None:
    """Reject every gold of a question, those that come later too. `withdraw` takes it back."""
    with console.opened_store() as store:
        _show(store.decide_review(question, None, getpass.getuser(), reason))


@review.command("withdraw")
def withdraw(question: AReview, reason: Reason = "") -> None:
    """Take a decision back: those who gave golds decide again, by their trust."""
    with console.opened_store() as store:
        _show(store.withdraw_review(question, getpass.getuser(), reason))


@quarantine.callback()
def list_quarantines(context: typer.Context, as_json: AsJson = False) -> None:
    """Owners whose golds don't count, and those who were let go."""
    if context.invoked_subcommand is not None:
        return
    with console.opened_store() as store:
        found = store.quarantines()
    if as_json:
        console.print_json(found)
        return
    rows = [(one.owner, "in" if one.active else "let go", one.who, one.reason, one.at) for one in found]
    console.table("Quarantine", ("owner", "state", "by", "why", "since"), rows, "Nobody is in quarantine.")


@quarantine.command("add")
def add(owner: AnOwner, reason: Reason = "by hand") -> None:
    """From now on an owner's golds count for nothing: tasks that rest on them alone wait for review."""
    with console.opened_store() as store:
        store.quarantine(owner, getpass.getuser(), reason)
        waiting = store.queue_stats()["review"]
    console.out.print(f"[bold]{console.escaped(owner)}[/] is in quarantine. Tasks that wait for review: {waiting}.")


@quarantine.command("lift")
def lift(owner: AnOwner, reason: Reason = "by hand") -> None:
    """An owner's golds count again, as they did before."""
    with console.opened_store() as store:
        store.lift_quarantine(owner, getpass.getuser(), reason)
    console.out.print(f"The golds of [bold]{console.escaped(owner)}[/] count again.")


@queue.command("dead")
def dead(as_json: AsJson = False, limit: Limit = 20) -> None:
    """The tasks on which too many runs failed, and how the last one ended."""
    with console.opened_store() as store:
        found = store.dead_tasks(limit)
    if as_json:
        console.print_json(found)
        return
    rows = [(one.task.id, one.task.attempts, one.reason, one.at, _line(one.task.messages)) for one in found]
    console.table("Dead letter", ("task", "failures", "the last", "at", "question"), rows, "No task is dead.", "task")


@queue.command("requeue")
def requeue(tasks: Annotated[list[str], typer.Argument(help="Ids of dead tasks.")], reason: Reason = "") -> None:
    """Put dead tasks back in the queue, with no failure counted."""
    with console.opened_store() as store:
        n = store.requeue(tasks, getpass.getuser(), reason)
    console.out.print(f"{n} task{'' if n == 1 else 's'} wait{'s' if n == 1 else ''} again.")


@queue.command("audit")
def audit(
    as_json: AsJson = False,
    limit: Limit = 20,
    action: Annotated[str | None, typer.Option(help="review, quarantine, queue, …: this kind alone.")] = None,
) -> None:
    """Who decided what about the record, the newest first."""
    with console.opened_store() as store:
        found = store.audit_log(action, limit)
    if as_json:
        console.print_json(found)
        return
    rows = [
        (one.at, one.who, one.action, one.subject, ", ".join(f"{k} {v}" for k, v in one.detail.items() if v))
        for one in found
    ]
    console.table("Audit", ("when", "who", "what", "of", "detail"), rows, "Nothing was decided yet.")


def _show(found: Review) -> None:
    decided = f" Decided by {found.decided_by}." if found.basis == "review" else ""
    console.out.print(console.escaped(f"{found.id}: {_line(found.messages, 400)}"), highlight=False)
    why = f"{found.reason}.{decided}" if found.reason else decided.strip()
    console.out.print(console.escaped(why), style="dim")
    rows = [
        (gold.gold, f"{gold.trust:.2f}", ", ".join(f"{who or '-'} {trust:.1f}" for who, trust in gold.owners.items()),
         ", ".join(gold.states), " ".join(gold.task_ids))
        for gold in found.golds
    ]  # fmt: skip
    console.table("Golds", ("gold", "trust", "from", "state", "tasks"), rows, "")


def _line(messages: list[dict[str, object]], most: int = 60) -> str:
    text = " ".join(str(messages[-1].get("content", "")).split())
    return text if len(text) <= most else text[: most - 1] + "…"
