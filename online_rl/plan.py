"""The plan of a run before it costs anything: batch, tokens, memory per GPU, hours, and what is missing.

Memory is counted, in bytes, from the model's shapes (P parameters, of which T are trained, S shards):

    weights      2 P / S frozen (bf16), and 4 T / S for the trained ones' float32 masters
    gradients    4 T / S
    optimizer    8 T / S                          Adam's two moments in float32
    activations  tokens x (2 h L + 34 h)          with recomputation: a layer's input each, and one layer in full
                 tokens x 34 h L                  without (arXiv 2205.05198, eq. 2, but no attention map)
    logits       tokens x 6 V                     bf16 and its float32 copy
    engine       2 P, and 4 L K D bytes of KV cache a token of every rollout in flight on the GPU

where h is the hidden size, L layers, V the vocabulary, K key-value heads of D. `tokens` are those of one micro-batch at
its full length. An engine that sleeps gives its memory back, so the GPU holds the larger of the two; else their sum.
Fragmentation and CUDA's own gigabyte or so come on top: a plan fits when it leaves a tenth of the GPU free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from online_rl.recipe import Recipe
from online_rl.setup import CONTEXT, EMBEDDED, Setup

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """What memory is counted from. `bias`: of the query, key and value projections."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool
    bias: bool

    @property
    def parameters(self) -> int:
        embedding = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embedding + self.layers * self.layer + self.hidden

    @property
    def layer(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * q + 2 * kv) + (q + 2 * kv if self.bias else 0)
        return attention + 3 * self.hidden * self.inner + 2 * self.hidden

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter on all linear layers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + q) + 2 * (self.hidden + kv)
        return self.layers * rank * (attention + 3 * (self.hidden + self.inner))


QWEN_3B = Shape(2048, 36, 16, 2, 128, 11_008, 151_936, tied=True, bias=True)
QWEN_7B = Shape(3584, 28, 28, 4, 128, 18_944, 152_064, tied=False, bias=True)
SHAPES: dict[str, Shape] = {
    EMBEDDED: Shape(576, 30, 9, 3, 64, 1_536, 49_152, tied=True, bias=False),
    "Qwen/Qwen2.5-3B": QWEN_3B,
    "Qwen/Qwen2.5-3B-Instruct": QWEN_3B,
    "Qwen/Qwen2.5-7B": QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
}


class UnknownShape(ValueError):
    """No plan can be made for a model whose shapes aren't known."""


@dataclass(frozen=True)
class Memory:
    """GiB on one GPU, or on the machine where there is none. `peak` is what has to fit."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    engine_weights: float
    kv_cache: float
    peak: float
    available: float | None

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.peak <= 0.9 * self.available


@dataclass(frozen=True)
class Plan:
    """Tokens are of one step unless named otherwise; hours rest on the recipe's assumptions."""

    model: str
    parameters: int
    trained: int
    gpus: int
    groups: int
    rollouts: int
    updates_per_step: int
    steps: int
    context: int
    sampled_tokens: int
    trained_tokens: int
    total_tokens: int
    memory: Memory
    hours_rollouts: float
    hours_training: float
    capped_minutes: float | None
    measured: bool
    missing: list[str]

    @property
    def hours(self) -> float:
        hours = self.hours_rollouts + self.hours_training
        return hours if self.capped_minutes is None else min(hours, self.capped_minutes / 60)


def plan(recipe: Recipe) -> Plan:
    """Raises UnknownShape, which names the models that are known."""
    setup, guess = recipe.setup or Setup.model_validate({}), recipe.assumptions
    shape = SHAPES.get(setup.model)
    if shape is None:
        raise UnknownShape(
            f"the shapes of {setup.model!r} aren't known: add them to SHAPES, or plan {', '.join(SHAPES)}"
        )
    trained = shape.parameters if setup.tuning == "full" else shape.adapter(setup.lora_rank)
    workers = max(1, setup.gpus)
    sampled = round(recipe.rollouts_per_step * guess.draws) * guess.own_tokens
    learnt = recipe.rollouts_per_step * (guess.prompt_tokens + guess.own_tokens + guess.observation_tokens)
    rollouts_s = recipe.max_steps * sampled / (guess.rollout_tokens_per_s * workers)
    training_s = recipe.max_steps * learnt / (guess.train_tokens_per_s * workers)
    return Plan(
        model=setup.model,
        parameters=shape.parameters,
        trained=trained,
        gpus=setup.gpus,
        groups=recipe.groups_per_step,
        rollouts=recipe.rollouts_per_step,
        updates_per_step=recipe.groups_per_step // (setup.mini_batch_groups or recipe.groups_per_step),
        steps=recipe.max_steps,
        context=context_of(recipe, setup),
        sampled_tokens=sampled,
        trained_tokens=learnt,
        total_tokens=recipe.max_steps * (sampled + learnt),
        memory=memory(recipe, setup, shape, trained),
        hours_rollouts=rollouts_s / 3600,
        hours_training=training_s / 3600,
        capped_minutes=recipe.max_minutes,
        measured=guess.measured,
        missing=recipe.missing,
    )


def context_of(recipe: Recipe, setup: Setup) -> int:
    """Tokens of the longest trajectory: prompt, own tokens, and a result for every turn."""
    if setup.max_prompt_tokens is None:
        return CONTEXT
    return setup.max_prompt_tokens + recipe.max_response_tokens + recipe.max_turns * recipe.max_observation_tokens


def memory(recipe: Recipe, setup: Setup, shape: Shape, trained: int) -> Memory:
    """By the formula at the head of this file."""
    shards = setup.gpus if setup.sharding != "none" else 1
    on_cpu = setup.gpus == 0
    frozen = 0 if setup.tuning == "full" else (4 if on_cpu else 2) * shape.parameters
    tokens = recipe.micro_batch * context_of(recipe, setup)
    per_token = 34 * shape.hidden * shape.layers
    if setup.gradient_checkpointing:
        per_token = 2 * shape.hidden * shape.layers + 34 * shape.hidden
    weights = (frozen + 4 * trained) / shards + (2 * shape.layer if shards > 1 else 0)
    gradients, optimizer = 4 * trained / shards, 8 * trained / shards
    activations = tokens * (per_token + 6 * shape.vocabulary)
    in_flight = math.ceil(recipe.concurrency / max(1, setup.gpus))
    kv_token = 4 * shape.layers * shape.kv_heads * shape.head_dim
    engine, kv_cache = 2 * shape.parameters, in_flight * context_of(recipe, setup) * kv_token
    training, serving = weights + gradients + optimizer + activations, engine + kv_cache
    peak = max(training, serving) if setup.engine_sleeps else training + serving
    return Memory(
        weights=weights / GIB,
        gradients=gradients / GIB,
        optimizer=optimizer / GIB,
        activations=activations / GIB,
        engine_weights=engine / GIB,
        kv_cache=kv_cache / GIB,
        peak=peak / GIB,
        available=None if on_cpu else setup.gpu_gib,
    )
