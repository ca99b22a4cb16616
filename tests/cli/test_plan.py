"""`plan.py` and `preview`: what is foretold is what a run then does, and what stands in its way is told."""

from __future__ import annotations

import json
import subprocess
import sys

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import (
    Budget,
    Channel,
    Fixed,
    NofM,
    PostTrainingPruning,
    Slice,
    SparseGPT,
    TrainTimePruning,
    WeightRewinding,
    Window,
    cli,
    preview,
)
from lightning_prune.examples.data import Digits
from lightning_prune.examples.tasks import Classifier
from lightning_prune.report.preview_rows import page
from lightning_prune.report.storage import load
from tests.cli.test_train import STRUCTURED, train
from tests.hydra_runs import QUIET, SMALL, composed, options

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("The learning rate had fallen", "Budget.macs=0.5. is missed", "The dirpath has changed")
]
GPT = ("model.num_layers=1", "data.block_size=16", "data=tinyshakespeare", "model=gpt")


def plan(folder, *overrides: str):
    """Plan as the command line does, and return the numbers of `plan.json`."""
    folder.mkdir(exist_ok=True)
    cfg, code = composed(*SMALL, *QUIET, *overrides, config_name="plan", output_dir=folder), 0
    try:
        assert cli.plan(cfg) is True
    except SystemExit as end:
        code = end.code
    found = json.loads((folder / "plan.json").read_text())
    assert found["is_fine"] is (code == 0)
    return found


def words(tmp_path, recipe: str) -> tuple[str, ...]:
    _, settings = STRUCTURED.get(recipe, (None, ()))
    if "data=tinyshakespeare" not in settings:
        return (f"pruning={recipe}", *settings)
    (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be " * 200)
    return (f"pruning={recipe}", *settings, f"data.root={tmp_path}")


@pytest.mark.parametrize("recipe", options("pruning"))
def test_every_recipe_has_a_plan(tmp_path, recipe, capsys):
    found = plan(tmp_path, *words(tmp_path, recipe))
    assert found["troubles"] == []
    shown = capsys.readouterr().out
    if recipe == "none":
        assert "Pruning" in shown and found["cost_before"] == found["cost_after"]
        return
    before, after = found["cost_before"], found["cost_after"]
    assert after["nonzeros"] < before["nonzeros"] and found["targets"] and found["when"]
    assert "nothing stands against it" in shown and "Layers, as expected" in shown
    assert (after["params"] < before["params"]) is bool(found["groups"])
    layers = found["layers"]
    biases_and_norms = before["params"] - sum(layer["params"] for layer in layers)
    assert 0 <= biases_and_norms < before["params"] / 5
    assert (
        sum(x["macs"] for x in layers) <= before["macs"]
        and sum(x["macs_after"] for x in layers) <= after["macs"]
    )


def layers_of(report):
    return {layer.name: (layer.shape, layer.nonzeros) for layer in report.cost_after.layers}


EXACT = {  # recipes whose layers are settled by shapes: every figure is exact
    "local_unstructured": (),
    "erk": (),
    "n_of_m": (),
    "static": (),
    "local_structured": (),
    "wanda": (),
}
IN_ALL = {"global_unstructured": (), "lottery_ticket": ("pruning.num_levels=2",), "snip": (), "one_shot": ()}
IN_ALL |= {"rewinding": ("pruning.epoch=0", "pruning.step=13", "pruning.num_levels=2")}


@pytest.mark.parametrize("recipe", [*EXACT, *IN_ALL])
def test_the_run_does_what_was_foretold(tmp_path, recipe):
    settings = (EXACT | IN_ALL)[recipe]
    found = plan(tmp_path / "plan", f"pruning={recipe}", *settings)
    train(tmp_path, f"pruning={recipe}", *settings)
    report = load(tmp_path / "report.json")
    after = found["cost_after"]
    assert (after["params"], after["macs"]) == (
        report.cost_after.params,
        round(report.cost_after.macs * after["batch_size"] / report.cost_after.batch_size),
    )
    assert abs(after["num_bytes"] - report.cost_after.num_bytes) < 100  # names of archives within the file
    targets = set(found["targets"])
    real = layers_of(report)
    foretold = {x["name"]: (tuple(x["shape_after"]), x["nonzeros_after"]) for x in found["layers"]}
    if recipe in EXACT:
        assert foretold == real
    assert sum(foretold[name][1] for name in targets) == sum(real[name][1] for name in targets)
    if recipe not in ("wanda", "one_shot"):
        planned = [(u["step"], pytest.approx(u["requested"])) for u in found["updates"]]
        assert [(u.step, u.requested) for u in report.updates] == planned
    assert found["target_sparsity"] == pytest.approx(report.target_sparsity)


def test_a_budget_is_met_as_foretold(tmp_path):
    settings = ("pruning=global_structured", "pruning.sparsity=null", "pruning/budget=macs", "model.width=32")
    found = plan(tmp_path / "plan", *settings)
    train(tmp_path, *settings)
    report = load(tmp_path / "report.json")
    foretold = found["cost_after"]["macs"] / found["cost_before"]["macs"]
    assert foretold == pytest.approx(0.5, abs=0.02)
    assert report.cost_after.macs / report.cost_before.macs == pytest.approx(foretold, abs=0.06)
    assert {g["name"]: g["size"] for g in found["groups"]} == {g.name: g.size for g in report.groups}
    assert found["frozen"] == dict(report.frozen)


def test_blocks_that_go_are_counted_as_they_will(tmp_path):
    found = plan(tmp_path / "plan", *words(tmp_path, "depth"))
    assert [g["role"] for g in found["groups"]] == ["block"] * len(found["targets"])
    train(tmp_path, *words(tmp_path, "depth"))
    report = load(tmp_path / "report.json")
    assert sum(g["kept"] for g in found["groups"]) == sum(group.kept for group in report.groups) < 9
    gone = [layer for layer in found["layers"] if layer["params_after"] == 0]
    assert gone and all(layer["macs_after"] == layer["num_bytes_after"] == 0 for layer in gone)


def test_blocks_go_by_a_criterion_until_a_budget_is_met(tmp_path):
    settings = (
        "pruning=depth",
        "model=resnet20",
        "pruning.sparsity=null",
        "pruning/budget=macs",
        "pruning.budget.macs=0.7",
    )
    found = plan(tmp_path / "plan", *settings, "pruning.budget.tolerance=0.08", "pruning/criterion=wanda")
    assert found["is_fine"] and found["cost_after"]["macs"] / found["cost_before"]["macs"] == pytest.approx(
        0.7, abs=0.08
    )
    assert "Magnitude(p=2) here; the run judges by Wanda()" in found["notes"][0]
    found = plan(tmp_path / "refused", *settings, "pruning.budget.tolerance=0.0001")
    assert "`budget` macs=0.7 is out of reach" in found["troubles"][0]
    assert "the nearest within reach are macs=0." in found["troubles"][0]


def test_a_checkpoint_is_pruned_exactly_as_foretold(tmp_path):
    train(tmp_path / "dense", "pruning=none")
    settings = ("pruning=one_shot", "train=false", f"ckpt_path={tmp_path}/dense/checkpoints/last.ckpt")
    found = plan(tmp_path / "plan", *settings)
    assert "exact" in found["notes"][0]
    train(tmp_path, *settings)
    foretold = {x["name"]: (tuple(x["shape_after"]), x["nonzeros_after"]) for x in found["layers"]}
    assert foretold == layers_of(load(tmp_path / "report.json"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["pruning=gradual", "pruning.exclude=[network.haed,nothing,network.head]"],
            [
                "'network.haed'. Did you mean network.head",
                "'nothing'. The candidates are network.features.0.weight",
            ],
        ),
        (
            [
                "pruning=global_structured",
                "pruning.sparsity=null",
                "pruning/budget=macs",
                "pruning.budget.macs=0.001",
            ],
            ["`budget` macs=0.001 is out of reach", "the nearest within reach is macs=0."],
        ),
        (
            [
                "pruning=gradual",
                "pruning.window.unit=epochs",
                "pruning.window.end=9",
                "pruning.window.every=1",
            ],
            ["`window` ends at optimizer step 90, but the run has 20 steps"],
        ),
        (
            ["pruning=n_of_m", "pruning.scope.indivisible=refuse", "pruning.scope.m=3"],
            [
                "`network.features.0.weight`: 2:3 needs",
                "`network.head.weight`: 2:3 needs",
                "network.features.7",
            ],
        ),
        (["pruning=heads"], ["finds nothing to prune", "No attention runs in it"]),
        (["pruning=rewinding", "pruning.epoch=2"], ["`epoch` is one of the first training's 2, but got 2."]),
        (
            ["pruning=lottery_ticket", "pruning.step=20"],
            ["`step` is one of the first training's, from 0 to 19, but got 20."],
        ),
        (
            ["pruning=one_shot", "pruning.checkpoint=best"],
            ['`checkpoint` is "best" only with a ModelCheckpoint'],
        ),
        (["pruning=gradual", "+model.in_channels=3"], ["`training_step` does not run on the first batches"]),
        (["pruning=depth"], ["has none that can go"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_what_stands_in_the_way_is_told(tmp_path, overrides, told, capsys):
    found = plan(tmp_path, *overrides)
    troubles = "\n".join(found["troubles"])
    assert not found["is_fine"]
    for text in told:
        assert text in troubles, troubles
    shown = capsys.readouterr().out
    assert "TROUBLE" in shown
    if found["cost_after"] is None:  # then nothing is foretold either
        assert found["updates"] == [] and "Layers, as expected" not in shown


def test_rounds_of_a_solver_are_refused_at_once(tmp_path):
    with pytest.raises(cli.SettingsError, match="`num_rounds` is 1 with a solver, but got 3"):
        plan(tmp_path, "pruning=sparsegpt", "pruning.num_rounds=3")


def test_layers_that_would_die_are_named_and_strict_counts_them(tmp_path):
    settings = ("pruning=global_unstructured", "pruning.sparsity=0.99")
    found = plan(tmp_path, *settings)
    assert found["is_fine"] and any(
        "`network.features.7.weight` would keep 1 of 9,216" in r for r in found["risks"]
    )
    with pytest.raises(SystemExit):
        cli.plan(composed(*SMALL, *QUIET, *settings, "strict=true", config_name="plan", output_dir=tmp_path))
    channels = plan(
        tmp_path,
        "pruning=local_structured",
        "pruning.sparsity=0.97",
        "model.width=32",
        "pruning.granularity.multiple_of=1",
    )
    assert any("of 64 channels" in risk for risk in channels["risks"])
    assert plan(tmp_path, "pruning=local_unstructured", "pruning.sparsity=0.5")["risks"] == []


def test_what_is_left_out_has_its_reason(tmp_path):
    found = plan(tmp_path, "pruning=gradual", "pruning.exclude=[network.head]")
    assert found["left_out"] == {"network.head.weight": "`exclude` names it: 'network.head'"}
    (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be " * 200)
    found = plan(tmp_path, "pruning=gradual", *GPT, f"data.root={tmp_path}")
    assert "Embedding is pruned only where `include` names it" in found["left_out"].values()
    assert set(found["left_out"]) & set(found["targets"]) == set()


def test_data_that_is_missing_is_told(tmp_path):
    found = plan(tmp_path, "pruning=gradual", *GPT, f"data.root={tmp_path}/nowhere")
    assert "`data` gives no batch" in found["troubles"][0] and "tinyshakespeare.txt" in found["troubles"][0]


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.Dropout(), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)
        )

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(num: int = 5) -> DataLoader:
    return DataLoader(torch.rand(4 * num, 6), batch_size=4)


def trainer(**options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **options
    )


def test_a_preview_leaves_everything_as_it_is():
    net, data = Net(), batches()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    for pruning in (
        TrainTimePruning(0.5),
        TrainTimePruning(0.5, granularity=Channel()),
        PostTrainingPruning(0.5),
    ):
        found = preview(pruning, net, data, trainer(max_epochs=3))
        assert found.is_fine, found.troubles
        assert pruning.pruner is None
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and net.training and net._trainer is None


def test_without_a_trainer_times_stay_unknown_unless_they_are_steps():
    found = preview(TrainTimePruning(0.5), Net(), batches())
    assert found.is_fine and found.updates == () and "Trainer" in found.notes[-1]
    window = Window(start=2, end=9, every=3, unit="steps")
    found = preview(TrainTimePruning(0.5, window=window), Net(), batches())
    assert [u.step for u in found.updates] == [2, 5, 8, 9]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 4}, 20),
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, 12),
        ({"max_epochs": 4, "limit_train_batches": 3}, 12),
        ({"max_epochs": 4, "limit_train_batches": 0.5}, 8),
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2, "overfit_batches": 2}, 4),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:.max_epochs. was not set")
def test_the_length_of_a_run_is_that_of_the_trainer(options, steps):
    callback = TrainTimePruning(0.5, window=Window(end=1.0, every=0.25), report=False)
    found = preview(callback, Net(), batches(), trainer(**options))
    assert found.updates[-1].step == steps
    callback = TrainTimePruning(0.5, window=Window(end=1.0, every=0.25), report=False)
    trainer(callbacks=[callback], **options).fit(Net(), batches())
    assert [u["step"] for u in callback.updates] == [u.step for u in found.updates]


@pytest.mark.parametrize(
    ("pruning", "told"),
    [
        (TrainTimePruning(0.5, include=["nett"]), "'nett'. Did you mean net "),
        (TrainTimePruning(0.5, include=[nn.Conv2d]), "`include` has a type that no weight belongs to"),
        (TrainTimePruning({"net.9": 0.5}), "`sparsities` has a pattern that matches no weight: 'net.9'"),
        (TrainTimePruning(scope=Fixed({"net.0": 0.5, "x": 0.1})), "`sparsities` has a pattern"),
        (TrainTimePruning(scope=NofM(2, 4)), "`net.0.weight`: 2:4 needs"),
        (TrainTimePruning(granularity=Channel(), budget=Budget(params=0.01)), "out of reach"),
        (PostTrainingPruning(0.5, solver=SparseGPT(), granularity=Slice(dim=1)), "use LeastSquares"),
        (WeightRewinding(0.5), "`max_epochs` is the length of one training"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:.max_epochs. was not set")
def test_a_misfit_is_a_trouble_and_no_exception(pruning, told):
    found = preview(pruning, Net(), batches(), trainer(max_steps=20))
    assert any(told in text for text in found.troubles), found.troubles
    assert not found.is_fine and "TROUBLE" in str(found)


def test_data_and_steps_that_fail_are_troubles_too():
    class Broken(L.LightningDataModule):
        def train_dataloader(self):
            raise OSError("no disk")

    assert preview(TrainTimePruning(0.5), Net(), Broken()).troubles == (
        "`data` gives no batch: OSError: no disk",
    )
    assert "none" in preview(TrainTimePruning(0.5), Net(), []).troubles[0]
    found = preview(TrainTimePruning(0.5), Net(), [torch.rand(4, 7)])
    assert "`training_step` does not run" in found.troubles[0] and found.cost_after is not None


def test_a_frozen_part_is_left_alone():
    net = Net()
    net.net[0].requires_grad_(False)
    found = preview(TrainTimePruning(0.5), net, batches())
    assert found.targets == ("net.4.weight",) and found.left_out == {"net.0.weight": "it is frozen"}


def test_a_preview_prints_itself():
    text = str(preview(TrainTimePruning(0.5, granularity=Channel()), Net(), batches(), trainer(max_epochs=3)))
    for told in (
        "Coupled groups",
        "16 x 6",
        "8 x 6",
        "What stays whole",
        "Updates of the masks",
        "nothing stands",
    ):
        assert told in text
    assert len(page(preview(None, Net(), batches())).tables) == 1


def test_a_module_that_was_trained_can_be_looked_at():
    net = Net()
    run = trainer(max_epochs=1)
    run.fit(net, batches())
    assert preview(TrainTimePruning(0.5), net, batches(), run).is_fine
    assert net.trainer is run


def test_digits_and_classifier_without_hydra():
    found = preview(TrainTimePruning(0.9), Classifier("ConvNet"), Digits(), trainer(max_epochs=2))
    assert found.cost_after.nonzeros < 0.12 * found.cost_before.nonzeros


@pytest.mark.slow
def test_the_script_prints_json_and_nothing_else(root, subprocess_env, tmp_path):
    def run(*overrides: str):
        command = [
            sys.executable,
            "plan.py",
            "trainer=cpu",
            "json=true",
            f"hydra.run.dir={tmp_path}",
            *overrides,
        ]
        return subprocess.run(
            command, cwd=root, env=subprocess_env, capture_output=True, text=True, timeout=200
        )

    fine = run("pruning=erk")
    assert fine.returncode == 0, fine.stderr
    assert json.loads(fine.stdout)["is_fine"] is True
    bad = run("pruning=erk", "pruning.include=[nowhere]")
    assert bad.returncode == 1 and "Traceback" not in bad.stderr
    assert "'nowhere'" in json.loads(bad.stdout)["troubles"][0]
    wrong = run("pruning=erk", "pruning.sparsty=1")
    assert wrong.returncode == 1 and "Did you mean sparsity?" in wrong.stderr
