"""`whetstone train --dry-run`: what a recipe would cost, and what of it this build can't do."""

from __future__ import annotations

from dataclasses import asdict

from app.commands import console


def show_plan(name: str, overrides: dict[str, object], as_json: bool) -> None:
    from online_rl.plan import UnknownShape, plan
    from online_rl.recipe import RecipeError, load_recipe

    try:
        recipe = load_recipe(name, **overrides)
        made = plan(recipe)
    except (RecipeError, UnknownShape) as error:
        raise console.fail(str(error)) from None
    if as_json:
        console.print_json(asdict(made) | {"hours": made.hours, "fits": made.memory.fits})
        return
    memory = made.memory
    where = f"each of {made.gpus} GPUs" if made.gpus else "the CPU's memory"
    updates = "one update" if made.updates_per_step == 1 else f"{made.updates_per_step} updates"
    room = "" if memory.available is None else f" of {memory.available:g}: {'fits' if memory.fits else 'does NOT fit'}"
    cap = f", stopped after {made.capped_minutes:g} minutes" if made.capped_minutes is not None else ""
    rates = "by measured rates" if made.measured else "a guess, by rates that nobody has measured"
    lines = [
        ("model", f"{made.model}: {made.parameters / 1e6:,.0f} million parameters, {made.trained / 1e6:,.1f} trained"),
        ("batch", f"{made.groups} groups x {recipe.group_size} answers = {made.rollouts} rollouts, {updates}"),
        ("steps", f"{made.steps:,}{cap}"),
        ("context", f"{made.context:,} tokens at most"),
        ("tokens", f"a step {made.sampled_tokens:,} sampled, {made.trained_tokens:,} trained on; "
                   f"in all {made.total_tokens / 1e6:,.0f} million"),
        ("memory", f"GiB on {where}: weights {memory.weights:.1f}, gradients {memory.gradients:.1f}, optimizer "
                   f"{memory.optimizer:.1f}, activations {memory.activations:.1f}; engine {memory.engine_weights:.1f}, "
                   f"KV cache {memory.kv_cache:.1f}; at most {memory.peak:.1f}{room}"),
        ("hours", f"{made.hours:.1f}: rollouts {made.hours_rollouts:.1f}, training {made.hours_training:.1f}; {rates}"),
    ]  # fmt: skip
    for label, text in lines:
        console.out.print(f"[dim]{label:<8}[/] {text}", highlight=False, soft_wrap=True)
    for missing in made.missing:
        console.out.print(f"[yellow]missing[/]  {missing}", highlight=False, soft_wrap=True)
    if made.missing:
        console.out.print("This build can plan the recipe and can't run it.", style="yellow")
