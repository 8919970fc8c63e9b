"""Every knob, typed, in one place: from whetstone.toml and from WHETSTONE_* variables, which win."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from app.owners import owner_of

SearchBackend = Literal["ddgs", "searxng", "local"]
Trust = Annotated[float, Field(ge=0, le=1)]
_OWNER = re.compile(r"key-[0-9a-f]{16}")
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")


class SettingsError(ValueError):
    """A knob has a value that can't be used. The message names the knob and the way out."""


class Settings(BaseSettings):
    """Lists are written as TOML lists, or in a variable as `a,b`.

    The files, later ones winning: `~/.whetstone/whetstone.toml`, `./whetstone.toml`, `$WHETSTONE_CONFIG`.
    """

    model_config = SettingsConfigDict(env_prefix="WHETSTONE_", extra="forbid", validate_default=True)

    home: Path = Field(Path("~/.whetstone"), description="model, store, versions and runs")
    model_name: str = Field("whetstone", min_length=1, description="the model name that means the version in service")

    store_url: SecretStr | None = Field(
        None, description="postgresql://USER:PASSWORD@HOST:PORT/NAME of the record; None: a SQLite file in home"
    )
    store_connections: int = Field(
        16, ge=2, description="of one process to that server at most; a run holds one of them throughout"
    )

    host: str = "127.0.0.1"
    api_port: int = Field(8000, ge=1, le=65535)
    web_port: int = Field(7860, ge=1, le=65535)
    api_keys: Annotated[list[SecretStr], NoDecode] = Field(
        default_factory=list, description="when set, a request needs one as its bearer token, and the chat as password"
    )  # the operator's own, for chat and feedback; `whetstone keys` makes others, with names, scopes and ends
    admin_open_on_loopback: bool = Field(
        False, description="where there is no key at all, let this machine's callers use /v1/admin too"
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        default_factory=list, description="of web pages that may call the endpoint from a browser: https://HOST"
    )
    max_body_bytes: int = Field(1_000_000, ge=1_000)
    requests_per_minute: int | None = Field(
        600, ge=1, description="of one API key, unless `whetstone keys add --per-minute` says else; None: no limit"
    )
    answers_per_key: int | None = Field(
        32, ge=1, description="of one API key at the same time, unless `--at-once` says else; None: no limit"
    )
    max_answers: int = Field(64, ge=1, description="answers in flight before the next is told to come back later")
    log_format: Literal["human", "json"] = Field("human", description="of the log on standard error")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="what is logged from; info has a line for each request to the endpoint"
    )
    otlp_endpoint: str | None = Field(
        None, description="of an OpenTelemetry collector that takes traces over HTTP: http://HOST:4318; None: no traces"
    )
    otlp_content: bool = Field(False, description="let traces hold messages, arguments of tools and their results too")
    shutdown_seconds: float = Field(20.0, ge=0, description="how long answers in flight may take to end on shutdown")

    engine: Literal["embedded", "sglang", "vllm"] = Field("embedded", description="what runs the model that answers")
    engine_model: str | None = Field(
        None, description="of sglang or vllm: a transformers folder; None: the embedded model's, or what is served"
    )
    engine_urls: Annotated[list[str], NoDecode] = Field(
        default_factory=list, description="servers to attach to, alike; none: one is started and supervised"
    )
    engine_router_url: str | None = Field(None, description="of an sglang-router before them, for generation alone")
    engine_admin_key: SecretStr | None = Field(
        None, description="--admin-api-key of the SGLang servers, or --api-key of the vLLM servers"
    )
    engine_silence_seconds: float = Field(120.0, gt=0, description="without a token before a server is given up")
    slots: int = Field(4, ge=1, description="sequences that the embedded engine works on at once")
    context: int = Field(
        4096, ge=512, le=8192, description="tokens of prompt and answer, of the embedded engine; the model has 8192"
    )
    threads: int | None = Field(None, ge=1, description="of the embedded engine; None: all that the process may use")
    sglang_python: Path = Field(
        Path(sys.executable), description="the interpreter of the environment where SGLang is installed"
    )
    sglang_tensor_parallel: int = Field(1, ge=1, description="GPUs that one supervised server spreads over")
    sglang_lora_rank: int = Field(16, ge=1, description="the highest of a version's adapter, and that of a first one")
    sglang_memory_fraction: float | None = Field(
        None, gt=0, lt=1, description="of GPU memory for weights and KV cache; None: as SGLang finds best"
    )
    sglang_memory_saver: bool = Field(
        False, description="start it able to give its memory away; nothing asks it to, so far"
    )
    sglang_deterministic: bool = Field(False, description="the same seed, the same answer; slower; not on a CPU")
    sglang_flags: Annotated[list[str], NoDecode] = Field(
        default_factory=list, description="more of sglang.launch_server's own, which win over the settings"
    )
    sglang_env: dict[str, str] = Field(default_factory=dict, description="more environment for that server")
    vllm_python: Path = Field(
        Path(sys.executable), description="the interpreter of the environment where vLLM is installed"
    )
    vllm_tensor_parallel: int = Field(1, ge=1, description="GPUs that one supervised server spreads over")
    vllm_lora_rank: int = Field(16, ge=1, le=512, description="as sglang_lora_rank; vLLM rounds it up to 8, 16, 32 …")
    vllm_memory_fraction: float | None = Field(
        None, gt=0, lt=1, description="of GPU memory for weights and KV cache; None: as vLLM finds best"
    )
    vllm_flags: Annotated[list[str], NoDecode] = Field(
        default_factory=list, description="more of its OpenAI server's own, which win over the settings"
    )
    vllm_env: dict[str, str] = Field(default_factory=dict, description="more environment for that server")

    version_idle_seconds: float = Field(
        1800.0, gt=0, description="a conversation stays on its version until it rested for so long"
    )
    max_loaded_versions: int = Field(4, ge=2, description="of the model, loaded beside each other")

    max_turns: int = Field(4, ge=0, description="tool calls in one answer")
    observation_tokens: int = Field(256, ge=16, description="of one tool result, read by the policy")
    max_tokens: int = Field(512, ge=16, description="of one generation; a request may ask for fewer")
    answer_tokens: int = Field(1024, ge=16, description="the policy's own in one answer, over all its generations")
    dialect: Literal["tapo", "native"] = Field(
        "tapo", description="how the model writes its actions; the shipped version has learnt tapo"
    )
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(0.95, gt=0, le=1)

    search_backends: Annotated[list[SearchBackend], NoDecode] = Field(
        default=["ddgs", "local"], min_length=1, description="asked in this order until one answers"
    )
    search_seconds: float = Field(6.0, gt=0, description="of one look-up on the web, retries included")
    search_results: int = Field(1, ge=1, le=10, description="found passages that one search shows; v0 is used to one")
    search_region: str = Field("us-en", description="of ddgs and SearXNG: country-language")
    search_safe: Literal["on", "moderate", "off"] = "moderate"
    search_age: Literal["day", "week", "month", "year"] | None = Field(None, description="no older pages than this")
    search_news: bool = Field(False, description="search the news instead of the whole web")
    search_cache_seconds: float = Field(900.0, ge=0, description="how long a result may be given again")
    search_per_minute: float = Field(30.0, gt=0, description="look-ups that one web backend is asked for at most")
    searxng_url: str | None = Field(None, description="of a SearXNG instance whose JSON format is on")
    documents: Path | None = Field(None, description=".txt, .md, .html, .pdf files that search reads too")
    open_pages: bool = Field(False, description="give the model the tool `fetch`, which opens a web page")
    fetch_seconds: float = Field(10.0, gt=0, description="of opening one page, redirects included")
    fetch_bytes: int = Field(2_000_000, ge=10_000, description="of one page, more isn't downloaded")

    python_backend: Literal["bubblewrap", "container"] = Field("bubblewrap", description="what isolates the Python")
    python_seconds: float = Field(8.0, gt=0, description="of one run in the sandbox")
    python_memory_mb: int = Field(512, ge=64, description="of one program, beside the libraries")
    python_total_mb: int = Field(
        4096, ge=512, description="of all programs together, where the machine has control groups"
    )
    python_pool: int = Field(4, ge=0, le=64, description="interpreters that wait, started, for the next program")
    python_running: int = Field(16, ge=1, le=256, description="programs and kept interpreters at the same time")
    python_state: Literal["call", "conversation"] = Field(
        "call", description="how long variables live: one call, or on through a conversation"
    )
    python_packages: Annotated[list[str], NoDecode] = Field(
        default=["numpy", "scipy", "sympy", "pandas", "matplotlib"],
        description="installed packages that programs may import, imported beforehand",
    )
    container_image: str = Field("python:3.11", description="of python_backend = container")
    container_runtime: str | None = Field(None, description="of python_backend = container: runsc for gVisor")
    unsafe_without_sandbox: bool = Field(
        False,
        description="where bubblewrap is missing, run the model's Python with this user's rights",
    )
    files_mb: int = Field(64, ge=1, description="of one conversation's uploaded and written files together")

    tools: Annotated[list[str], NoDecode] = Field(
        default_factory=list, description="LangChain tools of your own, each `module:name`"
    )
    mcp_servers: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="MCP servers by name, as langchain-mcp-adapters takes them"
    )
    key_tools: dict[str, list[str]] = Field(
        default_factory=dict, description="tools that one owner (key-…) may use; an owner who isn't named may use all"
    )
    tool_seconds: float | None = Field(
        None, gt=0, description="of one tool call, waiting included; None: twice that of Python, search or fetch"
    )
    training_tools: Annotated[list[str], NoDecode] = Field(
        default=["code", "search"], description="what training and evaluation may call, thousands of times"
    )
    tool_calls_per_owner: int = Field(8, ge=1, description="tool calls of one owner at the same time")
    audit: bool = Field(True, description="write a line for each tool call to audit.jsonl")
    training_consent: Literal["training", "service"] = Field(
        "training", description="what an owner's conversations may be used for who didn't say: `whetstone data consent`"
    )
    retention_days: int | None = Field(
        None,
        ge=1,
        le=36_500,
        description="erase conversations that rested for so long, daily; None: keep all",
    )
    redact_training: bool = Field(
        False, description="take e-mail addresses, numbers and the like out of questions before they are trained on"
    )
    queue_max: int = Field(10_000, ge=1, description="tasks that may wait for training")

    outcome_trust: dict[str, Trust] = Field(
        default_factory=dict, description="of a gold by its source: verifier 0.9, client 0.8, person 0.5, judge 0.3"
    )
    owner_trust: dict[str, Trust] = Field(default_factory=dict, description="of one owner (key-…), whatever the source")
    trusted_owners: Annotated[list[str], NoDecode] = Field(
        default_factory=list, description="whose golds win against all others, and fill any share of a batch"
    )
    gold_margin: float = Field(0.7, gt=0.5, le=1, description="of all trust that a gold needs, else a person decides")
    quarantine_rate: float = Field(
        0.3, ge=0, le=1, description="of an owner's golds that may contradict known ones (from the third on); 1: all"
    )
    owner_share: float = Field(0.2, gt=0, le=1, description="of a training batch for one of several owners; 1: all")

    @field_validator(
        "api_keys", "cors_origins", "engine_urls", "sglang_flags", "vllm_flags", "search_backends", "python_packages",
        "tools", "training_tools", "trusted_owners", mode="before",
    )  # fmt: skip
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("home", "documents", "sglang_python", "vllm_python")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value else None

    @model_validator(mode="after")
    def _guard(self) -> Settings:
        if self.engine == "embedded" and (self.engine_urls or self.engine_router_url or self.engine_model):
            raise ValueError(
                "engine_urls, engine_router_url and engine_model belong to another engine than the embedded one: set "
                "WHETSTONE_ENGINE=sglang or vllm, or take them out."
            )
        if self.engine_router_url and self.engine == "vllm":
            raise ValueError(
                "engine_router_url is of SGLang: take it out; requests go round the engine_urls by themselves."
            )
        if self.engine_router_url and not self.engine_urls:
            raise ValueError("engine_router_url needs engine_urls too: versions are loaded on each worker, not by it.")
        if wrong := [url for url in self.engine_urls if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"engine_urls holds {wrong[0]!r}, which isn't an http:// or https:// address.")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint is {self.otlp_endpoint!r}, which isn't an http:// or https:// address.")
        if self.api_port == self.web_port:
            raise ValueError(f"api_port and web_port are both {self.api_port}: give them different numbers.")
        keys = {key.get_secret_value(): owner_of(key.get_secret_value().encode()) for key in self.api_keys}
        # A name of an owner's shape may be that of a key in the store: see `app.keys.check_reach`.
        wrong = [name for name in self.key_tools if name not in keys.values() and not _OWNER.fullmatch(name)]
        if keys and wrong:
            shown = "an API key itself" if wrong[0] in keys else repr(wrong[0])
            raise ValueError(
                f"key_tools names {shown}, which is no key's owner, so that it would hold nobody back. The owners of "
                f"the API keys are {', '.join(keys.values())}, in their order: name one of these, or take it out."
            )
        if unknown := sorted(set(self.outcome_trust) - {"verifier", "client", "person", "judge"}):
            raise ValueError(f"outcome_trust: {unknown[0]!r} is none of the sources verifier, client, person, judge.")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"cors_origins: {origin!r} is no origin, so no page would match: write it as a browser sends it, "
                    "https://HOST or http://HOST:PORT, in small letters and without a path."
                )
        if 2 * self.files_mb > self.python_memory_mb:
            raise ValueError(
                f"files_mb {self.files_mb} is over half of python_memory_mb {self.python_memory_mb}: a program "
                "couldn't be given its files. Lower the one or raise the other."
            )
        if self.engine == "embedded" and self.max_tokens + self.observation_tokens > self.context:
            raise ValueError(
                f"max_tokens {self.max_tokens} + observation_tokens {self.observation_tokens} leave no room for a "
                f"prompt in context {self.context}: raise context or lower one of them."
            )
        return self

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name: it may resolve to anything

    @property
    def store_path(self) -> Path:
        return self.home / "whetstone.db"

    @property
    def display_host(self) -> str:
        """The host as a person types it into a browser on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        files = [Path("~/.whetstone/whetstone.toml").expanduser(), Path("whetstone.toml")]
        if named := os.environ.get("WHETSTONE_CONFIG"):
            files.append(Path(named).expanduser())
            if not files[-1].is_file():
                raise SettingsError(f"WHETSTONE_CONFIG names {named!r}, which isn't a file: mend the path or unset it.")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, files)


def _is_secret(name: int | str) -> bool:
    field = Settings.model_fields.get(str(name))
    return field is not None and "SecretStr" in str(field.annotation)


def load(**overrides: Any) -> Settings:
    """Settings from the files and the environment; raises `SettingsError` with one line a mistake."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(name, Settings.model_fields, n=1)
                message = f"there is no such setting{f', did you mean {near[0]}?' if near else ''}"
            got = f" (got {item['input']!r})" if name and not _is_secret(item["loc"][0]) else ""
            lines.append(f"{name}: {message}{got}" if name else message)
        raise SettingsError("\n".join(lines)) from None
    except ValueError as error:  # a file that isn't TOML
        raise SettingsError(f"whetstone.toml can't be read: {error}") from error
