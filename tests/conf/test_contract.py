"""Every yaml has its noun, every noun its yaml, and no default is written twice."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import lightning_prune
from lightning_prune import cli, config
from tests import members
from tests.hydra_runs import CONF, composed, options

MISSING = {  # what the user has to give
    "fixed": ["pruning.sparsity=null", "pruning.scope.sparsities={a: 0.5}"],
    "allocated": ["pruning.scope.curves={a: {0.0: 1.0, 0.5: 1.5}}"],
}
FILES = [(axis, name) for axis in config.AXES for name in options(f"pruning/{axis}")]


def noun_of(axis: str, name: str) -> object:
    recipe = "one_shot" if axis == "solver" else "gradual"
    cfg = composed(f"pruning={recipe}", f"pruning/{axis}={name}", *MISSING.get(name, []))
    return instantiate(cfg.pruning[axis])


@pytest.mark.parametrize(("axis", "name"), FILES)
def test_every_file_of_an_axis_makes_a_noun_of_that_axis(axis, name):
    noun = noun_of(axis, name)
    assert type(noun) is config.nouns(axis)[type(noun).__name__]


@pytest.mark.parametrize("axis", config.AXES)
def test_every_noun_has_a_file(axis):
    made = {type(noun_of(axis, name)).__name__ for name in options(f"pruning/{axis}")}
    assert made == set(config.nouns(axis))


@pytest.mark.parametrize("axis", members.AXES)
def test_every_noun_of_the_package_is_public_and_has_a_schema(axis):
    coupled = members.classes(lightning_prune.core.granularities.coupled) if axis == "granularity" else []
    assert {noun.__name__ for noun in [*members.AXES[axis], *coupled]} == set(config.nouns(axis))


@pytest.mark.parametrize(("axis", "name"), [(a, n) for a in config.AXES for n in config.nouns(a)])
def test_a_schema_has_the_defaults_of_its_noun(axis, name):
    noun = config.nouns(axis)[name]
    required = [f.name for f in dataclasses.fields(noun) if f.default is dataclasses.MISSING]
    node = OmegaConf.structured(config.schema(noun, f"lightning_prune.{name}"))
    assert {key for key in node if OmegaConf.is_missing(node, key)} == set(required)
    if name == "Budget":  # one of its four has to be given, whichever: its files do
        assert instantiate(node, macs=0.5) == noun(macs=0.5)
    elif not required:
        assert instantiate(node) == noun()


@pytest.mark.parametrize("name", config.PRUNING)
def test_a_callback_has_the_arguments_and_defaults_of_its_schema(name):
    recipe, target, more = config.PRUNING[name]
    callback = getattr(lightning_prune, target.rpartition(".")[2])
    node = OmegaConf.structured(config.schema(recipe, target, more))
    settings = {key: node._get_node(key) for key in node if not key.startswith("_")}
    signature = inspect.signature(callback).parameters
    assert set(settings) == set(signature)
    for key, argument in signature.items():
        if not OmegaConf.is_missing(node, key):  # the others are nouns, each from a file of its own
            default = list(argument.default) if isinstance(argument.default, tuple) else argument.default
            assert node[key] == default, key


@pytest.mark.parametrize("axis", config.AXES)
def test_the_plain_recipes_have_the_nouns_that_the_callbacks_have_by_default(axis):
    plain = {"gradual": "TrainTimePruning", "one_shot": "PostTrainingPruning"}
    plain |= {"snip": "InitialPruning", "rigl": "SparseTraining", "lottery_ticket": "WeightRewinding"}
    for recipe, name in plain.items():
        signature = inspect.signature(getattr(lightning_prune, name)).parameters
        if axis in signature:
            assert instantiate(composed(f"pruning={recipe}").pruning[axis]) == signature[axis].default


@pytest.mark.parametrize("recipe", options("pruning"))
def test_every_recipe_composes_passes_its_checks_and_adds_one_callback(recipe):
    cfg = composed(f"pruning={recipe}")
    cli.check(cfg)
    assert ("pruning" in cfg.callbacks) == (recipe != "none")
    if recipe != "none":
        assert cfg.callbacks.pruning == cfg.pruning
        assert type(instantiate(cfg.callbacks.pruning)).__name__ in {
            "TrainTimePruning",
            "PostTrainingPruning",
            "InitialPruning",
            "SparseTraining",
            "WeightRewinding",
        }


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (g, n)
        for g in ("model", "data", "trainer", "callbacks", "logger", "experiment", "debug")
        for n in options(g)
    ],
)
def test_every_other_choice_composes_and_passes_its_checks(group, name):
    data = ["data=tinyshakespeare"] if name == "gpt" else []
    cfg = composed(f"{group}={name}", *data)
    cli.check(cfg)
    assert OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("name", options("model"))
def test_every_model_is_built_from_its_file(name):
    data = ["data=tinyshakespeare"] if name == "gpt" else []
    model = instantiate(composed(f"model={name}", *data).model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


def test_every_file_says_in_its_first_lines_what_it_is():
    def opening(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if not line.startswith("# @package"))

    silent = [path for path in CONF.glob("pruning/**/*.yaml") if not opening(path).startswith("# ")]
    assert silent == []


def test_the_command_line_of_the_issue_reads_as_it_should():
    cfg = composed("pruning=global_unstructured", "pruning/schedule=linear", "pruning.sparsity=0.8")
    callback = instantiate(cfg.callbacks.pruning)
    assert callback.schedule == lightning_prune.Linear()
    assert callback.recipe.scope == lightning_prune.Global()
    assert callback.recipe.sparsity == 0.8


def test_numbers_by_pattern_can_be_given_on_the_command_line():
    cfg = composed("pruning=gradual", "pruning.sparsity={network.head: 0.5, *: 0.9}")
    cli.check(cfg)
    recipe = instantiate(cfg.callbacks.pruning).recipe
    assert recipe.scope == lightning_prune.Fixed({"network.head": 0.5, "*": 0.9})
