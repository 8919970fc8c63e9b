"""One vLLM server over HTTP: what its routes take and answer.

Written against vLLM 0.32.0. `serving/engines/vllm.py` makes an engine of one or several of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, ClassVar

from serving.engines.base import EngineError, GrammarFailed, PromptTooLong
from serving.engines.http_worker import AdapterGone, Description, HttpWorker, Refused, WorkerFailed, message

_PROBE = [3, 5, 7, 11]  # token ids that every vocabulary has
_ANY_RANK = 1 << 30  # it doesn't tell, and refuses by itself what is too high
_NO_LORA = "start it with --enable-lora, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"


@dataclass(frozen=True)
class VLLMDescription(Description):
    """`served_name`: what requests call the bare model."""

    served_name: str


class VLLMWorker(HttpWorker):
    """`/health` doesn't generate, so one that was drained is asked for a token too before it gets requests again."""

    name: ClassVar[str] = "vLLM"
    version: ClassVar[str] = "0.32.0"
    served_name = ""

    async def look(self) -> None:
        await super().look()
        if self.problem and self.served_name:
            await self.probe(1.0)

    async def describe(self) -> VLLMDescription:
        with self._failures():
            models = await self._call("GET", "/v1/models")
            base = next((card for card in models["data"] if not card["parent"]), None)
            if base is None or not base.get("max_model_len"):
                raise WorkerFailed(f"vLLM at {self.url} tells no max_model_len in /v1/models: is it vLLM 0.32.0?")
            self.served_name = base["id"]
            return VLLMDescription(base["root"], base["max_model_len"], True, _ANY_RANK, frozenset(), base["id"])

    async def load_adapter(self, name: str, path: str) -> None:
        if (await self.adapters()).get(name) == path:
            return
        body = {"lora_name": name, "lora_path": path}
        try:
            await self._call("POST", "/v1/load_lora_adapter", body, self._patience.control)
        except WorkerFailed as error:
            if "Worker failed with error" in str(error):  # of its own worker: the server is well, the adapter isn't
                raise Refused(str(error)) from error
            raise
        if (await self.adapters()).get(name) != path:
            raise WorkerFailed(f"vLLM at {self.url} took adapter {name!r} and doesn't report it.")

    async def unload_adapter(self, name: str) -> None:
        with contextlib.suppress(AdapterGone):
            await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, self._patience.control)

    def complete(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed completion, tokens in, tokens out. Closing it aborts the request.

        Raises PromptTooLong, GrammarFailed, AdapterGone, Refused, WorkerFailed.
        """
        asked = {"stream": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
        return self.stream("/v1/completions", body | asked)

    async def probe(self, temperature: float) -> list[float]:
        body = {
            "model": self.served_name, "prompt": _PROBE, "max_tokens": 1, "temperature": temperature, "logprobs": 0,
            "logprob_token_ids": _PROBE, "return_tokens_as_token_ids": True, "ignore_eos": True,
        }  # fmt: skip
        answer = await self._call("POST", "/v1/completions", body, self._patience.silence)
        with self._failures():
            told = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            return [float(told[f"token_id:{i}"]) for i in _PROBE]

    def refusal(self, status: int, text: str) -> EngineError:
        told = message(text)
        if status == 401:
            return Refused(f"vLLM at {self.url} doesn't take the key: set engine_admin_key to its --api-key.")
        if status == 404 and told == "Not Found":
            return Refused(f"vLLM at {self.url} loads no adapters while it runs: {_NO_LORA}.")
        if status == 404 and ("does not exist" in told or "cannot be found" in told):
            return AdapterGone(f"vLLM at {self.url}: {told}")
        if status >= 500:
            return WorkerFailed(f"vLLM at {self.url} failed ({status}): {told}")
        if "maximum context length" in told:
            return PromptTooLong(f"{told} Shorten it.")
        if "grammar" in told.lower() or "schema" in told.lower():
            return GrammarFailed(f"vLLM can't hold its answer to this JSON schema: {told}")
        if "body.stop" in told:
            told += " Raise VLLM_MAX_STOP_STRINGS in its environment."
        return Refused(f"vLLM at {self.url} refused the request ({status}): {told}")
