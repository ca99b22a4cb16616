"""LightningCLI: callbacks and their nouns by class path, and what is misspelt is refused."""

from __future__ import annotations

import inspect

import lightning as L
import pytest

import lightning_prune
from lightning_prune import ERK, Budget, Channel, Linear, TrainTimePruning, Window, config
from lightning_prune.callbacks.base import PruningCallback

jsonargparse = pytest.importorskip("jsonargparse", reason="an environment from before it was asked for")

# jsonargparse tells of its own next version; a program that is not tested sees it once
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
AXES = {
    "schedule": "TrainTimePruning",
    "criterion": "PostTrainingPruning",
    "granularity": "TrainTimePruning",
    "scope": "TrainTimePruning",
    "window": "TrainTimePruning",
    "budget": "PostTrainingPruning",
    "solver": "PostTrainingPruning",
    "masking": "TrainTimePruning",
}
LINEAR = {"class_path": "lightning_prune.Linear"}
ELSEWHERE = {"Movement": "TrainTimePruning", "Layer": "PostTrainingPruning"}
GIVEN = {
    "Budget": {"macs": 0.5},
    "Fixed": {"sparsities": {"a": 0.5}},
    "Allocated": {"curves": {"a": {0.0: 1.0, 0.5: 1.2}}},
    "Join": {"schedules": [LINEAR, LINEAR], "boundaries": [0.5], "levels": [0.5]},
}
PRESCRIBES = ("Fixed", "NofM", "Budget")
CALLBACKS = [
    name
    for name in lightning_prune.__all__
    if inspect.isclass(member := getattr(lightning_prune, name)) and issubclass(member, PruningCallback)
]


def parsed(class_path: str, **init_args):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[L.Callback] | None)
    found = parser.parse_object({"callbacks": [{"class_path": class_path, "init_args": init_args}]})
    return parser.instantiate(found).callbacks[0]


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_pruning_callback_is_built_with_its_defaults(name):
    ours = getattr(lightning_prune, name)
    settings = {} if "sparsity" not in inspect.signature(ours).parameters else {"sparsity": 0.5}
    assert parsed(f"lightning_prune.{name}", **settings).describe() == ours(**settings).describe()


NOUNS = [(axis, noun) for axis in AXES for noun in config.nouns(axis)]


@pytest.mark.parametrize(("axis", "noun"), NOUNS)
def test_every_noun_can_be_named(axis, noun):
    settings = GIVEN.get(noun, {})
    coupled = noun in ("Isomorphic", "Budget")
    more = {"granularity": {"class_path": "lightning_prune.Channel"}} if coupled else {}
    spec = {axis: {"class_path": f"lightning_prune.{noun}", "init_args": settings}}
    sparsity = {} if noun in PRESCRIBES else {"sparsity": 0.5}
    found = parsed(f"lightning_prune.{ELSEWHERE.get(noun, AXES[axis])}", **{**more, **sparsity, **spec})
    value = getattr(found, axis) if hasattr(found, axis) else getattr(found.recipe, axis)
    assert type(value) is config.nouns(axis)[noun]


def test_all_nouns_together():
    nouns = {
        "schedule": {"class_path": "lightning_prune.Linear"},
        "scope": {"class_path": "lightning_prune.ERK", "init_args": {"kernel": False}},
        "window": {"class_path": "lightning_prune.Window", "init_args": {"end": 0.5}},
    }
    found = parsed("lightning_prune.TrainTimePruning", sparsity=0.9, exclude=["head"], **nouns)
    assert isinstance(found, TrainTimePruning)
    assert (found.schedule, found.recipe.scope, found.window) == (
        Linear(),
        ERK(kernel=False),
        Window(end=0.5),
    )
    assert list(found.recipe.exclude) == ["head"]
    found = parsed(
        "lightning_prune.TrainTimePruning",
        granularity={"class_path": "lightning_prune.Channel"},
        budget={"class_path": "lightning_prune.Budget", "init_args": {"macs": 0.5}},
    )
    assert (found.recipe.granularity, found.recipe.budget) == (Channel(), Budget(macs=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsty": 0.5}, "sparsty"),
        ({"scope": {"class_path": "lightning_prune.ERKK"}}, "ERKK"),
        ({"scope": {"class_path": "lightning_prune.ERK", "init_args": {"kernl": True}}}, "kernl"),
        ({"scope": {"class_path": "lightning_prune.Linear"}}, "does not implement protocol Scope"),
    ],
)
def test_what_is_misspelt_is_refused(settings, message):
    with pytest.raises(jsonargparse.ArgumentError, match=message):
        parsed("lightning_prune.TrainTimePruning", **settings)
