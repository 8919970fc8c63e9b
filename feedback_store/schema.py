"""The tables as they are now. A change here needs a migration in `migrations/versions` (a test compares the two)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
)
from sqlalchemy.types import TypeDecorator

from feedback_store.codec import clean


class UtcTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC. SQLite keeps no zone, so it is dropped on the way in and added on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


class CleanText(TypeDecorator[str]):
    """Text that may come from a policy, a tool or a client: see `codec.clean`."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else clean(value)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

conversations = Table(
    "conversations",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", CleanText, nullable=False),
    Column("title", CleanText, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),  # the last turn's beginning or end
    Column("version", String(100)),  # the one that its turns stay on; null: whatever serves
    Index(None, "owner", "updated_at"),
    Index(None, "updated_at"),
)

turns = Table(
    "turns",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("conversation_id", String(40), ForeignKey("conversations.id"), nullable=False),
    Column("request_id", CleanText, nullable=False),
    Column("messages", JSON, nullable=False),
    Column("asked", JSON(none_as_null=True)),  # beside the messages; null: nothing that must be known again
    Column("prompt_ids", LargeBinary, nullable=False),
    Column("version", CleanText, nullable=False),
    Column("status", String(16), nullable=False),
    Column("answer", CleanText, nullable=False),
    Column("error", CleanText, nullable=False),
    Column("host", CleanText, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_started", CleanText, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("finished_at", UtcTime),
    Index(None, "conversation_id", "id"),
    Index(None, "status"),
    Index(None, "request_id"),
)

tool_results = Table(  # each result once, named by its content
    "tool_results",
    metadata,
    Column("hash", String(64), primary_key=True),  # see `tool_results.result_hash`
    Column("tool", CleanText, nullable=False),
    Column("text", CleanText, nullable=False),
    Column("error", Boolean, nullable=False),
    Column("artifact", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

steps = Table(
    "steps",
    metadata,
    Column("turn_id", String(40), ForeignKey("turns.id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("version", CleanText, nullable=False),
    Column("drawn_by", JSON(none_as_null=True)),  # [version, own tokens] in order; null where one drew them all
    Column("token_ids", LargeBinary, nullable=False),  # see `codec.pack_step_ids`
    Column("logprobs", LargeBinary, nullable=False),  # float32
    Column("mask", LargeBinary, nullable=False),  # 1 for the policy's own tokens: see `codec.pack_step_mask`
    Column("text", CleanText, nullable=False),
    Column("thought", CleanText, nullable=False),
    Column("action", String(16), nullable=False),
    Column("input", CleanText, nullable=False),
    Column("well_formed", Boolean, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("result_hash", String(64), ForeignKey("tool_results.hash")),  # null where no observation followed
    Column("call_hash", String(64)),  # of the tool and the input: what a result is looked up by
    Column("observation_seconds", Float),
    Column("created_at", UtcTime, nullable=False),
    Index(None, "call_hash", "created_at"),
    Index(None, "result_hash"),
)

processes = Table(  # that serve or train; see `presence`
    "processes",
    metadata,
    Column("host", CleanText, primary_key=True),
    Column("pid", Integer, primary_key=True, autoincrement=False),
    Column("process_started", CleanText, primary_key=True),
    Column("alive_until", UtcTime, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("recipe", CleanText, nullable=False),
    Column("status", String(16), nullable=False),
    Column("stage", CleanText, nullable=False),
    Column("detail", JSON, nullable=False),
    Column("report", JSON, nullable=False),
    Column("host", CleanText, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_started", CleanText, nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("finished_at", UtcTime),
)

run_stages = Table(
    "run_stages",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", String(40), ForeignKey("runs.id"), nullable=False),
    Column("stage", CleanText, nullable=False),
    Column("detail", JSON, nullable=False),
    Column("at", UtcTime, nullable=False),
    Index(None, "run_id"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("content_hash", String(64), nullable=False, unique=True),
    Column("messages", JSON, nullable=False),
    Column("verifier", CleanText, nullable=False),
    Column("gold", CleanText, nullable=False),
    Column("kind", CleanText, nullable=False),
    Column("source", CleanText, nullable=False),
    Column("owner", CleanText, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("run_id", String(40), ForeignKey("runs.id")),
    Column("lease_until", UtcTime),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    Column("question_hash", String(64), nullable=False, server_default=""),  # see `gold.question_hash`
    Column("gold_key", CleanText, nullable=False, server_default=""),  # equal where golds mean the same; "": no vote
    Column("hold", String(16), nullable=False, server_default=""),  # why it isn't claimed: review, rejected, expired
    Column("reason", CleanText, nullable=False, server_default=""),  # of the hold, or of the last failure
    Column("expires_at", UtcTime),  # when the last of the votes for the gold ends; null: never
    Index(None, "state", "hold", "attempts", "id"),
    Index(None, "state", "hold", "owner"),
    Index(None, "run_id", "state"),
    Index(None, "lease_until"),  # null unless claimed: the few that a claim must look at first
    Index(None, "question_hash"),
)

questions = Table(  # a row for each that a task asks: what its gold is known by, and what its writers lock
    "questions",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("gold_key", CleanText),  # null: none is known, or (basis review) all are rejected; of known: its SHA-256
    Column("basis", String(16), nullable=False),  # "", trusted, consensus, review, known: see `gold.Basis`
    Column("who", CleanText, nullable=False),
    Column("reason", CleanText, nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("weigh_at", UtcTime),  # when the next of its votes ends
    Index(None, "weigh_at"),
)

quarantines = Table(  # owners whose golds don't count; one that was let go keeps its row, not active
    "quarantines",
    metadata,
    Column("owner_hash", String(64), primary_key=True),  # see `ids.owner_hash`
    Column("owner", CleanText, nullable=False),  # "" once they are forgotten: the key may still be in use
    Column("active", Boolean, nullable=False),
    Column("who", CleanText, nullable=False),
    Column("reason", CleanText, nullable=False),
    Column("at", UtcTime, nullable=False),
)

erased_votes = Table(  # an owner's record with golds that are gone: deleting a wrong one doesn't undo it
    "erased_votes",
    metadata,
    Column("owner_hash", String(64), primary_key=True),
    Column("judged", Integer, nullable=False),
    Column("wrong", Integer, nullable=False),
)

audit = Table(  # who decided what about the record
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcTime, nullable=False),
    Column("who", CleanText, nullable=False),
    Column("action", String(40), nullable=False),
    Column("subject", CleanText, nullable=False),
    Column("detail", JSON, nullable=False),
    Index(None, "action"),
)

task_origins = Table(  # every turn or source that asked for a task, the first included
    "task_origins",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("task_id", String(40), ForeignKey("tasks.id"), nullable=False),
    Column("turn_id", String(40), ForeignKey("turns.id")),
    Column("source", CleanText, nullable=False),
    Column("owner", CleanText, nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("trust", Float, nullable=False, server_default="1"),
    Column("expires_at", UtcTime),  # of this vote alone
    Index(None, "task_id", "owner", "id", "trust"),  # the last vote of each owner is found in it
    Index(None, "turn_id"),
    Index(None, "owner", "id"),
)

run_tasks = Table(  # one row for each claim, so that who trained on what stays known
    "run_tasks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", String(40), ForeignKey("runs.id"), nullable=False),
    Column("task_id", String(40), ForeignKey("tasks.id"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("claimed_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
    Index(None, "run_id", "state"),
    Index(None, "task_id"),
)

outcomes = Table(
    "outcomes",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("turn_id", String(40), ForeignKey("turns.id"), nullable=False),
    Column("source", String(16), nullable=False),
    Column("score", Float),
    Column("verifier", CleanText, nullable=False),
    Column("gold", CleanText, nullable=False),
    Column("reason", CleanText, nullable=False),
    Column("owner", CleanText, nullable=False),
    Column("task_id", String(40), ForeignKey("tasks.id")),
    Column("note", CleanText, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("trust", Float, nullable=False, server_default="1"),
    Column("became", String(16), nullable=False, server_default=""),  # see `records.Became`
    Column("expires_at", UtcTime),
    Index(None, "turn_id"),
    Index(None, "task_id"),
    Index(None, "source"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", String(100), primary_key=True),
    Column("parent", String(100), ForeignKey("versions.id")),
    Column("run_id", String(40), ForeignKey("runs.id")),
    Column("path", CleanText, nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
)

version_changes = Table(  # the last row names the version in service
    "version_changes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", String(100), ForeignKey("versions.id"), nullable=False),
    Column("previous", String(100), ForeignKey("versions.id")),
    Column("moved", Boolean, nullable=False, server_default=false()),  # the conversations on other versions, too
    Column("reason", CleanText, nullable=False),
    Column("at", UtcTime, nullable=False),
)

canary_changes = Table(  # the last row names the version that is tried, and its share; a share of 0 ends it
    "canary_changes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", String(100), ForeignKey("versions.id"), nullable=False),
    Column("share", Float, nullable=False),
    Column("reason", CleanText, nullable=False),
    Column("at", UtcTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("owner", String(40), primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),  # SHA-256: see `keys`
    Column("name", CleanText, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("requests_per_minute", Integer),
    Column("answers_at_once", Integer),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    Column("last_used_at", UtcTime),
)
# A name is one key's until that is revoked; then another may have it.
Index(
    "ix_api_keys_name",
    api_keys.c.name,
    unique=True,
    sqlite_where=api_keys.c.revoked_at.is_(None),
    postgresql_where=api_keys.c.revoked_at.is_(None),
)

# What a search looks through: a row for each turn, and one without a turn for a conversation's own title. SQLite has
# an FTS5 index of it (`search_index`, kept by triggers), PostgreSQL a GIN index: both are made by the migration.
search_texts = Table(
    "search_texts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("conversation_id", String(40), ForeignKey("conversations.id"), nullable=False),
    Column("turn_id", String(40), ForeignKey("turns.id")),
    Column("text", CleanText, nullable=False),
    Index(None, "conversation_id"),
    Index(None, "turn_id"),
)

consents = Table(  # what an owner said; who said nothing is held to the setting
    "consents",
    metadata,
    Column("owner", CleanText, primary_key=True),
    Column("training", Boolean, nullable=False),
    Column("at", UtcTime, nullable=False),
)

tombstones = Table(  # of a conversation that was erased: ids and times
    "tombstones",
    metadata,
    Column("conversation_id", String(40), primary_key=True),
    Column("owner_hash", String(64), nullable=False),  # see `erasure.owner_hash`
    Column("turns", Integer, nullable=False),
    Column("reason", String(16), nullable=False),  # forgotten, expired
    Column("created_at", UtcTime, nullable=False),
    Column("erased_at", UtcTime, nullable=False),
    Column("swept_at", UtcTime),  # when files and the database's own leftovers were gone too
    Index(None, "owner_hash"),
    Index(None, "swept_at"),
)

erased_turns = Table(
    "erased_turns",
    metadata,
    Column("turn_id", String(40), primary_key=True),
    Column("conversation_id", String(40), nullable=False),  # which may still be there, without this turn
    Column("version", CleanText, nullable=False),
    Column("erased_at", UtcTime, nullable=False),
    Index(None, "conversation_id"),
)

erased_uses = Table(  # what a run trained on and was erased since
    "erased_uses",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", String(40), ForeignKey("runs.id"), nullable=False),
    Column("task_id", String(40), ForeignKey("tasks.id"), nullable=False),
    Column("conversation_id", String(40), ForeignKey("tombstones.conversation_id")),  # null: the task was of none
    Column("owner_hash", String(64), nullable=False),
    Column("taints", Boolean, nullable=False),  # the run's versions: not where the text only grew too old
    Column("at", UtcTime, nullable=False),
    Column("swept_at", UtcTime),  # when the run's own copy was gone too
    Index(None, "run_id"),
    Index(None, "task_id"),
    Index(None, "conversation_id"),
    Index(None, "owner_hash"),
)

erased_results = Table(  # of tools, as long as a run's folder may hold a copy
    "erased_results",
    metadata,
    Column("hash", String(64), primary_key=True),  # see `tool_results.result_hash`
    Column("at", UtcTime, nullable=False),
)
