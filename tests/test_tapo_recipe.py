"""Recipes: what ships loads, and what is misspelt is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from online_rl.recipe import Recipe, RecipeError, load_recipe, recipe_names


def test_every_recipe_that_ships_loads():
    assert "embedded-cpu" in recipe_names()
    for name in recipe_names():
        assert isinstance(load_recipe(name), Recipe)


def test_the_embedded_recipe_is_dapo_on_two_cores():
    recipe = load_recipe("embedded-cpu")
    assert (recipe.epsilon_low, recipe.epsilon_high, recipe.max_rounds, recipe.temperature) == (0.2, 0.28, 10, 1.0)
    assert (recipe.max_grad_norm, recipe.weight_decay, recipe.denominator) == (1.0, 0.1, "own")
    assert recipe.rollouts_per_step == 32


def test_a_recipe_by_path_and_single_keys_over_it(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("group_size: 4\nseed: 7\n")
    recipe = load_recipe(file, seed=8)
    assert (recipe.group_size, recipe.seed, recipe.groups_per_step) == (4, 8, Recipe().groups_per_step)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rte: 1", "unknown key 'learning_rte'; the nearest known one is 'learning_rate'"),
        ("group_size: 1", "group_size = 1: .*greater than or equal to 2"),
        ("denominator: tools", "denominator = 'tools': .*'own' or 'all'"),
        ("max_steps: many", "max_steps = 'many': .*integer"),
        ("max_response_tokens: 100\noverlong_buffer: 100", r"overlong_buffer \(100\) must be below"),
        ("- a list", "must be a mapping"),
        ("a: [", "isn't YAML"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(tmp_path: Path, content: str, message: str):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_a_recipe_that_does_not_exist_is_told_what_does(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"no recipe 'embeded-cpu'; there are: .*embedded-cpu"):
        load_recipe("embeded-cpu")
    with pytest.raises(RecipeError, match=r"no recipe file .*nope.yaml"):
        load_recipe(tmp_path / "nope.yaml")
