"""Full weights as versions: added by an operator, put in service and taken back under answers, refused where they can't
be. Against the server that answers as SGLang does; test_sglang_real.py has it on SGLang itself."""

import asyncio
import json
import shutil
from contextlib import asynccontextmanager

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from app.api import wire
from app.api.app import create_app
from app.cli import app
from app.runtime import running_service
from app.service import Finished, Question
from app.settings import Settings
from feedback_store import Store
from serving.engines.base import GenerateRequest, Sampling, WeightsRefused
from serving.engines.http_worker import Patience
from serving.engines.llamacpp import LlamaCppEngine
from serving.engines.sglang import SGLangEngine
from serving.full_weights import ForeignWeights, check_fits, write_weights
from serving.model import folder_model
from serving.versions import VersionRouter, install_shipped
from tests.fakes import ScriptedEngine, until
from tests.recorded_server import served
from tests.sglang_contract import RecordedSGLang
from tests.tiny_model import save_tiny_model

PATIENCE = Patience(connect=5, silence=20, control=20, look=0.2)


def model_folder(folder, seed):
    save_tiny_model(folder, seed)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base model, and two other sets of weights of it."""
    home = tmp_path_factory.mktemp("models")
    return {name: model_folder(home / name, seed) for seed, name in enumerate(("base", "one", "two"))}


@pytest.fixture
def home(tmp_path, monkeypatch, models):
    for name, value in {"HOME": tmp_path / "home", "ENGINE": "sglang", "ENGINE_MODEL": models["base"]}.items():
        monkeypatch.setenv(f"WHETSTONE_{name}", str(value))
    return tmp_path / "home"


def whetstone(*argv):
    return CliRunner().invoke(app, list(map(str, argv)))


def added(models, **sets):
    for name, of in sets.items():
        result = whetstone("versions", "add", models[of], "--id", name)
        assert result.exit_code == 0, result.output


@asynccontextmanager
async def serving(home, server):
    """A service on one recorded server, which draws no end of turn, and pauses once before the token `pause_at`."""

    def draw(*_):
        if server.generated == server.pause_at:
            server.may_run.clear()
        return 70

    server._draw, server.pause_at = draw, None
    with served(server.app()) as url:
        settings = Settings(
            home=home, engine="sglang", engine_urls=[url], engine_admin_key="secret", python_pool=0,
            search_backends=["local"], max_tokens=32, max_turns=0,
        )  # fmt: skip
        async with running_service(settings) as service:
            yield service


async def ask(service, tokens=8, conversation=None, version=None):
    messages = [{"role": "user", "content": "Hi"}]
    question = Question("key-a", messages, Sampling(1.0, max_tokens=tokens), conversation, version)
    async for event in service.answer(question):
        last = event
    assert isinstance(last, Finished)
    return last


async def paused(service, server, tokens):
    """An answer that has got five tokens; `server`'s `may_run` lets it go on."""
    server.pause_at = server.generated + 5
    under_way = asyncio.create_task(ask(service, tokens))
    await until(lambda: not server.may_run.is_set())
    server.pause_at = None
    return under_way


def wrote(answer):
    return [*answer.trajectory.drawn_by]


async def test_full_weights_come_into_service_go_on_to_others_and_back(home, models):
    added(models, w1="one", w2="two")
    server = RecordedSGLang(models["base"])
    async with serving(home, server) as service:
        adapter = service.router.current
        early = await ask(service)
        conversation = early.started.conversation_id

        under_way = await paused(service, server, 20)  # on the adapter: it ends there before the weights change
        change = asyncio.create_task(service.router.use("w1", "better"))
        await until(lambda: not service.router._loaded._open.is_set())
        waiting = asyncio.create_task(ask(service, 4))
        await service.engine.workers[0].resume()
        assert await change == 2, "both conversations move"
        assert under_way.done()
        assert wrote(await under_way) == [adapter]
        assert (await under_way).trajectory.own_tokens == 20
        assert wrote(await waiting) == ["w1"]
        assert service.router.loaded() == ["w1"]
        assert not server.adapters
        assert server.path == service.store.version("w1").path
        assert wrote(await ask(service, conversation=conversation)) == ["w1"]

        under_way = await paused(service, server, 20)  # on full weights: it goes on under the next ones
        await service.router.use("w2", "better still")
        mixed = await under_way
        [step] = mixed.trajectory.steps
        assert [version for version, _ in step.drawn_by] == ["w1", "w2"]
        assert sum(tokens for _, tokens in step.drawn_by) == step.mask.count(1) == 20
        assert step.version == "w2"
        assert mixed.started.version == "w1"
        assert wire.summary(mixed)["versions"] == ["w1", "w2"]
        [stored] = service.store.turn(mixed.started.turn_id).steps
        assert stored.drawn_by == step.drawn_by
        plain = await ask(service)
        assert service.store.turn(plain.started.turn_id).steps[0].drawn_by == ()

        with pytest.raises(WeightsRefused, match="one set of weights, now w2"):
            await ask(service, version=adapter)
        with pytest.raises(WeightsRefused, match="now w2"):
            await ask(service, version="w1")
        await service.router.use("w1", "back")
        assert wrote(await ask(service)) == ["w1"]
        await service.router.use(adapter, "back to the adapter")
        assert wrote(await ask(service, conversation=conversation)) == [adapter]
        assert server.weight_version == "default"
        assert set(server.adapters) == {adapter}


async def test_a_swap_that_fails_leaves_what_served_and_is_told(home, models):
    added(models, w1="one", w2="two")
    server = RecordedSGLang(models["base"])
    async with serving(home, server) as service:
        transport = httpx.ASGITransport(create_app(service, Settings(home=home, admin_open_on_loopback=True)))
        client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
        adapter, store = service.router.current, service.store
        store.add_version("w3", None, store.version("w1").path, store.version("w1").manifest, "published",
                          run_id=(run := store.start_run("by hand", {})))  # fmt: skip
        server.refuse_updates = True
        with pytest.raises(WeightsRefused, match="no space left"):
            await service.router.use("w1", "better")
        assert store.current_version() == adapter
        assert wrote(await ask(service)) == [adapter]

        store.set_current("w3", "as another process would")
        await until(lambda: "w3" in service.router.refused)
        assert "no space left" in service.router.refused["w3"]
        assert (await service.router.status())["refused"] == service.router.refused
        assert wrote(await ask(service)) == [adapter]
        await until(lambda: store.run(run).stages)
        assert "no space left" in store.run(run).stages[-1].detail["why"]
        told = (await client.get("/v1/admin/versions")).json()
        assert "no space left" in told["serving_here"]["refused"]["w3"]
        answer = await client.post("/v1/admin/versions/w1/use")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "weights_not_in_service")

        server.refuse_updates = False
        await service.router.use("w1", "now it can")
        server.refuse_updates = store.version("w2").path
        with pytest.raises(WeightsRefused, match="the old weights stay"):
            await service.router.use("w2", "better")
        assert wrote(await ask(service)) == ["w1"]
        assert server.weight_version == "w1"


async def test_answers_that_dont_end_put_the_change_off(home, models):
    added(models, w1="one")
    server = RecordedSGLang(models["base"])
    async with serving(home, server) as service:
        service.router._loaded._patience_s = 0.2
        under_way = await paused(service, server, 20)
        with pytest.raises(WeightsRefused, match=r"didn't end within 0\.2 s"):
            await service.router.use("w1", "now")
        await service.engine.workers[0].resume()
        assert (await under_way).trajectory.own_tokens == 20
        assert wrote(await ask(service)) == [service.router.current]


async def test_a_restarted_whetstone_finds_the_weights_in_place(home, models):
    added(models, w1="one")
    server = RecordedSGLang(models["base"])
    async with serving(home, server) as service:
        await service.router.use("w1", "better")
    async with serving(home, server) as service:
        assert service.router.current == "w1"
        assert wrote(await ask(service)) == ["w1"]
        assert [v.id for v in service.store.versions() if v.manifest["kind"] == "lora"][1:] == [
            f"base-{folder_model(models['base']).fingerprint[:8]}"
        ], "its fingerprint is that of the model, not of what is in place"


async def test_another_process_swaps_the_same_servers(home, models):
    added(models, w1="one", w2="two")
    server = RecordedSGLang(models["base"])
    async with serving(home, server) as first:
        await first.router.use("w1", "better")
        engine = SGLangEngine([first.engine.workers[0].url], "secret", patience=PATIENCE)
        await engine.start({"w1", "w2"})
        second = VersionRouter(first.store, engine, folder_model(models["base"]).fingerprint, poll_s=60)
        await second.start()
        assert second.current == "w1"
        await first.router.use("w2", "better still")
        async with second.lease() as version:  # it doesn't know yet; what answers is told truly
            request = GenerateRequest([70, 71], version, Sampling(1.0, max_tokens=4))
            drew = {chunk.version async for chunk in engine.generate(request)}
            assert drew == {"w2"}
        await second.refresh()
        assert second.current == "w2"
        assert not second.refused
        await second.close()
        await engine.close()


async def test_an_engine_that_cant_change_weights_says_so(tmp_path, models, base):
    with Store.open(tmp_path / "store.db") as store:
        install_shipped(store, tmp_path)
        manifest = write_weights(models["one"], tmp_path / "versions" / "w1", folder_model(models["base"]), None)
        store.add_version("w1", "v0", str(tmp_path / "versions" / "w1"), manifest.model_dump(), "published")
        engine = ScriptedEngine(None, lambda context: "x")
        engine._loaded, engine.can_swap = [], False
        router = VersionRouter(store, engine, poll_s=60)
        await router.start()
        with pytest.raises(WeightsRefused, match="engine = sglang"):
            await router.use("w1", "better")
        assert (router.current, engine.loaded(), store.current_version()) == ("v0", ["v0"], "v0")
        store.set_current("w1", "by another process")
        await router.refresh()
        assert "this engine can't change" in router.refused["w1"]
        assert router.current == "v0"
        await router.close()


async def test_the_embedded_engine_refuses_full_weights(base, tmp_path):
    engine = LlamaCppEngine(base)
    assert engine.weights is None
    with pytest.raises(WeightsRefused, match="engine = sglang"):
        await engine.swap("w1", tmp_path)


def test_what_isnt_the_models_weights_is_not_published(home, models, tmp_path):
    base = folder_model(models["base"])

    def changed(name, **config):
        folder = tmp_path / name
        shutil.copytree(models["one"], folder)
        if config:
            file = folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder, folder / "model.safetensors"

    folder, file = changed("broken")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ForeignWeights, match="no whole safetensors"):
        check_fits(folder, base)
    folder, _ = changed("theta", rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    with pytest.raises(ForeignWeights, match="rope_parameters"):
        check_fits(folder, base)
    folder, file = changed("nan")
    weights = load_file(file)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ForeignWeights, match=r"model\.norm\.weight.*finite"):
        check_fits(folder, base)
    folder, file = changed("fewer")
    save_file({"model.embed_tokens.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(ForeignWeights, match="lacks"):
        check_fits(folder, base)
    folder, _ = changed("words")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = whetstone("versions", "add", folder, "--id", "w9")
    assert result.exit_code == 1
    assert "tokenizer" in result.output
    assert not (home / "versions" / "w9").exists()


def test_versions_add_use_and_canary_say_what_they_cant(home, models, monkeypatch):
    added(models, w1="one")
    for argv, told in (
        (("add", models["one"], "--id", "w1"), "already"),
        (("add", models["one"], "--id", "v7"), "runs name"),
        (("add", models["one"], "--id", "../w"), "no version's id"),
        (("add", models["one"], "--id", "w2", "--parent", "nobody"), "nobody"),
        (("add", home, "--id", "w2"), "config.json"),
        (("canary", "w1", "--share", "0.5"), "full weights"),
    ):
        result = whetstone("versions", *argv)
        assert result.exit_code == 1, argv
        assert told in " ".join(result.output.split()), result.output
    assert "weights" in whetstone("versions").output
    monkeypatch.setenv("WHETSTONE_ENGINE", "embedded")
    monkeypatch.delenv("WHETSTONE_ENGINE_MODEL")
    result = whetstone("versions", "use", "w1")
    assert result.exit_code == 1
    assert "engine = sglang" in result.output
