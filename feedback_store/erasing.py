"""What an erasure does inside its transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)

from feedback_store.admission import retell
from feedback_store.conversations import title_of
from feedback_store.ids import owner_hash
from feedback_store.in_use import Askers, Busy, InUse
from feedback_store.schema import (
    UtcTime,
    audit,
    conversations,
    erased_results,
    erased_turns,
    outcomes,
    questions,
    runs,
    search_texts,
    steps,
    task_origins,
    tasks,
    tombstones,
    tool_results,
    turns,
)
from feedback_store.settling import QUESTION_ID
from feedback_store.taints import clean_ancestor, tainted_versions
from feedback_store.uses import Uses
from feedback_store.versions import current_version_of
from feedback_store.votes import remembered
from feedback_store.withdrawal import chunks, withdraw

Reason = Literal["forgotten", "expired"]


@dataclass
class Erased:
    """What went. `tasks_deleted`: no run had claimed them. `tasks_emptied`: their ids alone are left. `tasks_kept`:
    others asked for them too.

    `tainted`: versions that were trained on what went, newly so, with their descendants. `roll_back_to`: the newest
    clean ancestor of the version in service, where that one is tainted; None where it isn't, or no ancestor is clean.
    `retrain`: the runs whose training is to be repeated without it. `runs_ended`: interrupted ones that can't go on.
    `skipped`: conversations that have grown old but are in use by an answer or a run. `already`: tombstones that were
    there before.
    """

    conversations: list[str] = field(default_factory=list)
    turns: int = 0
    steps: int = 0
    tool_results: int = 0
    outcomes: int = 0
    tasks_deleted: int = 0
    tasks_emptied: int = 0
    tasks_kept: int = 0
    runs_ended: list[str] = field(default_factory=list)
    retrain: list[str] = field(default_factory=list)
    tainted: list[str] = field(default_factory=list)
    in_service_tainted: str | None = None
    roll_back_to: str | None = None
    skipped: int = 0
    already: int = 0
    dry_run: bool = False

    def add(self, other: Erased) -> None:
        """Counts and lists together; for what is one of a kind, the newer."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, mine + value if isinstance(value, int | list) and name != "dry_run" else value)


class Work:
    """One erasure, inside its transaction."""

    def __init__(self, connection: Connection, now: datetime, reason: Reason, skip_busy: bool) -> None:
        self._connection = connection
        self.now = now
        self._reason = reason
        self._skip_busy = skip_busy
        self._in_use = InUse(connection, now)
        self._askers: Askers = {}  # of tasks so far
        self._kept: set[str] = set()  # tasks that others asked for, too
        self.questions: set[str] = set()  # hashes of those that lost a vote
        self.erased = Erased()
        self._uses = Uses(connection, now, reason == "forgotten", self.erased.runs_ended)

    def erase(self, rows: Sequence[Any]) -> None:
        """Rows of conversations: id, owner, created_at."""
        ids = [row.id for row in rows]
        self._hold(task_origins.c.turn_id.in_(select(turns.c.id).where(turns.c.conversation_id.in_(ids))))
        busy = self._in_use.conversations(ids, self._asked(ids))
        if busy and not self._skip_busy:
            raise Busy(next(iter(busy.values())))
        self.erased.skipped += len(busy)
        rows = [row for row in rows if row.id not in busy]
        if not rows:
            return
        ids = [row.id for row in rows]
        its = select(turns.c.id).where(turns.c.conversation_id.in_(ids))
        self._make_tombstones(rows)
        self.erased.conversations += ids
        asked = self._asked(ids)
        for task_id, askers in asked.items():
            self._askers.setdefault(task_id, set()).update(askers)
        self._connection.execute(delete(search_texts).where(search_texts.c.conversation_id.in_(ids)))
        self._erase_turns(its, asked)
        self._connection.execute(delete(conversations).where(conversations.c.id.in_(ids)))

    def erase_turn(self, turn: Row[Any], owner: str) -> None:
        """One turn. Its conversation stays, without its title if that was made of this turn's question."""
        if turn.status == "running":
            raise Busy(f"Turn {turn.id} is being answered; erase it when that has ended.")
        its, mine = select(turns.c.id).where(turns.c.id == turn.id), task_origins.c.turn_id == turn.id
        self._hold(mine)
        asked = self._connection.execute(select(task_origins.c.task_id).where(mine).distinct()).scalars().all()
        self._in_use.check_tasks(asked, mine)
        named = (conversations.c.id == turn.conversation_id, conversations.c.title == title_of(turn.messages))
        self._connection.execute(update(conversations).where(*named).values(title=""))
        self._note_turns(turns.c.id == turn.id)
        self._connection.execute(delete(search_texts).where(search_texts.c.turn_id == turn.id))
        self._erase_turns(its, {task_id: {(None, owner_hash(owner))} for task_id in asked})

    def erase_tasks_of(self, owner: str) -> bool:
        """Those that an owner asked for without a conversation; whether there were any."""
        mine = task_origins.c.owner == owner
        self._hold(mine)
        asked: Askers = {
            task_id: {(None, owner_hash(owner))}
            for task_id in self._connection.execute(select(task_origins.c.task_id).where(mine).distinct()).scalars()
        }
        self._in_use.check_tasks(list(asked), mine)
        with remembered(self._connection, mine, self.now, rights=True):
            self._connection.execute(delete(task_origins).where(mine))
        self._erase_tasks(asked)
        return bool(asked)

    def erase_verdicts_of(self, owner: str) -> bool:
        """Those that an owner gave on others' turns, with gold and reason; whether there were any."""
        gone = self._connection.execute(delete(outcomes).where(outcomes.c.owner == owner)).rowcount
        self.erased.outcomes += gone
        return gone > 0

    def forget_reviews(self) -> None:
        """What people wrote about the questions that lost a vote goes; a decision for a gold that is gone, too."""
        for some in chunks(sorted(self.questions)):
            its = questions.c.hash.in_(some)
            reviewed = self._connection.execute(select(questions).where(its, questions.c.basis == "review")).all()
            alike = select(tasks.c.question_hash, tasks.c.gold_key).where(tasks.c.question_hash.in_(some))
            left = {tuple(row) for row in self._connection.execute(alike)}
            for row in reviewed:
                goes = row.gold_key is not None and (row.hash, row.gold_key) not in left
                if goes and self._reason == "forgotten":
                    open_again: dict[str, Any] = {"gold_key": None, "basis": "", "who": "", "at": self.now}
                else:
                    open_again = {}
                changed = update(questions).where(questions.c.hash == row.hash)
                self._connection.execute(changed.values(open_again | {"reason": ""}))
            about = audit.c.subject.in_([digest[:QUESTION_ID] for digest in some])
            self._connection.execute(update(audit).where(about).values(detail={}))

    def judge(self, tainted_before: set[str]) -> None:
        """Say what is tainted now, and what to do about it."""
        now_tainted = tainted_versions(self._connection)
        self.erased.tainted = [version for version in now_tainted if version not in tainted_before]
        current = current_version_of(self._connection)
        if current in now_tainted:
            self.erased.in_service_tainted = current
            self.erased.roll_back_to = clean_ancestor(self._connection, current)
        made = {version: runs for version, taint in now_tainted.items() if (runs := taint.runs)}
        self.erased.retrain = sorted({run for version in self.erased.tainted for run in made[version]})

    # -- parts

    def _asked(self, ids: Sequence[str]) -> Askers:
        """The tasks that these conversations asked for, each with (conversation, owner's hash) of who did."""
        rows = self._connection.execute(
            select(task_origins.c.task_id, conversations.c.id, conversations.c.owner)
            .join(turns, turns.c.id == task_origins.c.turn_id)
            .join(conversations, conversations.c.id == turns.c.conversation_id)
            .where(conversations.c.id.in_(ids))
        )
        asked: Askers = {}
        for task_id, conversation, owner in rows:
            asked.setdefault(task_id, set()).add((conversation, owner_hash(owner)))
        return asked

    def _hold(self, origins: ColumnElement[bool]) -> None:
        """Holds the questions of the tasks that these origins asked for: on a server database, nobody votes on them
        between the look at who asked and the deletion."""
        its = select(tasks.c.question_hash).join(task_origins).where(origins, tasks.c.question_hash != "")
        for some in chunks(sorted(set(self._connection.execute(its).scalars()))):
            rows = select(questions.c.hash).where(questions.c.hash.in_(some)).order_by(questions.c.hash)
            self._connection.execute(rows.with_for_update()).all()

    def _erase_turns(self, its: Select[Any], asked: Askers) -> None:
        """The turns whose ids `its` selects, with what hangs on them; `asked`: the tasks that they asked for."""
        execute, found = self._connection.execute, self.erased
        used = select(steps.c.result_hash).where(steps.c.turn_id.in_(its), steps.c.result_hash.is_not(None))
        seen = list(execute(used).scalars().unique())
        found.outcomes += execute(delete(outcomes).where(outcomes.c.turn_id.in_(its))).rowcount
        found.steps += execute(delete(steps).where(steps.c.turn_id.in_(its))).rowcount
        for some in chunks(seen):
            unseen = tool_results.c.hash.in_(some), ~exists().where(steps.c.result_hash == tool_results.c.hash)
            gone = list(execute(delete(tool_results).where(*unseen).returning(tool_results.c.hash)).scalars())
            found.tool_results += len(gone)
            self._note_results(gone)
        mine = task_origins.c.turn_id.in_(its)
        with remembered(self._connection, mine, self.now, rights=self._reason == "expired"):
            execute(delete(task_origins).where(mine))
        self._erase_tasks(asked)
        found.turns += execute(delete(turns).where(turns.c.id.in_(its))).rowcount

    def _make_tombstones(self, rows: Sequence[Any]) -> None:
        ids = [row.id for row in rows]
        count = select(turns.c.conversation_id, func.count()).where(turns.c.conversation_id.in_(ids))
        turned = {id: n for id, n in self._connection.execute(count.group_by(turns.c.conversation_id))}
        self._connection.execute(
            insert(tombstones),
            [
                {
                    "conversation_id": row.id,
                    "owner_hash": owner_hash(row.owner),
                    "turns": turned.get(row.id, 0),
                    "reason": self._reason,
                    "created_at": row.created_at,
                    "erased_at": self.now,
                }
                for row in rows
            ],
        )
        self._note_turns(turns.c.conversation_id.in_(ids))

    def _note_turns(self, which: ColumnElement[bool]) -> None:
        at = literal(self.now, UtcTime)
        rows = select(turns.c.id, turns.c.conversation_id, turns.c.version, at).where(which)
        columns = ["turn_id", "conversation_id", "version", "erased_at"]
        self._connection.execute(insert(erased_turns).from_select(columns, rows))

    def _note_results(self, hashes: Sequence[str]) -> None:
        """Runs may have given these to other tasks, too: their copies are to be found."""
        if hashes and self._connection.execute(select(runs.c.id).limit(1)).first() is not None:
            self._connection.execute(delete(erased_results).where(erased_results.c.hash.in_(hashes)))
            self._connection.execute(insert(erased_results), [{"hash": each, "at": self.now} for each in hashes])

    def _erase_tasks(self, asked: Askers) -> None:
        """Tasks that nobody asks for any more; their origins are gone already."""
        others: dict[str, str] = {}
        for some in chunks(list(asked)):
            its = select(tasks.c.question_hash).where(tasks.c.id.in_(some), tasks.c.question_hash != "")
            self.questions |= set(self._connection.execute(its).scalars())
            left = select(task_origins.c.task_id, task_origins.c.owner).where(task_origins.c.task_id.in_(some))
            for task_id, owner in self._connection.execute(left.order_by(task_origins.c.id.desc())):
                others[task_id] = owner
                if all(owner_hash(owner) != hashed for _, hashed in asked[task_id]):
                    self._kept.add(task_id)
        for task_id, owner in others.items():  # by whom it was asked first, and in which words, isn't told any more
            its_own = (tasks.c.id == task_id, tasks.c.state != "withdrawn")
            self._connection.execute(update(tasks).where(*its_own).values(owner=owner))
            retell(self._connection, task_id)
        alone = [task_id for task_id in asked if task_id not in others]
        self._kept.difference_update(alone)
        self.erased.tasks_kept = len(self._kept)
        self._uses.note({task_id: self._askers.get(task_id, set()) | asked[task_id] for task_id in alone})
        deleted, emptied, _ = withdraw(self._connection, alone, self.now)
        self.erased.tasks_deleted += deleted
        self.erased.tasks_emptied += emptied
