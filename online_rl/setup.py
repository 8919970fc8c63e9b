"""What a recipe asks of the machines: base model, GPUs, sharding, engine, data. And what of that this build can't do.

`UNBUILT` is the one list of what is still missing. A recipe that needs any of it says so in `requires`, can be planned
(`whetstone train --recipe X --dry-run`) and is refused when it is to run; so no key is accepted and then ignored.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

EMBEDDED = "SmolLM2-135M-Instruct"
CONTEXT = 1536  # tokens of prompt, results and answer that a run gives its engine

UNBUILT: dict[str, str] = {
    "other-base": "a base model of the recipe's choice: a run trains the one that the settings serve (engine_model)",
    "full-weights": "training all weights: a version is a LoRA adapter",
    "processes": "training in more than one process, sharded by FSDP or DeepSpeed",
    "recipe-engine": "an engine of the recipe's choice: a run samples from the one that the settings name",
    "engine-sleep": "an engine that sleeps while the trainer works on its GPU",
    "mini-batches": "several optimizer steps on one batch of rollouts: there is one",
    "data-set": "training on a data set in epochs: a run claims tasks from the queue",
    "long-context": f"more than {CONTEXT:,} tokens of prompt, results and answer",
}


class Setup(BaseModel):
    """The machines and the model. Counts are of GPUs, nodes, groups or tokens, as the name says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(EMBEDDED, description="a base model's id on the hub")
    tuning: Literal["lora", "full"] = "lora"
    lora_rank: int = Field(16, ge=1)
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0, description="0: the CPU")
    gpu_gib: float = Field(80.0, gt=0, description="memory of one GPU")
    sharding: Literal["none", "fsdp", "deepspeed"] = "none"
    accelerate: str | None = Field(None, description="a configuration of online_rl/recipes/accelerate, by name")
    gradient_checkpointing: bool = False
    engine: Literal["llamacpp", "sglang"] = "llamacpp"
    engine_sleeps: bool = Field(False, description="engine and trainer take turns on the same GPUs")
    mini_batch_groups: int | None = Field(None, ge=1, description="groups in one optimizer step; None: the whole batch")
    data: str = Field("queue", description="the queue, or a set that `whetstone tasks build` makes")
    epochs: int | None = Field(None, ge=1, description="passes over the data; None: until max_steps")
    max_prompt_tokens: int | None = Field(None, ge=1)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


class Assumptions(BaseModel):
    """What a plan's hours rest on. Guesses until somebody has measured them, and written down as such."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measured: bool = Field(False, description="whether the rates below were measured, or are guesses")
    prompt_tokens: int = Field(300, ge=1, description="of a prompt, on average")
    own_tokens: int = Field(120, ge=1, description="of an answer, on average")
    observation_tokens: int = Field(60, ge=0, description="of tools' results in an answer, on average")
    draws: float = Field(2.0, ge=1, description="groups sampled for one that is mixed: dynamic sampling drops the rest")
    rollout_tokens_per_s: float = Field(220.0, gt=0, description="own tokens, of one GPU, or of the CPU")
    train_tokens_per_s: float = Field(129.0, gt=0, description="forward and backward, of one GPU, or of the CPU")


def needs(setup: Setup, max_response_tokens: int) -> set[str]:
    """The names in `UNBUILT` that a setup needs; those that have been built since aren't among them."""
    asked = {
        "other-base": setup.model != EMBEDDED,
        "full-weights": setup.tuning == "full",
        "processes": setup.gpus > 1 or setup.sharding != "none" or setup.accelerate is not None,
        "recipe-engine": setup.engine == "sglang",
        "engine-sleep": setup.engine_sleeps,
        "mini-batches": setup.mini_batch_groups is not None,
        "data-set": setup.data != "queue" or setup.epochs is not None,
        "long-context": (setup.max_prompt_tokens or 0) + max_response_tokens > CONTEXT,
    }
    return {name for name, asks in asked.items() if asks and name in UNBUILT}
