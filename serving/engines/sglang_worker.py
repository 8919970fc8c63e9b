"""One SGLang server over HTTP: what its routes take and answer.

Written against SGLang 0.5.23. `serving/engines/sglang.py` makes an engine of one or several of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, ClassVar

from serving.engines.base import EngineError, GrammarFailed, PromptTooLong
from serving.engines.http_worker import AdapterGone, Description, HttpWorker, Patience, Refused, WorkerFailed, message

_PROBE = [3, 5, 7, 11]  # token ids that every vocabulary has
_TOO_LONG = ("context length", "too long", "longer than", "maximum allowed length")
_ANY_TOKEN_ID = 1 << 30


@dataclass(frozen=True)
class SGLangDescription(Description):
    tokenizer_path: str
    weight_version: str


class Worker(HttpWorker):
    """`label` is the weight version that it should report."""

    name: ClassVar[str] = "SGLang"
    version: ClassVar[str] = "0.5.23"

    def __init__(self, url: str, key: str | None = None, patience: Patience | None = None) -> None:
        super().__init__(url, key, patience)
        self.label = ""

    async def describe(self) -> SGLangDescription:
        with self._failures():
            info = await self._call("GET", "/model_info")
            server = await self._call("GET", "/server_info")
            models = await self._call("GET", "/v1/models")
            lengths = [card["max_model_len"] for card in models["data"] if card.get("max_model_len")]
            pool = server.get("max_total_num_tokens") or _ANY_TOKEN_ID
            if not lengths:
                raise WorkerFailed(f"SGLang at {self.url} tells no max_model_len in /v1/models: is it SGLang 0.5.23?")
            return SGLangDescription(
                info["model_path"],
                min(*lengths, pool),
                bool(server.get("enable_deterministic_inference")),
                server.get("max_lora_rank") if server.get("enable_lora") else None,
                frozenset(server.get("lora_target_modules") or ()),
                info["tokenizer_path"],
                info["weight_version"],
            )

    async def load_adapter(self, name: str, path: str) -> None:
        if (await self.adapters()).get(name) == path:
            return
        answer = await self._control("/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if (answer.get("loaded_adapters") or {}).get(name) != path:
            raise WorkerFailed(f"SGLang at {self.url} took adapter {name!r} and doesn't report it: {answer}")

    async def unload_adapter(self, name: str) -> None:
        with contextlib.suppress(Refused):  # it isn't there, which is what is wanted
            await self._control("/unload_lora_adapter", {"lora_name": name})

    async def pause(self) -> None:
        """Stop generating; what is in flight waits, its KV cache dropped."""
        await self._control("/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        await self._control("/continue_generation", {})

    async def wake(self) -> bool:
        """One whose Whetstone ended in mid-swap waits for this for ever."""
        await self._call("POST", "/continue_generation", {}, self._patience.silence)
        return True

    async def update_weights(self, path: str, label: str) -> None:
        await self._control(
            "/update_weights_from_disk", {"model_path": path, "weight_version": label, "flush_cache": True}
        )

    async def probe(self, temperature: float = 1.0, prompt: list[int] | None = None) -> list[float]:
        """The bare model's logprobs of fixed tokens after a fixed prompt: a fingerprint of the weights."""
        body = {
            "input_ids": prompt or _PROBE,
            "sampling_params": {"max_new_tokens": 1, "temperature": temperature, "ignore_eos": True},
            "return_logprob": True,
            "token_ids_logprob": _PROBE,
        }
        answer = await self._call("POST", "/generate", body, self._patience.silence)
        try:
            return [float(logprob) for logprob, *_ in answer["meta_info"]["output_token_ids_logprobs"][0]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise WorkerFailed(f"SGLang at {self.url} gives no logprobs: {str(answer)[:300]}") from error

    async def abort(self, rid: str) -> None:
        with contextlib.suppress(EngineError):  # gone, or unreachable: nothing generates any more
            await self._call("POST", "/abort_request", {"rid": rid}, seconds=10)

    def generate(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed `/generate`. Raises PromptTooLong, AdapterGone, Refused, WorkerFailed."""
        return self.stream("/generate", body)

    async def _control(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._call("POST", route, body, self._patience.control)
        if answer.get("success") is False:
            raise Refused(f"SGLang at {self.url} refused {route}: {answer.get('error_message') or answer}")
        return answer

    def refusal(self, status: int, text: str) -> EngineError:
        told = message(text)
        if status == 401:
            return Refused(f"SGLang at {self.url} doesn't take the key: set engine_admin_key to its --admin-api-key.")
        if status >= 500 or status == 404:
            return WorkerFailed(f"SGLang at {self.url} failed ({status}): {told}")
        if "never been loaded" in told or "not loaded" in told:
            return AdapterGone(f"SGLang at {self.url}: {told}")
        if "grammar" in told.lower():
            return GrammarFailed(f"SGLang at {self.url} can't hold to the JSON schema: {told}")
        if any(sign in told for sign in _TOO_LONG):
            return PromptTooLong(f"{told} Shorten it.")
        return Refused(f"SGLang at {self.url} refused the request ({status}): {told}")
