"""Two endpoint processes on one store: what happens at one is so at the other, and the death of one harms no other."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from feedback_store import Store
from serving.versions import install_shipped
from tests.databases import Places
from tests.test_versions import publish


@dataclass
class Endpoint:
    process: subprocess.Popen[str]
    url: str

    def ask(self, question: str, key: str, conversation: str | None = None) -> dict[str, Any]:
        """The answer, as {version, conversation, turn, text}."""
        body: dict[str, Any] = {"model": "whetstone", "messages": [{"role": "user", "content": question}]}
        if conversation is not None:
            body["metadata"] = {"conversation_id": conversation}
        reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=bearer(key), timeout=60)
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        named = answer["whetstone"]
        assert answer["model"] == named["version"] == reply.headers["x-whetstone-version"]
        return {
            "version": named["version"],
            "conversation": named["conversation_id"],
            "turn": named["turn_id"],
            "text": answer["choices"][0]["message"]["content"],
        }


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def shared(places: Places, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A store with v0 in service and v1, and the folder of their files, which both processes read."""
    place, home = places.new(), tmp_path_factory.mktemp("home")
    with Store.open(place) as store:
        install_shipped(store, home)
        publish(store, home, "v1")
    return place, home


@contextlib.contextmanager
def endpoint(place: str, home: Path) -> Iterator[Endpoint]:
    with starting(place, home) as process:
        yield ready(process)


@contextlib.contextmanager
def starting(place: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.endpoint_process", place, str(home)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ready(process: subprocess.Popen[str]) -> Endpoint:
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url, "the endpoint didn't start"
    return Endpoint(process, url)


@pytest.fixture(scope="module")
def pair(shared: tuple[str, Path]) -> Iterator[tuple[Endpoint, Endpoint]]:
    with starting(*shared) as one, starting(*shared) as other:
        yield ready(one), ready(other)


@pytest.fixture(scope="module")
def store(shared: tuple[str, Path]) -> Iterator[Store]:
    with Store.open(shared[0]) as opened:
        yield opened


@pytest.fixture(scope="module")
def key(store: Store, pair: tuple[Endpoint, Endpoint]) -> str:
    """Made while both run: either lets it in within a few seconds, and nobody without one."""
    _, key = store.add_key("ada", ["chat", "feedback", "admin"])
    for endpoint in pair:
        models = f"{endpoint.url}/v1/models"
        until(lambda models=models: httpx.get(models, headers=bearer(key)).status_code == 200)
        until(lambda models=models: httpx.get(models).status_code == 401)
    return key


def test_a_key_made_and_revoked_counts_at_both(pair: tuple[Endpoint, Endpoint], store: Store, key: str) -> None:
    _, short = store.add_key("bob", ["chat"])
    urls = [f"{endpoint.url}/v1/models" for endpoint in pair]
    for url in urls:
        until(lambda url=url: httpx.get(url, headers=bearer(short)).status_code == 200)
    store.revoke_key("bob")
    for url in urls:
        until(lambda url=url: httpx.get(url, headers=bearer(short)).status_code == 401)
        assert httpx.get(url, headers=bearer(key)).status_code == 200


def test_a_switch_at_one_is_followed_by_the_other_and_conversations_stay(
    pair: tuple[Endpoint, Endpoint], store: Store, key: str
) -> None:
    one, other = pair
    begun = one.ask("hello", key)
    assert begun["version"] == "v0"
    assert other.ask("and on?", key, begun["conversation"])["version"] == "v0"
    reply = httpx.post(f"{one.url}/v1/admin/versions/v1/use", json={}, headers=bearer(key), timeout=60)
    assert reply.status_code == 200, reply.text
    assert one.ask("new", key)["version"] == "v1"
    until(lambda: other.ask("new", key)["version"] == "v1")
    for endpoint in (other, one, other):
        again = endpoint.ask("still there?", key, begun["conversation"])
        assert (again["version"], again["conversation"]) == ("v0", begun["conversation"])
    assert [message["content"] for message in store.history(begun["conversation"])][::2] == [
        "hello", "and on?", *["still there?"] * 3,
    ]  # fmt: skip
    later = other.ask("begun there", key)
    back = httpx.post(
        f"{other.url}/v1/admin/versions/v0/use", json={"move_conversations": True}, headers=bearer(key), timeout=60
    )
    assert back.status_code == 200, back.text
    until(lambda: one.ask("new", key)["version"] == "v0")
    assert one.ask("moved along", key, later["conversation"])["version"] == "v0"


def test_feedback_at_one_on_an_answer_of_the_other(pair: tuple[Endpoint, Endpoint], store: Store, key: str) -> None:
    one, other = pair
    answer = one.ask("hello", key)
    verdict = {"turn_id": answer["turn"], "verifier": "exact", "gold": "Hello!"}
    reply = httpx.post(f"{other.url}/v1/feedback", json=verdict, headers=bearer(key), timeout=60)
    assert reply.status_code == 200, reply.text
    assert [outcome.score for outcome in store.outcomes(answer["turn"])] == [1.0]


def test_an_answer_whose_process_is_killed_is_closed_by_the_other(
    shared: tuple[str, Path], pair: tuple[Endpoint, Endpoint], store: Store, key: str
) -> None:
    """And what the other one was answering meanwhile goes on."""
    _, other = pair
    body = {"model": "whetstone", "messages": [{"role": "user", "content": "for ever"}], "stream": True}
    with endpoint(*shared) as victim, contextlib.ExitStack() as open_streams:
        streams = []
        for url in (victim.url, other.url):
            request = httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=bearer(key), timeout=120)
            lines = open_streams.enter_context(request).iter_lines()
            first = next(line for line in lines if line.startswith("data: "))
            streams.append((lines, json.loads(first.removeprefix("data: "))["whetstone"]["turn_id"]))
        (cut, lost), (whole, kept) = streams
        assert (store.turn(lost).status, store.turn(kept).status) == ("running", "running")
        victim.process.kill()
        with pytest.raises(httpx.TransportError):
            list(cut)
        until(lambda: store.turn(lost).status == "interrupted")
        assert list(whole)[-2:] == ["data: [DONE]", ""]
        assert (store.turn(kept).status, store.turn(lost).status) == ("done", "interrupted")
        conversation = store.turn(lost).conversation_id
        assert other.ask("never mind", key, conversation)["conversation"] == conversation
