"""TAPO's trainer: TRL's GRPOTrainer with what the method adds (arXiv 2510.07038, DAPO arXiv 2503.14476).

What it adds to TRL 1.16
- Rollouts come from the product's agent and engine; groups that are all right or all wrong are replaced (rollouts.py).
- The ratio is pi_theta / pi_behaviour: the engine's own logprobs are the denominator, so a quantised or stale sampler
  is corrected for instead of taken as on-policy.
- Tool tokens are out of the loss and of the number that it is divided by.
- A step of too few mixed groups trains on those there are, its mean over their tokens; a step of none changes nothing.
- Only own tokens are projected onto the vocabulary, and micro-batches hold rollouts of like length.
- A checkpoint counts only once it is whole, and carries the place in the task stream.

What it leaves out: several updates for one batch of rollouts, rollouts on more than one training process.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import shutil
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from online_rl.checkpoints import POSITION, last_good_checkpoint, read_metrics, seal, starting_point, step_of
from online_rl.own_logprobs import OwnLogprobs, plain_frozen_head
from online_rl.recipe import Recipe
from online_rl.rewards import RewardTerms
from online_rl.rollouts import (
    Batch,
    Progress,
    Rollout,
    Score,
    TaskStream,
    describe,
    sample_batch,
)
from online_rl.step_metrics import Metrics, Tally
from online_rl.tasks.base import Task

TERMS = ("total", "outcome", "format", "overlong", "efficiency")
Sync = Callable[[PeftModel, int], Awaitable[str | None] | str | None]
"""Make the engine sample from the model's weights as of a step; may return the version's name for the record."""


class TrainingDiverged(RuntimeError):
    """A loss, gradient or reward is no longer a number. Nothing after the last good checkpoint is kept."""


@dataclass(frozen=True)
class TrainResult:
    """`steps` that the adapter has seen in all; `metrics` one a step, of this run and those that it resumed."""

    steps: int
    metrics: list[Metrics]
    final_adapter_dir: Path


def train(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    rollout: Rollout,
    score: Score,
    sync: Sync,
    run_dir: Path,
    on_step: Callable[[Metrics], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    resume: bool = False,
    loop: asyncio.AbstractEventLoop | None = None,
) -> TrainResult:
    """Train the model's LoRA adapter; blocks until `max_steps` or `max_minutes`.

    `loop` is the running event loop that `rollout` and `sync` belong to, when train is called from another thread;
    without it they run on one of its own. Metrics are appended to `run_dir/metrics.jsonl`; the adapter ends in
    `run_dir/adapter`. With `resume`, a run goes on from its last whole checkpoint, or starts where there is none.

    Raises TrainingDiverged, RolloutsFailed (the run can be resumed), ValueError for a model with nothing to train or a
    run_dir that holds another run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = starting_point(run_dir, recipe, resume)
    stream = TaskStream(tasks, recipe.seed)
    with _Caller(loop) as call:
        trainer = TAPOTrainer(
            recipe, model, tokenizer, stream, rollout, score, sync, call, run_dir, on_step, on_progress
        )
        if checkpoint is None:
            trainer.train()
        else:
            trainer.restore(checkpoint)
            if step_of(checkpoint) < recipe.max_steps:
                trainer.train(resume_from_checkpoint=str(checkpoint))
    return TrainResult(trainer.steps_done, trainer.history, _save_adapter(model, run_dir / "adapter"))


class TAPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """One optimizer step a batch of rollouts. Use `train`, which also resumes and cleans up."""

    def __init__(
        self,
        recipe: Recipe,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        stream: TaskStream,
        rollout: Rollout,
        score: Score,
        sync: Sync,
        call: Callable[[Coroutine[Any, Any, Any]], Any],
        run_dir: Path,
        on_step: Callable[[Metrics], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("the model has no trainable parameter; load its adapter with is_trainable=True")
        self.recipe, self.stream, self._policy = recipe, stream, model
        self._rollout, self._score, self._sync, self._call = rollout, score, sync, call
        self._run_dir, self._on_step, self._on_progress = run_dir, on_step, on_progress
        self.history: list[Metrics] = []
        self.steps_done = 0
        self._synced: int | None = None
        self._version: str | None = None
        self._batch = Batch()
        self._own: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self._tally = Tally()
        self._skipped = 0
        self._elapsed = 0.0
        self._began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(
                model=model,
                reward_funcs=[_reward(name) for name in TERMS],
                args=_config(recipe, run_dir),
                # TRL wants a table of prompts; ours come from the stream, so these rows only count the steps
                train_dataset=Dataset.from_dict({"prompt": [""] * (recipe.groups_per_step * recipe.max_steps)}),
                processing_class=tokenizer,
                callbacks=[_TimeLimit(self)],
                rollout_func=lambda prompts, trainer: self._sampled(),
            )
        self.remove_callback(PrinterCallback)
        self.current_gradient_accumulation_steps = 1  # training_step accumulates by itself

    # -- sampling

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Sample a batch, then accumulate the gradient of its token mean over the micro-batches."""
        model.train()
        self._tally = Tally()
        self._collect()
        began = time.perf_counter()
        loss = torch.zeros((), device=self.args.device)
        if self._batch.groups:
            for micro_batch in self._micro_batches(self._generate_and_score_completions([])):
                loss = loss + super().training_step(model, micro_batch, num_items_in_batch)
        else:
            self._skipped += 1  # no gradient, so the optimizer leaves weights and moments alone
        self._tally.update_s = time.perf_counter() - began
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return generation_batch  # training_step hands over micro-batches that are ready

    def _collect(self) -> None:
        """The next batch of rollouts, by the weights as they are now."""
        step, began = self.state.global_step, time.perf_counter()
        if self._synced != step:
            self._version = self._call(_awaited(self._sync(self._policy, step)))
            self._synced = step
        self._tally.sync_s = time.perf_counter() - began
        self._batch = self._call(sample_batch(self.stream, self.recipe, self._rollout, self._score, self._on_progress))
        for group in self._batch.sampled:
            for terms in group.terms:
                if not math.isfinite(terms.total):
                    raise TrainingDiverged(f"the reward of task {group.task.id} is {terms.total} at step {step}")

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's padding, rewards and advantages over the groups at hand, whatever rows the data loader drew."""
        groups = self._batch.groups
        output: dict[str, Any] = super()._generate_and_score_completions(
            [{"prompt": group.task.question} for group in groups for _ in group.trajectories]
        )
        # The ratio's denominator: what the sampler thought. Tool tokens and padding are 0 and masked.
        output["old_per_token_logps"] = output.pop("sampling_per_token_logps") * output["tool_mask"]
        if self.recipe.denominator == "all":
            output["num_items_in_batch"] = output["completion_mask"].sum()
        return output

    def _sampled(self) -> dict[str, list[Any]]:
        """The batch in the shape of TRL's rollout_func."""
        trajectories = [t for group in self._batch.groups for t in group.trajectories]
        # A policy that says nothing at all leaves no token; a masked one stands in, since TRL needs a last token.
        silent = self._tokenizer.pad_token_id
        return {
            "prompt_ids": [t.prompt_ids for t in trajectories],
            "completion_ids": [t.completion_ids or [silent] for t in trajectories],
            "logprobs": [t.logprobs or [0.0] for t in trajectories],
            "env_mask": [t.mask or [0] for t in trajectories],
            "terms": [terms for group in self._batch.groups for terms in group.terms],
        }

    def _micro_batches(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of like length together, each micro-batch cut to its own longest prompt and completion."""
        prompts, completions = batch["prompt_mask"].sum(1), batch["completion_mask"].sum(1)
        order = torch.argsort(prompts + completions, descending=True, stable=True)
        cut = []
        for rows in order.split(self.recipe.micro_batch):
            before, after = int(prompts[rows].max()), int(completions[rows].max())
            micro = {}
            for key, value in batch.items():
                if value.ndim == 0:
                    micro[key] = value
                elif key.startswith("prompt_"):
                    micro[key] = value[rows, value.shape[1] - before :]
                else:
                    micro[key] = value[rows] if value.ndim == 1 else value[rows, :after]
            cut.append(micro)
        return cut

    # -- loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._own = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        loss: Tensor = super()._compute_loss(model, inputs)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {loss.item()}")
        assert self._seen is not None, "set by _get_per_token_logps_and_entropies"
        self._tally.add(*self._seen, inputs, self.recipe)
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logprobs and entropies (B, C) of the completion; on CPU of own tokens only, the rest being 0."""
        own = self._own
        assert own is not None, "set by _compute_loss"
        if model is not self.model or not plain_frozen_head(self._policy):
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
            self._seen = logps.detach(), entropies.detach()
            return logps, entropies, aux_loss
        policy: Any = self._policy.get_base_model()
        head = policy.get_output_embeddings()
        with self.accelerator.autocast():
            hidden = policy.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state[:, -logits_to_keep - 1 : -1]  # the position before a token predicts it
            targets = input_ids[:, -logits_to_keep:]
            flat = OwnLogprobs.apply(hidden[own], head.weight, targets[own])
        blank = torch.zeros(own.shape, device=own.device)
        logps, entropies = (blank.masked_scatter(own, values) for values in flat)
        self._seen = logps.detach(), entropies
        return logps, entropies, None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up, then constant. transformers' own begins at 0, which would waste the first step's rollouts."""
        if self.lr_scheduler is None:
            steps = self.recipe.warmup_steps + 1
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or cast(Any, self.optimizer), lambda step: min(1.0, (step + 1) / steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            raise self._diverged(f"the gradient's norm is {float(norm)}")
        return norm

    def _diverged(self, what: str) -> TrainingDiverged:
        checkpoint = last_good_checkpoint(self._run_dir)
        return TrainingDiverged(
            f"{what} at step {self.state.global_step}, before its update; "
            + (f"the last good checkpoint is {checkpoint.name}; " if checkpoint else "there is no checkpoint yet; ")
            + f"try a learning_rate below {self.recipe.learning_rate}"
        )

    # -- record

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._record(logs)
        super().log(logs, start_time)

    def _record(self, logs: dict[str, float]) -> None:
        step = self.steps_done = self.state.global_step
        elapsed = self.elapsed_s
        left = (self.recipe.max_steps - step) * elapsed / step
        if self.recipe.max_minutes is not None:
            left = max(0.0, min(left, self.recipe.max_minutes * 60 - elapsed))
        metrics: Metrics = {
            "step": step,
            "version": self._version,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm", 0.0),
            "learning_rate": logs["learning_rate"],
            **describe(self._batch),
            **self._tally.means(),
            "steps_skipped": self._skipped,
            "elapsed_s": round(elapsed, 1),
            "eta_s": round(left, 1),
        }
        self.history.append(metrics)
        with (self._run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self._on_step is not None:
            self._on_step(metrics)

    @property
    def elapsed_s(self) -> float:
        return self._elapsed + time.perf_counter() - self._began

    # -- checkpoints

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The manifest of a version says more than TRL's card."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = self._run_dir / f"checkpoint-{self.state.global_step}"
        position = {
            "drawn": self.stream.drawn,
            "skipped": self._skipped,
            "elapsed_s": self.elapsed_s,
            "recipe": self.recipe.model_dump(),
        }
        (folder / POSITION).write_text(json.dumps(position, indent=1), encoding="utf-8")
        seal(folder)

    def restore(self, checkpoint: Path) -> None:
        """Take up the weights, the place in the stream and the record; `train` restores the rest of the state."""
        position = json.loads((checkpoint / POSITION).read_text(encoding="utf-8"))
        self.stream.drawn = position["drawn"]
        self._skipped = position["skipped"]
        self._elapsed = position["elapsed_s"]
        self.steps_done = step_of(checkpoint)
        self.history = read_metrics(self._run_dir / "metrics.jsonl", up_to=self.steps_done)
        self._load_from_checkpoint(str(checkpoint))


class _TimeLimit(TrainerCallback):  # type: ignore[misc]
    """Ends training, with a checkpoint, after the step that passes the recipe's max_minutes."""

    def __init__(self, trainer: TAPOTrainer) -> None:
        self._trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        limit = self._trainer.recipe.max_minutes
        if limit is not None and self._trainer.elapsed_s > limit * 60:
            control.should_training_stop = control.should_save = True
        return control


class _Caller:
    """Runs coroutines to their end from this thread: on the loop given, which runs elsewhere, or on one of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop
        self._runner = asyncio.Runner() if loop is None else None

    def __enter__(self) -> _Caller:
        return self

    def __exit__(self, *error: object) -> None:
        if self._runner is not None:
            self._runner.close()

    def __call__(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._runner is not None:
            return self._runner.run(coroutine)
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _save_adapter(model: PeftModel, folder: Path) -> Path:
    draft = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(str(draft))
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def _config(recipe: Recipe, run_dir: Path) -> GRPOConfig:
    with warnings.catch_warnings():
        # TRL's default is on, by the name that transformers calls deprecated; the new name alone can't switch it off
        warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
        return _grpo_config(recipe, run_dir)


def _grpo_config(recipe: Recipe, run_dir: Path) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(run_dir),
        # One TRL "batch" is the whole step: training_step cuts it into micro-batches itself
        per_device_train_batch_size=recipe.rollouts_per_step,
        gradient_accumulation_steps=1,
        num_generations=recipe.group_size,
        max_completion_length=recipe.max_response_tokens,
        loss_type="dapo",
        beta=0.0,
        scale_rewards="group",
        reward_weights=[1.0] + [0.0] * (len(TERMS) - 1),  # the other terms are logged; `total` already holds them
        epsilon=recipe.epsilon_low,
        epsilon_high=recipe.epsilon_high,
        temperature=1.0,  # the engine's logprobs are the policy's own, before temperature; so must the trainer's be
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        max_steps=recipe.max_steps,
        bf16=recipe.bf16,
        gradient_checkpointing=False,
        disable_dropout=True,  # the ratio compares two policies, not two dropout masks
        shuffle_dataset=False,
        ignore_data_skip=True,
        seed=recipe.seed,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=recipe.keep_checkpoints,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )


def _reward(name: str) -> Callable[..., list[float | None]]:
    def term(terms: list[RewardTerms], **_: object) -> list[float | None]:
        return [float(getattr(one, name)) for one in terms]

    term.__name__ = name
    return term


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
