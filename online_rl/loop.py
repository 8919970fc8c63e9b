"""One run of online learning: claim, train, evaluate, gate, publish, swap.

Each stage leaves what the next one needs in the run's folder and a line in the store's journal, so a run that was
killed goes on where it was: the same tasks, the last whole checkpoint. Until the last stage, nothing that serves
changes. A run that ends without a better version says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from feedback_store import Guards, Run, RunUnderWay, Store
from feedback_store.guards import OVER_SHARE
from online_rl.adapters import load_adapter, save_adapter
from online_rl.checkpoints import MAY_CHANGE
from online_rl.evaluation import Recorded, evaluate
from online_rl.gate import Decision, GateConfig, ItemResult, decide
from online_rl.memory import keep_freed_memory, return_freed_memory
from online_rl.publication import Outdated, promote, register
from online_rl.recipe import Recipe
from online_rl.redaction import Redact, redact_task
from online_rl.replay import Replay, keeping
from online_rl.report import write_report
from online_rl.result_record import EVALUATION, ROLLOUTS, ResultRecord
from online_rl.rewards import RewardConfig, score_group
from online_rl.rollouts import GroupReplay, Progress
from online_rl.sampler import Sampler
from online_rl.setup import CONTEXT
from online_rl.step_metrics import Metrics
from online_rl.tapo import TrainingDiverged, train
from online_rl.tasks.base import Task
from serving.agent import Agent, Limits
from serving.dialects import DialectName, make_dialect
from serving.engines.base import Engine, PromptTooLong, Sampling
from serving.engines.opening import OpenEngine
from serving.model import BaseModel
from serving.trajectory import Trajectory
from tools.toolbox import Toolbox

LEASE_S = 3600.0

Listener = Callable[[str, int, int, str], None]
"""`listener(stage, done, of, note)`: where a run stands."""


class RunRefused(RuntimeError):
    """A run can't start. The message says what to do."""


@dataclass(frozen=True)
class RunOptions:
    """What a run works on. `heldout` is the evaluation's frozen set; a queued task that overlaps it isn't trained on.
    `guards`: what else a batch may be made of. `practice` makes up for a queue of fewer tasks than it has itself.
    `tool_seconds` is what one tool call may take. `redact` takes what identifies people out of queued questions."""

    recipe: Recipe
    heldout: Sequence[Task]
    practice: Sequence[Task] = ()
    recipe_name: str = "embedded-cpu"
    dialect: DialectName = "tapo"
    claim: int = 256
    least_tasks: int = 8
    evaluation: Sampling = field(default_factory=lambda: Sampling(0.7, 0.95, 256, seed=1))
    gate: GateConfig = field(default_factory=GateConfig)
    guards: Guards = field(default_factory=Guards)
    tool_seconds: float = Limits.tool_seconds
    redact: Redact | None = None


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `version` is the one that it made, promoted or refused; None when it made none."""

    run_id: str
    status: str  # promoted | refused | ended
    version: str | None
    reasons: list[str]
    folder: Path
    report: dict[str, Any]


def run_once(
    home: Path,
    store: Store,
    open_engine: OpenEngine,
    toolbox: Toolbox,
    options: RunOptions,
    listener: Listener = lambda *_: None,
) -> RunResult:
    """A whole run, or the rest of one that was interrupted. Blocks.

    Rollouts are sampled from, and versions compared on, the engine that `open_engine` gives. Raises RunRefused when
    another run is under way or no version is registered. On any other failure the run stays resumable; call again.
    """

    async def run() -> RunResult:
        async with open_engine(options.recipe.concurrency + 8, CONTEXT) as (engine, base):
            return await _Run(home, store, engine, base, toolbox, options, listener).go()

    with _only_run(home, store), store.present():
        return asyncio.run(run())


@contextlib.contextmanager
def _only_run(home: Path, store: Store) -> Iterator[None]:
    """One run at a time on one home, and on one store, which machines may share; the locks die with their process."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "training.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunRefused("Another training run is under way here. `whetstone runs` shows it.") from None
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(store.only_run())
            except RunUnderWay as error:
                raise RunRefused(str(error)) from error
            yield


class _Run:
    def __init__(
        self,
        home: Path,
        store: Store,
        engine: Engine,
        base: BaseModel,
        toolbox: Toolbox,
        options: RunOptions,
        listener: Listener,
    ) -> None:
        self.home, self.store, self.base, self.options, self.listener = home, store, base, options, listener
        self.recipe = options.recipe
        self.engine = engine
        limits = Limits(
            max_turns=self.recipe.max_turns,
            answer_tokens=self.recipe.max_response_tokens,
            observation_tokens=self.recipe.max_observation_tokens,
            tool_seconds=options.tool_seconds,
            context=CONTEXT,
        )
        self.agent = Agent(self.engine, make_dialect(options.dialect, base.tokenizer), toolbox, limits)
        self.seconds: dict[str, float] = {}
        self.set_aside: dict[str, int] = {}  # queued tasks that aren't trained on, by the reason
        self._open = contextlib.ExitStack()

    async def go(self) -> RunResult:
        run = self._unfinished() or self._start()
        self.id, self.folder = run.id, self.home / "runs" / run.id
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parent: str = run.detail["parent"]
        self.candidate: str = run.detail["candidate"]
        # Of this process alone: a server that others use too may still hold what a killed one loaded.
        self.tag = f"{run.id}.{secrets.token_hex(3)}"
        self.sampler = Sampler(self.engine, self.folder / "sampler", self.tag)
        try:
            with self._timed("claim"):
                tasks = self._claim()
            if len(tasks) < self.options.least_tasks:
                aside = ", ".join(f"{n} {reason}" for reason, n in self.set_aside.items())
                return self._end(
                    f"{len(tasks)} tasks are too few to learn from; at least {self.options.least_tasks}."
                    + (f" Set aside: {aside}." if aside else "")
                )
            try:
                metrics = await self._train(tasks)
            except TrainingDiverged as error:  # it would diverge again: nothing to resume
                self.store.finish_run(self.id, "failed", {"reasons": [str(error)]})
                raise
            self.seconds["train"] = metrics[-1]["elapsed_s"]  # over all the attempts that it took
            if not any(step["groups_mixed"] for step in metrics):
                return self._end("Every group was all right or all wrong: these tasks have nothing to teach now.")
            with self._timed("evaluate"):
                before, after, examples = await self._evaluate()
            decision = decide(before, after, self.options.gate)
            self._journal("gate", promote=decision.promote, reasons=decision.reasons)
            return self._publish(tasks, metrics, decision, examples)
        finally:
            self._open.close()
            await self.sampler.end()

    # -- stages

    def _unfinished(self) -> Run | None:
        """The newest run that a kill left open. Its process is gone, since this one holds the locks."""
        current = self.store.current_version()
        for run in self.store.runs():
            if run.status != "running":
                continue
            if current in (run.detail.get("parent"), run.detail.get("candidate")) and _learns_alike(
                run.detail.get("recipe", {}), self.recipe
            ):
                self.listener("resume", 0, 0, f"{run.id}, interrupted in stage {run.stage or 'claim'}")
                return run
            self.store.finish_run(
                run.id, "ended", {"reasons": ["interrupted; then recipe or version in service changed"]}
            )
        return None

    def _start(self) -> Run:
        parent = self.store.current_version()
        if parent is None:
            raise RunRefused("No version is in service to learn from. Start `whetstone up` once, then train.")
        if self.store.version(parent).manifest.get("kind") == "weights":
            raise RunRefused(
                f"{parent}, which is in service, is full weights; only adapters can be trained so far: put one in "
                "service with `whetstone versions use`."
            )
        taken = [int(v.id[1:]) for v in self.store.versions() if v.id[:1] == "v" and v.id[1:].isdigit()]
        detail = {"parent": parent, "candidate": f"v{max(taken, default=0) + 1}", "recipe": self.recipe.model_dump()}
        return self.store.run(self.store.start_run(self.options.recipe_name, detail))

    def _claim(self) -> list[Task]:
        """Queued tasks first, then generated practice. Written down, so that a resumed run trains on the same."""
        file = self.folder / "tasks.json"
        if file.exists():
            self.store.renew(self.id, LEASE_S)
            tasks = [Task(**row | {"messages": tuple(row["messages"])}) for row in json.loads(file.read_text())]
        else:
            heldout = [task.question for task in self.options.heldout]
            guards = replace(self.options.guards, heldout=[*self.options.guards.heldout, *heldout])
            tasks = []
            aside: dict[str, list[str]] = {}
            unused: set[str] = set()
            owners: list[str] = []
            self.store.release(self.id)  # what a claim held that was killed before it was written down
            self.store.withdraw_without_consent()
            # What is set aside stays claimed until the run ends, so it can't keep later tasks from being reached.
            while True:
                batch = self.store.claim_batch(self.id, self.options.claim - len(tasks), guards, LEASE_S, unused)
                for queued in batch.tasks:
                    messages, meta = tuple(queued.messages), {"queue_id": queued.id}
                    task = Task(messages, queued.verifier, queued.gold, queued.kind, "queue", meta)
                    fit = self._fit(task)
                    if isinstance(fit, str):
                        aside.setdefault(fit, []).append(queued.id)
                        unused.add(queued.id)
                    else:
                        tasks.append(fit)
                        owners.append(queued.owner)
                if not batch.tasks or len(tasks) >= self.options.claim:
                    break
            aside |= batch.left
            kept = set(guards.trim(owners))  # what turned out unfit may have been what the others' share rested on
            if over := [task.meta["queue_id"] for n, task in enumerate(tasks) if n not in kept]:
                aside[OVER_SHARE] = [*aside.get(OVER_SHARE, []), *over]
                tasks = [task for n, task in enumerate(tasks) if n in kept]
                unused.update(over)
            claimed = len(tasks)
            tasks += self.options.practice[claimed:]
            _write(file, [asdict(task) for task in tasks])
            counts = {reason: len(ids) for reason, ids in aside.items()}
            some = {reason: ids[:20] for reason, ids in aside.items()}
            told = {"set_aside": counts, "examples": some, "unused": sorted(unused)}  # for `feedback_store.uses`, all
            self._journal("claim", claimed=claimed, practice=len(tasks) - claimed, **told)
        stages = self.store.run(self.id).stages
        self.set_aside = next((dict(s.detail["set_aside"]) for s in stages if s.stage == "claim"), {})
        from_queue = sum(task.source == "queue" for task in tasks)
        self.listener(
            "claim", len(tasks), len(tasks), f"{from_queue} from the queue, {len(tasks) - from_queue} practice"
        )
        return tasks

    def _fit(self, task: Task) -> Task | str:
        """The task as it is trained on, or why it can't be."""
        fit = task if self.options.redact is None else redact_task(task, self.options.redact)
        if isinstance(fit, str):
            return fit
        try:
            self.agent.render(fit.messages)
        except PromptTooLong:
            return "too long for the training context"
        return fit

    async def _train(self, tasks: list[Task]) -> list[Metrics]:
        done = self.folder / "trained.json"
        if done.exists():
            rows: list[Metrics] = json.loads(done.read_text())
            return rows
        self._journal("train", steps=self.recipe.max_steps)
        keep_freed_memory()
        parent = Path(self.store.version(self.parent).path)
        model = await asyncio.to_thread(load_adapter, self.base, parent, "float32")
        seen = self._results(ROLLOUTS)
        mode = self.recipe.tool_results
        replay = Replay(self.agent.run_tool, mode, self.store, None if mode == "live" else seen)
        sampling = Sampling(temperature=self.recipe.temperature, max_tokens=self.recipe.max_response_tokens)

        async def rollout(task: Task, seed: int) -> Trajectory:
            call = GroupReplay(keeping(replay.of(task), seen, task))
            drawn = Sampling(sampling.temperature, 1.0, sampling.max_tokens, seed)
            return await self.agent.roll_out(task.messages, self.sampler.version, drawn, call)

        def on_step(metrics: Metrics) -> None:
            self.store.renew(self.id, LEASE_S)
            return_freed_memory()
            note = f"reward {metrics['reward']:.2f}, accuracy {metrics['accuracy']:.0%}, ETA {metrics['eta_s']:.0f} s"
            self.listener("train", metrics["step"], self.recipe.max_steps, note)

        def on_progress(at: Progress) -> None:
            self.listener("rollouts", at.rollouts, at.of, f"{at.mixed} of {at.wanted} groups")

        result = await asyncio.to_thread(
            train,
            self.recipe,
            model,
            self.base.tokenizer,
            tasks,
            rollout,
            lambda trajectories, task: score_group(trajectories, task, RewardConfig.of(self.recipe)),
            self.sampler.sync,
            self.folder,
            on_step,
            on_progress,
            True,
            asyncio.get_running_loop(),
        )
        await asyncio.to_thread(save_adapter, model, self.folder / "candidate")
        _write(done, result.metrics)
        return result.metrics

    async def _evaluate(self) -> tuple[list[ItemResult], list[ItemResult], list[dict[str, str]]]:
        """Version in service and candidate on the held-out tasks, same seeds, same tool results."""
        done = self.folder / "evaluated.json"
        if not done.exists():
            tasks = self.options.heldout
            self._journal("evaluate", tasks=len(tasks))
            await self.sampler.end()
            seen = self._results(EVALUATION)  # after a kill: the results that were seen before it
            call = Recorded(self.agent.run_tool, seen, self.recipe.tool_results, self.store)
            sides = []
            for version, path in (
                (self.parent, Path(self.store.version(self.parent).path)),
                (self.candidate, self.folder / "candidate"),
            ):
                served = f"{self.tag}-{version}"
                await self.engine.load(served, path)
                try:
                    sides.append(
                        await evaluate(
                            tasks,
                            self.agent,
                            served,
                            self.options.evaluation,
                            call,
                            self.recipe.concurrency,
                            lambda n, of, version=version: self.listener("evaluate", n, of, version),  # type: ignore[misc]
                        )
                    )
                finally:
                    await self.engine.unload(served)
            (before, old), (after, new) = sides
            examples = [
                {"question": task.question, "gold": task.gold, "before": o.answer, "after": n.answer,
                 "change": "fixed" if b.correct < a.correct else "broken"}
                for task, b, a, o, n in zip(tasks, before, after, old, new, strict=True)
                if b.correct != a.correct
            ]  # fmt: skip
            rows = {"before": [asdict(r) for r in before], "after": [asdict(r) for r in after], "examples": examples}
            _write(done, rows)
        stored = json.loads(done.read_text())
        results = [[ItemResult(**row) for row in stored[side]] for side in ("before", "after")]
        return results[0], results[1], stored["examples"]

    def _publish(
        self, tasks: list[Task], metrics: list[Metrics], decision: Decision, examples: list[dict[str, str]]
    ) -> RunResult:
        status: Literal["promoted", "refused"] = "promoted" if decision.promote else "refused"
        names = (self.parent, self.candidate)
        recipe = (self.recipe, self.options.recipe_name)
        register(self.store, self.home, self.base, self.id, names, *recipe, tasks, decision)
        self._journal("publish", version=self.candidate, status=status)
        if decision.promote:  # else finish_run gives the tasks back: nothing was learnt from them
            try:
                promote(self.store, self.id, names, tasks, decision.reasons[0])
            except Outdated as error:
                raise RunRefused(str(error)) from None
            self._journal("swap", version=self.candidate)
        report = {
            "run": self.id, "status": status, "parent": self.parent, "version": self.candidate,
            "reasons": decision.reasons, "gate": decision.report(), "examples": examples,
            "tasks": dict(Counter(f"{task.kind} ({task.source})" for task in tasks)),
            "set_aside": self.set_aside,
            "steps": len(metrics), "seconds": {k: round(v, 1) for k, v in self.seconds.items()},
        }  # fmt: skip
        write_report(self.folder, report, metrics)
        self.store.finish_run(self.id, status, report)
        shutil.rmtree(self.folder / "sampler", ignore_errors=True)
        return RunResult(self.id, status, self.candidate, decision.reasons, self.folder, report)

    def _end(self, reason: str) -> RunResult:
        """Politely: nothing was wrong, there was only nothing to learn. Claimed tasks go back to the queue."""
        report = {
            "run": self.id,
            "status": "ended",
            "reasons": [reason],
            "set_aside": self.set_aside,
            "seconds": self.seconds,
        }
        self.store.finish_run(self.id, "ended", report)
        return RunResult(self.id, "ended", None, [reason], self.folder, report)

    def _results(self, name: str) -> ResultRecord:
        record = ResultRecord(self.folder / name)
        self._open.callback(record.close)
        return record

    def _journal(self, stage: str, **detail: Any) -> None:
        self.store.set_stage(self.id, stage, detail)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began


def _learns_alike(before: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a run by one recipe can go on by the other."""
    now = recipe.model_dump()
    return all(before.get(key) == now[key] for key in now.keys() - MAY_CHANGE)


def _write(file: Path, value: Any) -> None:
    """JSON, whole or not at all: its presence says that the stage is done."""
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(value))
    os.replace(draft, file)
