"""A recipe: every knob of a training run, typed, from a YAML file beside this module or anywhere else.

The objective itself is no knob. It is DAPO's (arXiv 2503.14476, eq. 8) as TAPO uses it (arXiv 2510.07038): token-mean
loss, asymmetric clip, group advantages, no KL and no entropy bonus.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from online_rl.setup import UNBUILT, Assumptions, Setup, needs

RECIPES = Path(__file__).parent / "recipes"
ToolResults = Literal["live", "recorded_first", "recorded"]
_NAMES = tuple(UNBUILT)


class RecipeError(ValueError):
    """A recipe can't be found or read. The message names the key, the value and the way out."""


class Recipe(BaseModel):
    """Counts are of groups, rollouts, own tokens or optimizer steps, as the name says; times are seconds or minutes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # -- the batch: groups_per_step x group_size rollouts make one optimizer step
    group_size: int = Field(8, ge=2)
    groups_per_step: int = Field(4, ge=1)
    max_rounds: int = Field(10, ge=1, description="a step draws at most so many times groups_per_step")
    max_steps: int = Field(100, ge=1)
    max_minutes: float | None = Field(None, gt=0, description="stop after the step that passes this; None: never")
    seed: int = Field(0, ge=0)

    # -- sampling
    temperature: float = Field(1.0, gt=0)
    concurrency: int = Field(16, ge=1, description="rollouts in flight at once: the engine's slots")
    max_turns: int = Field(4, ge=0, description="tool calls in one answer; then a last generation with tools off")
    max_response_tokens: int = Field(512, ge=1, description="own tokens in one answer")
    max_observation_tokens: int = Field(256, ge=1, description="tokens of one tool result")
    rollout_timeout_s: float = Field(120, gt=0)
    tool_results: ToolResults = Field(
        "live",
        description="where results of tools other than Python come from: the tools, the record and then the tools, or "
        "the record alone, with no network",
    )

    # -- reward
    overlong_buffer: int = Field(128, ge=0, description="own tokens before the limit in which the reward falls")
    tool_efficiency: bool = Field(False, description="OTC's multiplicative term for few calls (arXiv 2504.14870)")

    # -- update
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    epsilon_low: float = Field(0.2, gt=0, lt=1)
    epsilon_high: float = Field(0.28, gt=0)
    denominator: Literal["own", "all"] = Field(
        "own", description="tokens that the mean is over; `all` counts the tools' too, as the paper's public code does"
    )
    micro_batch: int = Field(8, ge=1, description="rollouts in one forward pass; bounds memory, changes nothing else")
    bf16: bool = True

    # -- the record
    save_steps: int = Field(10, ge=1)
    keep_checkpoints: int = Field(2, ge=2, description="two at least: one must be whole while the next is written")

    # -- the machines; None: the embedded model on this machine's CPU
    setup: Setup | None = None
    assumptions: Assumptions = Field(
        default_factory=lambda: Assumptions.model_validate({}), exclude=True, description="of a plan's hours"
    )
    requires: tuple[str, ...] = Field((), exclude=True, description="what this recipe needs that isn't built yet")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.overlong_buffer >= self.max_response_tokens:
            raise ValueError(
                f"overlong_buffer ({self.overlong_buffer}) must be below max_response_tokens "
                f"({self.max_response_tokens}): it is the last part of it"
            )
        if unknown := sorted(set(self.requires) - set(_NAMES)):
            raise ValueError(f"requires names {unknown[0]!r}, which is none of {', '.join(_NAMES)}")
        if self.setup is not None:
            missing = needs(self.setup, self.max_response_tokens)
            if unsaid := sorted(missing - set(self.requires)):
                raise ValueError(
                    f"setup needs {', '.join(unsaid)}, which this build hasn't: add it to requires, so that the recipe "
                    f"can be planned, or change setup ({UNBUILT[unsaid[0]]})"
                )
            mini = self.setup.mini_batch_groups
            if mini is not None and self.groups_per_step % mini:
                raise ValueError(f"mini_batch_groups ({mini}) must divide groups_per_step ({self.groups_per_step})")
        return self

    @property
    def missing(self) -> list[str]:
        """What of `requires` this build hasn't, each as a phrase; a recipe with none of it can run."""
        return [UNBUILT[name] for name in self.requires if name in UNBUILT]

    def check_runnable(self, name: str) -> None:
        """Raises RecipeError with all that is missing."""
        if self.missing:
            raise RecipeError(
                f"the recipe {name} can't run with this build, which hasn't: {'; '.join(self.missing)}. "
                f"`whetstone train --recipe {name} --dry-run` shows its plan; embedded-cpu runs."
            )

    @property
    def rollouts_per_step(self) -> int:
        return self.groups_per_step * self.group_size


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, **overrides: object) -> Recipe:
    """A recipe of this package by name (`embedded-cpu`) or any YAML file by path; `overrides` replace single keys.

    `extends: NAME` in a file begins with that recipe's keys; those of `setup` and `assumptions` are replaced singly.
    Raises RecipeError: no such recipe, not YAML, an unknown key (named, with the nearest known one), a bad value.
    """
    path = _find(name_or_path)
    return make_recipe(_content(path, ()) | overrides, source=str(path))


def _content(path: Path, below: tuple[Path, ...]) -> dict[str, object]:
    """The keys of a file, over those of the recipe that it extends."""
    if path.resolve() in below:
        raise RecipeError(f"recipe {path} extends itself")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} isn't YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} must be a mapping of keys to values, not a {type(content).__name__}")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    base = _content(_find(str(parent)), (*below, path.resolve()))
    for key in ("setup", "assumptions"):
        if isinstance(base.get(key), dict) and isinstance(content.get(key), dict):
            content[key] = {**base[key], **content[key]}  # type: ignore[dict-item]
    return base | content


def make_recipe(values: dict[str, object], source: str = "recipe") -> Recipe:
    """A recipe from plain values; an error names every key that is wrong."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_explain(item["loc"], item["type"], item["msg"], item["input"]) for item in error.errors()]
        raise RecipeError(f"{source}: " + "; ".join(problems)) from error


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        if path.is_file():
            return path
        raise RecipeError(f"no recipe file {path}; recipes of this package: {', '.join(recipe_names())}")
    named = RECIPES / f"{name_or_path}.yaml"
    if named.is_file():
        return named
    raise RecipeError(f"no recipe {str(name_or_path)!r}; there are: {', '.join(recipe_names())}, or give a YAML file")


def _explain(loc: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    key = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        part: dict[str, type[BaseModel]] = {"setup": Setup, "assumptions": Assumptions}
        model = part.get(str(loc[0]), Recipe) if len(loc) > 1 else Recipe
        near = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1, cutoff=0.0)
        return f"unknown key {key!r}; the nearest known one is {near[0]!r}"
    return f"{key} = {value!r}: {message}" if key else message
