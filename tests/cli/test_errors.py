"""What is wrong on the command line is answered before torch is loaded, with the name, the range and the choices."""

from __future__ import annotations

import subprocess
import sys

import pytest

GLOBAL = "pruning=global_unstructured"
SCRIPT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch was loaded:", "torch" in sys.modules)
"""


def refused(root, env, tmp_path, *overrides: str, script: str = "train.py") -> str:
    """What the script says when it refuses `overrides`, which it must do without torch."""
    command = [sys.executable, "-c", SCRIPT, script, *overrides, f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "torch was loaded: False" in done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            [GLOBAL, "pruning.sparsty=0.9"],
            ["Key 'sparsty' not in 'TrainTimePruning'", "Did you mean sparsity?"],
        ),
        (
            ["pruning.sparsity=1.5"],
            ["`pruning.sparsity` is a setting of a recipe, but none is chosen: add pruning="],
        ),
        ([GLOBAL, "pruning.schedule.powr=2"], ["pruning.schedule.powr", "Did you mean power?"]),
        (
            [GLOBAL, "pruning.schedule.power=two"],
            ["pruning.schedule.power", "'two'", "could not be converted to Float"],
        ),
        ([GLOBAL, "pruning/schedule=liner"], ["pruning/schedule/liner", "'cosine'", "Did you mean linear?"]),
        (["pruning=global_unstructred"], ["'wanda'", "Did you mean global_unstructured"]),
        (
            [GLOBAL, "pruning.sparsity=1.5"],
            ["`sparsity` is a sparsity, the fraction removed, in [0, 1), but got 1.5."],
        ),
        (
            [GLOBAL, "pruning.window.end=1.5"],
            [
                "pruning.window",
                "`end` is a fraction of the run in [0, 1], or a number of steps or epochs with `unit`, but got 1.5.",
            ],
        ),
        (
            [GLOBAL, "pruning.window.unit=epoch"],
            ["`unit` is one of ['run', 'epochs', 'steps'], but got 'epoch'. Did you mean epochs?"],
        ),
        ([GLOBAL, "pruning.exclude=head"], ["`exclude` is a list of patterns, but got the text 'head'"]),
        ([GLOBAL, "pruning/scope=fixed"], ["Missing mandatory value: pruning.scope.sparsities"]),
        (["pruning=n_of_m", "pruning.sparsity=0.5"], ["`sparsity` is prescribed by NofM", "leave it out"]),
        (["pruning=one_shot", "pruning/schedule=linear"], ["Could not override 'pruning/schedule'"]),
        (["pruning=one_shot", "pruning.checkpoint=bst"], ["`checkpoint` is one of", "Did you mean best?"]),
        (["model.lrr=1"], ["model.lrr", "Did you mean lr?"]),
        (["model.lr=fast"], ["`lr` is a number above 0, but got 'fast'."]),
        (["data.batch_size=2.5"], ["`batch_size` is a whole number of at least 1, but got 2.5."]),
        (
            ["trainer.max_epochs=ten"],
            ["`trainer.max_epochs` is a whole number of at least -1, but got 'ten'."],
        ),
        (
            ["ckpt_path=nope.ckpt"],
            ["`ckpt_path` is a checkpoint file, but got 'nope.ckpt', which is not there."],
        ),
        (["train=false", GLOBAL], ["`train` is false only for recipes that prune after training"]),
        (["train=false", "pruning=wanda"], ["`ckpt_path` is the trained model to prune where train=false"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_a_mistake_is_answered_with_what_would_be_right(root, subprocess_env, tmp_path, overrides, messages):
    said = refused(root, subprocess_env, tmp_path, *overrides)
    for message in messages:
        assert message in said


def test_a_mistake_in_an_evaluation_is_answered_too(root, subprocess_env, tmp_path):
    said = refused(root, subprocess_env, tmp_path, "ckpt_path=nope.ckpt", script="eval.py")
    assert "`ckpt_path` is a checkpoint file, but got 'nope.ckpt', which is not there." in said
    assert "Missing mandatory value: ckpt_path" in refused(root, subprocess_env, tmp_path, script="eval.py")


def test_a_recipe_that_the_user_writes_himself_is_left_alone(root, subprocess_env, tmp_path):
    """A class that is none of ours is not checked here: it may take any value."""
    from omegaconf import OmegaConf

    from lightning_prune import cli
    from tests.hydra_runs import composed

    cfg = composed("pruning=none")
    cfg.pruning = OmegaConf.create({"_target_": "someone.Else", "sparsity": 7})
    cli.check(cfg)
    assert cfg.pruning.sparsity == 7
