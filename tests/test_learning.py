"""The proof in small: a run of online learning on a tiny policy, through every real part, while a server answers."""

import asyncio
import json
from contextlib import aclosing

import pytest

from feedback_store import Store
from online_rl.adapters import fresh_adapter, save_adapter, save_version
from online_rl.loop import RunOptions, RunRefused, _only_run, run_once
from online_rl.recipe import make_recipe
from serving.agent import Agent, Limits
from serving.dialects.tapo import TapoDialect
from serving.engines.base import Sampling
from serving.engines.llamacpp import LlamaCppEngine
from serving.engines.opening import embedded
from serving.trajectory import Done
from serving.versions import VersionRouter
from tests.databases import edit
from tests.tiny_world import make_base, sums
from tools.python import PythonTool
from tools.search import SearchOptions, open_search
from tools.toolbox import Toolbox

RECIPE = {
    "group_size": 8, "groups_per_step": 4, "max_rounds": 4, "max_steps": 10, "learning_rate": 2e-3, "warmup_steps": 1,
    "concurrency": 8, "max_turns": 2, "max_response_tokens": 64, "overlong_buffer": 8, "max_observation_tokens": 32,
    "micro_batch": 32, "bf16": False, "save_steps": 2,
}  # fmt: skip
TASKS = sums()
TRAIN, HELDOUT = TASKS[:45], TASKS[45:]


def options(**recipe):
    return RunOptions(make_recipe(RECIPE | recipe), HELDOUT, evaluation=Sampling(0.7, 0.95, 64, seed=1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    return Toolbox([PythonTool(), open_search(tmp_path_factory.mktemp("tools"), SearchOptions())])


@pytest.fixture
def home(tmp_path, tiny):
    """A home with the tiny policy as v0 in service, and the training sums in the queue."""
    folder = tmp_path / "versions" / "v0"
    manifest = save_version(
        lambda work: save_adapter(fresh_adapter(tiny, 8, 16, "float32"), work), folder, tiny, parent=None
    )
    with Store.open(tmp_path / "whetstone.db") as store:
        store.add_version("v0", None, str(folder), manifest.model_dump(), "published")
        store.set_current("v0", "test")
        for task in [*TRAIN, HELDOUT[0]]:
            store.add_task(list(task.messages), task.verifier, task.gold, task.kind, "test")
        yield tmp_path, store


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_run_learns_and_the_running_server_serves_what_it_learnt(home, tiny, tools):
    path, store = home
    engine = LlamaCppEngine(tiny, slots=2, context=512)
    agent = Agent(engine, TapoDialect(tiny.tokenizer), tools, Limits(max_turns=2))
    router = VersionRouter(store, engine, tiny.fingerprint, poll_s=0.2)
    await router.start()
    answered = []

    async def keep_asking():
        while True:
            async with (
                router.lease() as version,
                aclosing(
                    agent.answer([{"role": "user", "content": "What is 3 + 4?"}], version, Sampling(0.0, max_tokens=48))
                ) as events,
            ):
                answered.extend([e.trajectory async for e in events if isinstance(e, Done)])
            await asyncio.sleep(0.3)

    client = asyncio.create_task(keep_asking())
    result = await asyncio.to_thread(run_once, path, store, embedded(tiny), tools, options())
    overall = result.report["gate"]["rows"][0]
    print(f"\naccuracy {overall['before']:.0%} to {overall['after']:.0%}, p = {overall['p']:.2g}")
    assert result.status == "promoted", result.reasons
    async with asyncio.timeout(60):
        while not answered or answered[-1].version != "v1":
            await asyncio.sleep(0.1)
            assert not client.done(), client.exception()
    client.cancel()
    await router.close()
    await engine.close()

    assert overall["after"] - overall["before"] > 0.2
    assert overall["p"] < 0.01
    assert store.current_version() == "v1"
    assert {t.version for t in answered} == {"v0", "v1"}
    assert all({s.version for s in t.steps} == {t.version} for t in answered)  # no answer of mixed versions

    lineage = store.lineage("v1")
    assert lineage["parent"] == "v0"
    assert len(lineage["task_ids"]) == len(TRAIN)  # the held-out sum that was queued isn't among them
    stats = store.queue_stats()
    assert stats["done"] == len(TRAIN)
    manifest = json.loads((path / "versions" / "v1" / "manifest.json").read_text())
    assert manifest["parent"] == "v0"
    assert HELDOUT[0].id not in manifest["task_ids"]
    assert (result.folder / "report.md").read_text().startswith("# Run")
    assert (result.folder / "curve.png").stat().st_size > 5_000


def test_a_run_without_enough_tasks_ends_politely_and_gives_them_back(home, tiny, tools):
    path, store = home
    earlier = store.start_run("earlier", {})
    store.complete(earlier, [task.id for task in store.claim(earlier, len(TRAIN) - 2)])
    store.finish_run(earlier, "ended", {})
    few = RunOptions(make_recipe(RECIPE), HELDOUT)
    result = run_once(path, store, embedded(tiny), tools, few)
    assert result.status == "ended"
    assert "too few" in result.reasons[0]
    assert store.queue_stats()["pending"] == 3
    assert store.current_version() == "v0"


def test_an_empty_registry_is_refused(tmp_path, tiny, tools):
    with Store.open(tmp_path / "whetstone.db") as store, pytest.raises(RunRefused, match="whetstone up"):
        run_once(tmp_path, store, embedded(tiny), tools, options())


def test_only_one_run_at_a_time(home, tiny, tools):
    path, store = home
    with _only_run(path, store), pytest.raises(RunRefused, match="under way"):
        run_once(path, store, embedded(tiny), tools, options())


def test_only_one_run_at_a_time_on_one_server(place, tmp_path, tiny, tools):
    """From two homes, as two machines have them."""
    with Store.open(place) as store:
        run_id = store.start_run("r", {})
        elsewhere = Store.open(place)
        with _only_run(tmp_path / "one", store):
            edit(place, "UPDATE runs SET host = 'elsewhere/1'")
            store.beat()
            edit(place, "UPDATE processes SET host = 'elsewhere/1'")
            with pytest.raises(RunRefused, match=f"trains on the store|{run_id} is under way .* on elsewhere"):
                run_once(tmp_path / "two", elsewhere, embedded(tiny), tools, options())
        with pytest.raises(RunRefused, match=f"{run_id} is under way .* on elsewhere"):
            run_once(tmp_path / "two", elsewhere, embedded(tiny), tools, options())
        elsewhere.close()


def test_a_failed_run_goes_on_where_it_was(home, tiny, tools, monkeypatch):
    """Killed in training after a checkpoint, then again before publishing: one run, its tasks trained on once."""
    path, store = home

    def stop_at_three(stage, done, of, note):
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_once(path, store, embedded(tiny), tools, options(max_steps=4), stop_at_three)
    assert store.current_version() == "v0"
    assert store.queue_stats()["claimed"] == len(TRAIN)  # not the held-out sum

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("online_rl.loop.write_report", no_space)
        with pytest.raises(OSError, match="No space"):
            run_once(path, store, embedded(tiny), tools, options(max_steps=4))

    result = run_once(path, store, embedded(tiny), tools, options(max_steps=4))
    assert [run.id for run in store.runs()] == [result.run_id]
    assert result.status in ("promoted", "refused")
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [v.id for v in store.versions()] == ["v0", "v1"]
