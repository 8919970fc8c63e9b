"""Tool results: each is kept once, named by the hash of its content; steps name the one that they saw.

So what a conversation saw can be given again, to the bit, without asking the tool.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, Text, cast, literal, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from feedback_store.codec import clean, to_json
from feedback_store.consent import Consents
from feedback_store.errors import DamagedRecord, InvalidRecord, NotFound
from feedback_store.records import ObservationLike, StoredObservation, ToolResult
from feedback_store.schema import conversations, steps, task_origins, tool_results, turns

_DEEPEST = 64  # levels of an artifact; json gives up at a depth that depends on who calls it, this doesn't


def as_stored(observation: ObservationLike) -> StoredObservation:
    """What the record keeps of a tool's result; the same again for what it gives back.

    Text is without NUL and lone surrogates. What JSON has no word for (a path, NaN) becomes its `str`. An artifact that
    can't be JSON at all becomes `{"not_recorded": why}`: the text, which is what the policy reads, is never lost.
    """
    return StoredObservation(
        clean(observation.tool),
        clean(observation.text),
        bool(observation.error),
        _plain(observation.artifact),
        float(observation.seconds),
    )


def result_hash(result: StoredObservation) -> str:
    """64 hex digits: sha256 over the canonical JSON of tool, text, error and artifact. `result` is as stored."""
    content = {"tool": result.tool, "text": result.text, "error": result.error, "artifact": result.artifact}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def call_hash(tool: str, input: str) -> str:
    """What a recorded result is looked up by: 64 hex digits over the tool's name and what it was given."""
    return hashlib.sha256(json.dumps([clean(tool), clean(input)]).encode()).hexdigest()


def put_result(connection: Connection, result: StoredObservation, now: datetime) -> str:
    """Writes a result unless it is there, whoever else writes it at the same time; its hash."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    name = result_hash(result)
    connection.execute(
        insert(tool_results)
        .values(
            hash=name,
            tool=result.tool,
            text=result.text,
            error=result.error,
            artifact=result.artifact,
            created_at=now,
        )
        .on_conflict_do_nothing(index_elements=["hash"])
    )
    return name


def steps_with_results() -> Select[Any]:
    """Every column of the steps, and of each one's result as `result_…`; for `stored_observation`."""
    seen = [tool_results.c[name].label(f"result_{name}") for name in ("tool", "text", "error")]
    artifact = cast(tool_results.c.artifact, Text).label("result_artifact")  # what isn't JSON any more shall be named
    return select(steps, *seen, artifact).select_from(steps.outerjoin(tool_results))


def stored_observation(row: Row[Any]) -> StoredObservation | None:
    """The observation of a row of `steps_with_results`; None for a step without one.

    Raises DamagedRecord when the result isn't there, or isn't what its hash names.
    """
    if row.result_hash is None:
        return None
    where = f"Step {row.position} of turn {row.turn_id} saw the tool result {row.result_hash}, which"
    way_out = "The file was damaged or edited: restore a backup (a .bak beside the store, or your own)."
    if row.result_tool is None:
        raise DamagedRecord(f"{where} isn't in the store. {way_out}")
    try:
        artifact = json.loads(row.result_artifact)
    except ValueError:
        artifact = None
    seconds = row.observation_seconds or 0.0  # SQLite keeps a NaN as null
    found = StoredObservation(row.result_tool, row.result_text, row.result_error, artifact, seconds)
    if artifact is None or result_hash(found) != row.result_hash:
        raise DamagedRecord(f"{where} has other content than was written. {way_out}")
    return found


class ToolResults(Consents):
    def tool_results(self, turn_id: str | None = None, conversation_id: str | None = None) -> list[ToolResult]:
        """What the steps of a turn, or of every turn of a conversation, saw; oldest first."""
        if (turn_id is None) == (conversation_id is None):
            raise InvalidRecord("Give either a turn_id or a conversation_id, to say whose tool results.")
        of = select(turns.c.id)
        if turn_id is not None:
            of, exists, missing = of.where(turns.c.id == turn_id), turns.c.id == turn_id, NotFound("turn", turn_id)
        else:
            of, exists = of.where(turns.c.conversation_id == conversation_id), conversations.c.id == conversation_id
            missing = NotFound("conversation", str(conversation_id))
        with self._read() as connection:
            if connection.execute(select(literal(1)).where(exists)).first() is None:
                raise missing
            query = steps_with_results().where(steps.c.turn_id.in_(of), steps.c.result_hash.is_not(None))
            rows = connection.execute(query.order_by(steps.c.turn_id, steps.c.position)).all()
        found = []
        for row in rows:
            observation = stored_observation(row)
            assert observation is not None, "the query leaves out steps without a result"
            found.append(ToolResult(row.turn_id, row.position, row.input, row.result_hash, observation, row.created_at))
        return found

    def recorded_result(
        self,
        tool: str,
        input: str,
        *,
        turn_id: str | None = None,
        conversation_id: str | None = None,
        task_id: str | None = None,
        before: datetime | None = None,
        errors: bool = True,
        for_training: bool = False,
    ) -> StoredObservation | None:
        """The newest result of `tool` for exactly this `input`, or None. A step's `tool_input` is one, or its `input`.

        Only of one turn, of one conversation, or of the turns that asked for one task; only from `before` a moment;
        without `errors`, only of calls that worked; `for_training`, only of owners who consent to that.
        """
        query = steps_with_results().where(steps.c.call_hash == call_hash(tool, input))
        if turn_id is not None:
            query = query.where(steps.c.turn_id == turn_id)
        if conversation_id is not None:
            query = query.where(
                steps.c.turn_id.in_(select(turns.c.id).where(turns.c.conversation_id == conversation_id))
            )
        if task_id is not None:
            asked = select(task_origins.c.turn_id).where(task_origins.c.task_id == task_id)
            query = query.where(steps.c.turn_id.in_(asked))
        if before is not None:
            query = query.where(steps.c.created_at < before)
        if not errors:
            query = query.where(tool_results.c.error.is_(False))
        if for_training:
            owner = conversations.c.owner
            said = turns.join(conversations, conversations.c.id == turns.c.conversation_id)
            may = select(turns.c.id).select_from(said).where(or_(owner == "", self._may_train(owner)))
            query = query.where(steps.c.turn_id.in_(may))
        newest = query.order_by(steps.c.created_at.desc(), steps.c.turn_id.desc(), steps.c.position.desc()).limit(1)
        with self._read() as connection:
            row = connection.execute(newest).first()
        return None if row is None else stored_observation(row)


def _plain(artifact: Mapping[str, Any]) -> dict[str, Any]:
    try:
        # The first look is by a copy: only its own encoder knows what an object's `str` or a key becomes.
        plain: dict[str, Any] = json.loads(to_json(dict(artifact)), parse_constant=str)
        if _is_deeper(plain, _DEEPEST):
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    except Exception as error:  # an object's own `__str__` may raise anything
        return {"not_recorded": clean(f"{type(error).__name__}: {error}")[:200]}
    return plain


def _is_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        inside = [item for item in layer if isinstance(item, dict | list)]
        layer = [child for item in inside for child in (item.values() if isinstance(item, dict) else item)]
        if not layer:
            return False
    return True
