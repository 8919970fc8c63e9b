"""Recipes for machines that aren't here: each loads, is planned with numbers that add up, and is refused by name."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from typer.testing import CliRunner

from app.cli import app
from online_rl import loop
from online_rl.plan import GIB, SHAPES, UnknownShape, plan
from online_rl.recipe import RECIPES, RecipeError, load_recipe, make_recipe, recipe_names
from online_rl.setup import CONTEXT, UNBUILT

ROOT = Path(__file__).parents[1]
ACCELERATE = RECIPES / "accelerate"
run = CliRunner()


def test_the_paper_s_settings_are_there():
    for size in ("3b", "7b"):
        for kind in ("", "-instruct"):
            one, two = (load_recipe(f"tapo-{size}{kind}-{nodes}x8") for nodes in (1, 2))
            assert one.setup is not None
            assert two.setup is not None
            assert one.setup.model == two.setup.model == f"Qwen/Qwen2.5-{size.upper()}{'-Instruct' if kind else ''}"
            assert (one.groups_per_step, one.setup.mini_batch_groups, one.group_size) == (64, 16, 4)
            assert (two.groups_per_step, two.setup.mini_batch_groups, two.group_size) == (128, 32, 8)
            assert (one.max_response_tokens, one.setup.max_prompt_tokens) == (2048, 2048)
            assert (two.max_response_tokens, two.setup.max_prompt_tokens) == (8192, 8192)
            for recipe in (one, two):
                assert (recipe.learning_rate, recipe.warmup_steps, recipe.weight_decay) == (1e-6, 10, 0.1)
                assert (recipe.epsilon_low, recipe.epsilon_high, recipe.max_rounds) == (0.2, 0.28, 10)
                assert (recipe.max_grad_norm, recipe.temperature, recipe.overlong_buffer) == (1.0, 1.0, 1024)
                assert (recipe.max_turns, recipe.max_observation_tokens, recipe.tool_efficiency) == (4, 2048, False)
                assert recipe.setup is not None
                assert recipe.setup.epochs == 2


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_planned_and_fits_its_gpus(name):
    result = run.invoke(app, ["train", "--recipe", name, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    recipe = load_recipe(name)
    assert told["rollouts"] == recipe.group_size * recipe.groups_per_step
    assert told["hours"] > 0
    assert told["fits"] in (True, None)
    assert told["missing"] == [UNBUILT[need] for need in recipe.requires]
    memory = told["memory"]
    training = memory["weights"] + memory["gradients"] + memory["optimizer"] + memory["activations"]
    serving = memory["engine_weights"] + memory["kv_cache"]
    sleeps = recipe.setup is not None and recipe.setup.engine_sleeps
    assert memory["peak"] == pytest.approx(max(training, serving) if sleeps else training + serving)


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).requires])
def test_a_recipe_that_needs_what_isnt_built_is_refused_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WHETSTONE_HOME", str(tmp_path / "home"))
    result = run.invoke(app, ["train", "--once", "--recipe", name])
    told = " ".join(result.output.split())
    assert result.exit_code == 1
    assert f"the recipe {name} can't run with this build" in told
    assert all(phrase in told for phrase in load_recipe(name).missing)
    assert not (tmp_path / "home").exists()


def test_shapes_give_the_published_numbers_of_parameters():
    assert {name: shape.parameters for name, shape in SHAPES.items()} == {
        "SmolLM2-135M-Instruct": 134_515_008,
        "Qwen/Qwen2.5-3B": 3_085_938_688,
        "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
        "Qwen/Qwen2.5-7B": 7_615_616_512,
        "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    }


def test_memory_follows_the_formula_worked_by_hand():
    recipe = load_recipe("tapo-3b-1x8")
    memory = plan(recipe).memory
    p = 3_085_938_688
    tokens = 2 * (2048 + 2048 + 4 * 2048)
    assert memory.weights * GIB == pytest.approx(4 * p / 8 + 2 * 77_076_992)
    assert memory.gradients * GIB == pytest.approx(4 * p / 8)
    assert memory.optimizer * GIB == pytest.approx(8 * p / 8)
    assert memory.activations * GIB == pytest.approx(tokens * (2 * 2048 * 36 + 34 * 2048 + 6 * 151_936))
    assert memory.kv_cache * GIB == pytest.approx(32 * 12_288 * 4 * 36 * 2 * 128)


def test_an_adapter_is_counted_as_peft_counts_it():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES["SmolLM2-135M-Instruct"]
    config = LlamaConfig(
        vocab_size=64, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=2,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, tie_word_embeddings=True,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted * shape.layers // 2 == shape.adapter(8)


def test_hours_follow_from_the_assumptions():
    recipe = make_recipe(
        {"group_size": 2, "groups_per_step": 5, "max_steps": 36, "assumptions": {
            "prompt_tokens": 50, "own_tokens": 100, "observation_tokens": 50, "draws": 2.0,
            "rollout_tokens_per_s": 20, "train_tokens_per_s": 10}}
    )  # fmt: skip
    made = plan(recipe)
    assert (made.sampled_tokens, made.trained_tokens) == (2000, 2000)
    assert (made.hours_rollouts, made.hours_training) == (1.0, 2.0)
    assert plan(recipe.model_copy(update={"max_minutes": 30.0})).hours == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("setup: {tuning: full}", "setup needs full-weights, which this build hasn't: add it to requires"),
        ("setup: {tunning: full}", "unknown key 'setup.tunning'; the nearest known one is 'tuning'"),
        ("setup: {gpus_per_node: 8}\nrequires: [process]", "requires names 'process', which is none of"),
        ("setup: {mini_batch_groups: 3}\nrequires: [mini-batches]", r"mini_batch_groups \(3\) must divide"),
        ("extends: nowhere", "no recipe 'nowhere'"),
        ("extends: ./bad.yaml", "extends itself"),
        ("assumptions: {draws: 0.5}", "assumptions.draws = 0.5"),
    ],
)
def test_a_setup_that_would_be_ignored_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe("./bad.yaml")


def test_a_recipe_takes_single_keys_over_another_s(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: tapo-7b-1x8\ngroup_size: 6\nsetup: {nodes: 1, gpu_gib: 40}\n")
    recipe = load_recipe(file)
    assert recipe.setup is not None
    assert (recipe.group_size, recipe.setup.gpu_gib, recipe.setup.model) == (6, 40, "Qwen/Qwen2.5-7B")


def test_a_model_of_unknown_shape_is_named():
    with pytest.raises(UnknownShape, match=r"'some/model' aren't known"):
        plan(make_recipe({"setup": {"model": "some/model"}, "requires": ["other-base"]}))


def test_what_a_run_is_resumed_by_has_neither_guesses_nor_gaps():
    assert not {"assumptions", "requires"} & set(load_recipe("tapo-3b-1x8").model_dump())
    assert loop.CONTEXT == CONTEXT


@pytest.mark.parametrize("file", sorted(ACCELERATE.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file):
    config = load_config_from_file(str(file))
    nodes = int(file.stem[-3])
    assert (config.num_machines, config.num_processes) == (nodes, 8 * nodes)
    assert config.distributed_type.value == {"fsdp": "FSDP", "zero3": "DEEPSPEED"}[file.stem.split("-")[0]]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_s_accelerate_configuration_is_there_and_of_its_size(name):
    setup = load_recipe(name).setup
    if setup is None or setup.accelerate is None:
        assert setup is None or setup.gpus == 1
        return
    config = yaml.safe_load((ACCELERATE / f"{setup.accelerate}.yaml").read_text())
    assert config["num_processes"] == setup.gpus
    assert config["distributed_type"] == {"fsdp": "FSDP", "deepspeed": "DEEPSPEED"}[setup.sharding]


def test_launch_files_are_well_formed_and_name_what_exists():
    script = ROOT / "deploy/slurm/train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    service, job = yaml.safe_load_all((ROOT / "deploy/kubernetes/train.yaml").read_text())
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    options = dict(part[2:].split("=", 1) for part in command if part.startswith("--") and "=" in part)
    assert (ROOT / options["config_file"]).is_file()
    assert load_recipe(options["recipe"]).setup.nodes == job["spec"]["completions"] == int(options["num_machines"])
    assert options["main_process_ip"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
