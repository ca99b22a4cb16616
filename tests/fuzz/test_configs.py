"""Random configurations of the command line run and reach what was asked for, or are refused with a clear error.

`python -m benchmarks.fuzz_configs` does the same to thousands, and prints the overrides of what goes wrong.
"""

import logging

import pytest

from benchmarks.random_configs import Job, dense_checkpoint, fields_of, random_job, run, settings_of

BLOCKS = {"a few": (range(12), 2, 3), "many": (range(20_000, 20_150), 25, 50)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", ["a few", pytest.param("many", marks=pytest.mark.slow)])
def test_whatever_is_asked_for(block, dense):
    seeds, least_run, least_refused = BLOCKS[block]
    outcomes = [run(random_job(seed), dense)["outcome"] for seed in seeds]  # raises what is wrong
    assert outcomes.count("ran") >= least_run and outcomes.count("refused") >= least_refused


def test_a_job_is_a_function_of_its_seed():
    assert random_job(3) == random_job(3) != random_job(4)


def test_settings_are_those_of_the_recipe_and_of_the_noun():
    assert {"sparsity", "shrink", "window"} <= set(settings_of("global_structured"))
    assert "num_levels" in settings_of("rewinding") and "num_levels" not in settings_of("wanda")
    assert fields_of("schedule", "polynomial") == ["power"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pruning=rigl", "pruning.grow=true"], "`grow` is an object such as Random(), but got True"),
        (["pruning=gradual", "pruning.exclude=3"], "`exclude` is a list of patterns, but got 3"),
        (["pruning=sparsegpt", "pruning.blocks=[1]"], "`blocks` is the path of a module, for a solver"),
        (["pruning=one_shot", "pruning.blocks=network"], "`blocks` is the path of a module, for a solver"),
        (["pruning=dpf", "pruning/masking=null"], "To leave a group out, write"),
        (["pruning=gradual", "model=mlp", "model.sizes=[60,10]"], "`model` reads and labels what `data` gives"),
        (["pruning=gradual", "model=mlp", "model.sizes=[64,9]"], "`model` reads and labels what `data` gives"),
        (["pruning=gradual", "data=mnist", "data.root=nowhere"], "`root` is a folder with mnist.npz"),
        (["pruning=gradual", "callbacks.monitor.folder=0.5"], "`folder` is a path, but got 0.5"),
        (["pruning=reconstruct", "pruning.unfinished=[1]"], "`unfinished` is a path, but got [1]"),
        (["pruning=sparsegpt_2_4", "model=mlp", "pruning.blocks=text"], "`blocks` is the path of an nn.ModuleList"),
        (["pruning=obd", "optimized_metric=nothing"], "`optimized_metric` is one of"),
        (["pruning=erk", "++trainer.val_check_interval=1000000"], "`val_check_interval` (1000000) must be"),
        (["pruning=movement", "ckpt_path=best"], "`ckpt_path` is a checkpoint file, but got 'best'"),
        (["pruning=heads", "model=mlp", "model.sizes=[64,8,10]"], "finds nothing to prune in Classifier"),
        (["pruning=depth", "model=resnet20", "pruning.include=[nothing]"], "matches no weight: 'nothing'"),
        (["pruning=gradual", "pruning/window=steps"], "`window` ends at optimizer step 500"),
        (["pruning=gradual", "pruning.scope.min_keep=0.5"], "`min_keep` is at most what the sparsity leaves"),
        (["pruning=gradual", "trainer.devices=text"], "`devices` selected with"),
        (["pruning=global_structured", "pruning.sparsity=null", "pruning/budget=params",
          "pruning.budget.params=0.001"], "`budget` params=0.001 is out of reach"),
        (["pruning=reconstruct_channels", "model=convnet", "pruning.sparsity={network.head: 0.5, *: 0.8}"],
         "`sparsities` has a pattern that matches no weight: 'network.head'"),
        (["pruning=sparsegpt", "model=mlp", "pruning/criterion=batch_norm_scale"], "has no `norm_scale`"),
        (["pruning=obd", "model=convnet", "pruning/scope=lamp"], "LAMP compares scores of at least 0, but got OBD()"),
        (["pruning=rows", "model=mlp", "pruning/scope=constant_fan_in"], "ConstantFanIn compares within rows"),
        (["pruning=grasp", "model=mlp", "pruning/scope=local", "pruning.scope.min_keep=0.5"],
         "`min_keep` is at most what the sparsity leaves of each parameter, 0.1, but got 0.5"),
        (["pruning=owl", "pruning.unfinished=text"], "`unfinished` is a folder that an interrupted pruning has left"),
        (["pruning=synflow", "pruning.unfinished=-1"], "`unfinished` is a path, but got -1"),
        (["pruning=rows", "++trainer.num_sanity_val_steps=[0.5]"], "`trainer.num_sanity_val_steps` is of type int"),
        (["pruning=gradual", "ckpt_path=-0.3"], "`ckpt_path` is a path, but got -0.3"),
        (["pruning=snip", "pruning/scope=fixed", "pruning.scope.sparsities=nan", "pruning.sparsity=null"],
         "`sparsities` maps patterns to sparsities, but got nan"),
        (["pruning=fisher", "++trainer.limit_val_batches=0", "optimized_metric=val/acc"],
         "`optimized_metric` is one of ['test/acc', 'test/loss', 'train/loss'"),
        (["pruning=fisher", "test=false", "optimized_metric=test/acc"], "`optimized_metric` is one of ['train/loss'"),
        (["pruning=fisher", "model=convnet", "ckpt_path={dense}"], "`model` is the one that was saved in `ckpt_path`"),
        (["pruning=one_shot", "model=convnet", "train=false", "ckpt_path={dense}"], "that was saved in `ckpt_path`"),
        (["pruning=one_shot", "model=gpt", "data=tinyshakespeare", "data.block_size=8", "model.num_layers=1",
          "model.width=16", "pruning/criterion=synflow", "pruning.include=['*.weight']"],
         "`network.embedding.weight` has no `flow_gradient`: no flow reaches it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_was_found_is_refused_before_the_first_step(overrides, said, dense):
    found = run(Job("", tuple(overrides)), dense)
    assert found["outcome"] == "refused" and said in found["said"]
