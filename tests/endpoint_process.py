"""An endpoint in a process of its own: `python -m tests.endpoint_process STORE HOME`. It prints its URL.

The policy is scripted; store, router, agent, keys and the endpoint are the product's.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import uvicorn

from app.api.app import create_app
from app.service import Service
from app.settings import Settings
from feedback_store import Store
from serving.agent import Agent, Limits
from serving.dialects.native import NativeDialect
from serving.versions import VersionRouter, install_shipped
from tests.fakes import ScriptedEngine
from tests.tiny_tokenizer import tiny_tokenizer
from tools.toolbox import Toolbox


def say(context: str) -> str:
    return "word " * 600 if "for ever" in context else "Hello!"


async def main(place: str, home: Path) -> None:
    tokenizer = tiny_tokenizer()
    engine = ScriptedEngine(tokenizer, say, context=1 << 20)
    engine._loaded = []
    engine.delay = 0.005
    with Store.open(place, connections=8) as store:
        store.recover()
        install_shipped(store, home)
        with store.present(store.recover, every=0.3):
            router = VersionRouter(store, engine, poll_s=0.2)
            await router.start()
            limits = Limits(max_turns=0, answer_tokens=1 << 15)
            service = Service(store, router, Agent(engine, NativeDialect(tokenizer), Toolbox([]), limits), engine)
            app = create_app(service, Settings(home=home, max_tokens=4096, context=8192, observation_tokens=16))
            listening = socket.create_server(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
            print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
            await server.serve([listening])
            await router.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
