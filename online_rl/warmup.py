"""The warm start: teaches the base model the dialect, by supervised training on demonstrations.

`whetstone warmup` makes demonstrations of generated tasks (arithmetic with Python, look-ups with search, plain
questions with no tool) by running the real tools, and trains a LoRA adapter on the policy's own tokens only.
`v0`, which ships with Whetstone, is what it made with the defaults. Reinforcement learning starts where it ends.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from online_rl import verifiers
from online_rl.adapters import fresh_adapter, save_adapter, save_version
from online_rl.memory import keep_freed_memory, return_freed_memory
from online_rl.tasks.base import Task
from online_rl.tasks.generated import generate
from serving.agent import Agent, Limits
from serving.dialects.tapo import TapoDialect
from serving.manifest import Manifest
from serving.model import BaseModel
from serving.trajectory import ActionKind
from tools.toolbox import Toolbox


@dataclass(frozen=True)
class WarmupConfig:
    """How many demonstrations of each kind, and how to train on them. `rank` and `alpha` are the adapter's."""

    arithmetic: tuple[int, int, int] = (110, 160, 110)  # by level
    lookup: int = 220
    plain: int = 120
    earlier_turn: float = 0.15  # share of demonstrations that follow an earlier exchange
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3
    batch: int = 8
    epochs: float = 1.0
    seed: int = 0


Action = tuple[str, ActionKind, str]  # thought, action, input

_CALCULATE = ("I need to calculate this.", "Python can compute this exactly.", "I will compute this with Python.")
_LOOK_UP = ("I should look this up.", "I need to search for this fact.", "A search will tell.")
_KNOW = ("I can answer this directly.", "No tool is needed here.")
_FOUND = ("The result is {}.", "That gives {}.", "The answer is {}.")


def tool_action(task: Task, rng: random.Random) -> Action | None:
    """The tool action that the task asks for; None for plain ones."""
    if task.kind == "plain":
        return None
    if task.kind == "arithmetic":
        return rng.choice(_CALCULATE), "code", f"print({task.meta['expression']})"
    (fact,) = json.loads(task.meta["facts"])
    return rng.choice(_LOOK_UP), "search", f"{fact['relation']} of {fact['subject']}"


async def encode(
    task: Task, agent: Agent, rng: random.Random, earlier: Task | None = None
) -> tuple[list[int], list[int]] | None:
    """(input_ids, labels) of one demonstration, tools run for real; labels are -100 off the policy's own tokens.

    None when the tool didn't bring what the gold answer rests on: such a demonstration would teach guessing.
    """
    messages = list(task.messages)
    if earlier is not None:
        messages = [*earlier.messages, {"role": "assistant", "content": earlier.meta.get("reply") or earlier.gold},
                    *messages]  # fmt: skip
    dialect = agent.dialect
    ids = agent.render(messages)
    labels = [-100] * len(ids)
    answer: Action = (rng.choice(_KNOW), "answer", task.meta.get("reply", ""))
    if (use := tool_action(task, rng)) is not None:
        own = dialect.encode_step(*use)
        observation = await agent.run_tool(use[1], use[2])
        found = observation.text.strip() if task.kind == "arithmetic" else task.gold
        if observation.error or found not in observation.text or not right(task, found):
            return None
        answer = (rng.choice(_FOUND).format(found), "answer", found)
        seen = dialect.encode_observation(observation.text)
        ids, labels = ids + own + seen, labels + own + [-100] * len(seen)
    own = dialect.encode_step(*answer)
    return ids + own, labels + own


def right(task: Task, answer: str) -> bool:
    return verifiers.get(task.verifier).score(task.gold, answer).right


def tasks(config: WarmupConfig) -> list[Task]:
    """The demonstrations' tasks: from the train split, so that held-out ones stay unseen."""
    chosen: list[Task] = []
    for level, count in enumerate(config.arithmetic, start=1):
        chosen += generate("arithmetic", count, config.seed, "train", level=level)
    chosen += generate("lookup", config.lookup, config.seed, "train")
    chosen += generate("plain", config.plain, config.seed, "train")
    random.Random(config.seed).shuffle(chosen)
    return chosen


def run(
    base: BaseModel,
    toolbox: Toolbox,
    folder: Path,
    work: Path,
    config: WarmupConfig | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Manifest:
    """Make the version `folder` by supervised training from the bare base model.

    `work` keeps checkpoints. `progress(phase, done, total)`. About a quarter of an hour on two cores.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback, set_seed
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config = config or WarmupConfig()
    set_seed(config.seed)
    keep_freed_memory()
    rows = asyncio.run(_demonstrations(base, toolbox, config, progress))
    model = fresh_adapter(base, config.rank, config.alpha)

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            return_freed_memory()
            progress("training", state.global_step, state.max_steps)

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(work),
            per_device_train_batch_size=config.batch,
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            max_grad_norm=1.0,
            train_sampling_strategy="group_by_length",
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,  # the base is bfloat16 and the adapter float32 already
            gradient_checkpointing=False,
            max_length=None,
            seed=config.seed,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows]),
        processing_class=base.tokenizer,
        callbacks=[Report()],
    )
    trainer.train()
    return save_version(
        lambda work: save_adapter(trainer.model, work),
        folder,
        base,
        parent=None,
        recipe={"warmup": asdict(config), "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h]},
        seed=config.seed,
        command=f"whetstone warmup --seed {config.seed}",
    )


async def _demonstrations(
    base: BaseModel, toolbox: Toolbox, config: WarmupConfig, progress: Callable[[str, int, int], None]
) -> list[tuple[list[int], list[int]]]:
    agent = Agent(_NoEngine(), TapoDialect(base.tokenizer), toolbox, Limits())
    rng = random.Random(config.seed)
    chosen = tasks(config)
    rows = []
    for done, task in enumerate(chosen, start=1):
        earlier = rng.choice(chosen) if rng.random() < config.earlier_turn else None
        if (row := await encode(task, agent, rng, earlier)) is not None:
            rows.append(row)
        progress("demonstrations", done, len(chosen))
    return rows


class _NoEngine:
    """Demonstrations are written, not generated; rendering only asks how long a context may be."""

    context_length = 2048

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"The warm start has no engine (asked for {name!r}).")
