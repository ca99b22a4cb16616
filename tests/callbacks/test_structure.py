"""Models that become smaller in a run: resumed bit for bit, loaded again, with optimizers, averages and a report."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_prune import (
    APoZ,
    Budget,
    Channel,
    Constant,
    GroupLasso,
    Layer,
    Local,
    Movement,
    PostTrainingPruning,
    ReplaysRecord,
    Saliency,
    SparsityMonitor,
    Taylor,
    TrainTimePruning,
    Wanda,
    Window,
    load_pruned,
)
from lightning_prune.model.history import KEY, plans_of, read_record
from lightning_prune.report.storage import load
from tests.callbacks.toy import NUM_BATCHES, Toy, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
ANY = Channel(multiple_of=1)
RECIPES = {
    "end": {},
    "update": {"shrink": "update"},
    "never": {"shrink": "never"},
    "movement": {"shrink": "update", "criterion": Movement()},
    "saliency": {"criterion": Saliency(), "scope": Local(), "shrink": "update"},
    "apoz": {"criterion": APoZ(), "include": ["body"]},
    "one-shot": {"schedule": Constant(), "window": Window(end=0.0)},
    "budget": {"sparsity": None, "budget": Budget(params=0.5, tolerance=0.1)},
    "budget-update": {"sparsity": None, "budget": Budget(macs=0.6, tolerance=0.1), "shrink": "update"},
}
LAST = 4 * NUM_BATCHES


def build(recipe, **others):
    options = {"sparsity": 0.5, "granularity": ANY, "window": Window(every=0.1, end=0.6), "report": False}
    return TrainTimePruning(**options | RECIPES[recipe] | others)


def run(recipe, folder, *others, module=Toy, ckpt_path=None, **options):
    callback, trained = build(recipe), module()
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(callback, *others, saving, **options)
    torch.manual_seed(7)
    fit.fit(trained, data(shuffle=True), data(), ckpt_path=ckpt_path, weights_only=True)
    return fit, trained, callback


def everything(fit, module, callback):
    """All that a run has become: weights, buffers, optimizers, masks, the record, updates."""
    found = {f"module.{k}": v for k, v in module.state_dict().items()}
    for i, optimizer in enumerate(fit.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{j}.{k}": v for k, v in state.items() if torch.is_tensor(v)}
    found |= {f"mask.{k}": v for k, v in callback.masks.items()}
    for key in ("requested", "achieved", "step"):
        found[key] = torch.tensor([u[key] for u in callback.updates], dtype=torch.float64)
    return found, plans_of(module)


def assert_equal(first, second):
    assert first[0].keys() == second[0].keys()
    assert [name for name in first[0] if not torch.equal(first[0][name], second[0][name])] == []
    # the error of a plan was measured on the batch at which the run went on
    assert [replace(p, error=None) for p in first[1]] == [replace(p, error=None) for p in second[1]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_goes_on_bit_for_bit(recipe, tmp_path):
    """Before the ramp, within it, at its end, where the model has just become smaller, and after that."""
    expected = everything(*run(recipe, tmp_path / "whole"))
    for step in (1, 5, 9, 13, 14, 15, 16, 23):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        assert_equal(expected, everything(*run(recipe, tmp_path / f"{step}", ckpt_path=path)))


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "never"])
def test_the_model_is_physically_smaller(recipe, tmp_path):
    _, module, callback = run(recipe, tmp_path)
    plans = plans_of(module)
    num_updates = sum(update["requested"] > 0 for update in callback.updates)
    assert 1 <= len(plans) <= (num_updates if "update" in str(callback.shrink) else 1)
    assert module.body[0].out_features < 16 or module.body[4].out_features < 8
    assert all(plan.error is not None and plan.error < 1e-10 for plan in plans)
    assert not callback.masks or all(bool(mask.all()) for mask in callback.masks.values())
    assert module(torch.zeros(2, 8)).shape == (2, 4)


def test_never_means_masks_only(tmp_path):
    _, module, callback = run("never", tmp_path)
    assert plans_of(module) == () and module.body[0].out_features == 16
    for name, mask in callback.masks.items():
        assert not bool(module.state_dict()[name][~mask].any())
    assert sum(int((~mask).sum()) for mask in callback.masks.values()) > 50
    assert KEY not in torch.load(tmp_path / f"step={LAST}.ckpt", weights_only=True)


def test_shrinking_at_the_end_or_never_gives_the_same_function(tmp_path):
    """Masked channels do not learn, so that taking them out where the ramp ends changes nothing but the size."""

    def plain():  # dropout draws other numbers for a smaller model
        module = Toy("SGD", lr=0.1, momentum=0.9)
        module.body[3] = nn.Identity()
        return module

    models = [run(recipe, tmp_path / recipe, module=plain)[1].eval() for recipe in ("end", "never")]
    x = torch.randn(5, 8)
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in models[0].parameters()) < 0.7 * sum(
        p.numel() for p in models[1].parameters()
    )


def test_optimizers_keep_what_they_know(tmp_path):
    fit, module, _ = run("update", tmp_path)
    (optimizer,) = fit.optimizers
    for parameter in module.parameters():
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert float(state["step"]) == LAST and bool(state["exp_avg_sq"].any())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in module.parameters()
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_under_other_ways_to_train(precision, accumulate, tmp_path):
    options = {"precision": precision, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    expected = everything(*run("update", tmp_path / "whole", **options))
    steps = sorted((int(f.stem.split("=")[1]), f) for f in (tmp_path / "whole").glob("*.ckpt"))
    middle = steps[len(steps) // 2][1]
    assert_equal(expected, everything(*run("update", tmp_path / "again", ckpt_path=middle, **options)))


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights_only"])
def test_checkpoints_load_without_any_callback(weights_only, tmp_path):
    _, module, _ = run("update", tmp_path / "run")
    fit, module, _ = run("update", tmp_path / "run2")
    fit.save_checkpoint(tmp_path / "small.ckpt", weights_only=weights_only)
    checkpoint = torch.load(tmp_path / "small.ckpt", weights_only=True)
    assert ("callbacks" in checkpoint) is not weights_only
    assert read_record(checkpoint) == plans_of(module)
    loaded = load_pruned(Toy, tmp_path / "small.ckpt")
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in module.state_dict().items())


@pytest.mark.parametrize("step", [5, LAST])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_the_trainer_loads_a_small_model_with_the_callback(stage, step, tmp_path):
    run("update", tmp_path)

    class Tested(Toy):
        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    fresh = Tested()
    path = tmp_path / f"step={step}.ckpt"
    getattr(trainer(build("update")), stage)(fresh, data(), ckpt_path=path, weights_only=True)
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(t, fresh.state_dict()[n]) for n, t in weights.items())


def test_the_same_module_is_tested_from_its_own_checkpoint(tmp_path):
    """What everybody does: fit, then validate with the last checkpoint; one from before is refused with advice."""
    fit, module, _ = run("end", tmp_path)
    fit.validate(module, data(), ckpt_path=tmp_path / f"step={LAST}.ckpt", weights_only=True, verbose=False)
    with pytest.raises(ValueError, match="build a new Toy"):
        fit.validate(module, data(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True, verbose=False)


AVERAGES = {"ema": lambda: EMAWeightAveraging(decay=0.9), "swa": lambda: StochasticWeightAveraging(1e-2)}


@pytest.mark.parametrize("recipe", ["end", "update"])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_a_run_with_averages_is_resumed_bit_for_bit(average, recipe, tmp_path):
    """Not from step 18, where averaging by SWA begins: there Lightning alone is not exact either."""
    expected = everything(*run(recipe, tmp_path / "whole", average()))
    for step in (5, 14, 23):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        assert_equal(expected, everything(*run(recipe, tmp_path / f"{step}", average(), ckpt_path=path)))


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_averages_become_smaller_too(average, tmp_path):
    _, module, callback = run("update", tmp_path, average())
    assert module.body[0].out_features < 16
    assert module(torch.zeros(2, 8)).isfinite().all()
    loaded = load_pruned(Toy, tmp_path / f"step={LAST}.ckpt")
    assert loaded.body[0].out_features == module.body[0].out_features
    assert callback.updates[-1]["achieved"] == pytest.approx(0.5, abs=0.05)


def test_a_report_is_written(tmp_path):
    callback = build("end", report=True)
    trainer(callback, default_root_dir=tmp_path).fit(Toy(), data(), data())
    report = load(tmp_path / "report.json")
    assert report.achieved_sparsity == pytest.approx(0.5, abs=0.05)
    assert report.cost_after.params < 0.7 * report.cost_before.params
    assert report.cost_after.macs < 0.7 * report.cost_before.macs
    assert (tmp_path / "report.md").read_text()


def test_a_module_with_the_mixin_is_pruned_as_well(tmp_path):
    class Mixed(ReplaysRecord, Toy):
        pass

    expected = everything(*run("update", tmp_path / "whole", module=Mixed))
    path = tmp_path / "whole" / "step=13.ckpt"
    assert_equal(expected, everything(*run("update", tmp_path / "again", module=Mixed, ckpt_path=path)))
    loaded = Mixed.load_from_checkpoint(path, weights_only=True)
    assert len(plans_of(loaded)) >= 1 and type(loaded) is Mixed


def test_hooks_of_the_module_still_run(tmp_path):
    class Hooked(Toy):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = self.body[0].out_features

        def on_load_checkpoint(self, checkpoint):
            self.seen = checkpoint["mine"], self.body[0].out_features

    run("update", tmp_path / "whole", module=Hooked)
    _, module, _ = run(
        "update", tmp_path / "again", module=Hooked, ckpt_path=tmp_path / "whole" / f"step={LAST - 1}.ckpt"
    )
    assert module.seen[0] == module.seen[1] < 16


# in one shot


@pytest.mark.parametrize("granularity", [ANY, Channel(multiple_of=4)])
def test_post_training_makes_the_model_small(granularity, tmp_path):
    callback = PostTrainingPruning(0.5, granularity=granularity, report=False)
    module = Toy()
    fit = trainer(callback, ModelCheckpoint(tmp_path))
    fit.fit(module, data(), data())
    assert module.body[0].out_features < 16 and len(plans_of(module)) == 1
    loaded = load_pruned(Toy, tmp_path / "pruned.ckpt")
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in module.state_dict().items())
    metrics = trainer().validate(loaded, data(), verbose=False)[0]
    assert metrics == pytest.approx(callback.metrics_after)


class Residual(Toy):
    """With blocks that can be skipped."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.inner(x).relu()

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(self.Block(), self.Block(), self.Block(), self.Block())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Toy, {"granularity": ANY}),
        (Residual, {"granularity": Layer()}),
        (Residual, {"granularity": Layer(), "criterion": Wanda()}),
        (Residual, {"granularity": Layer(), "criterion": Taylor(), "num_rounds": 2}),
    ],
)
def test_run_prunes_a_checkpoint(kind, options, tmp_path):
    fit = trainer(ModelCheckpoint(tmp_path / "dense", filename="dense"), max_epochs=1)
    fit.fit(kind(), data(), data())
    callback = PostTrainingPruning(0.5, report=False, **options)
    module = kind()
    num_params = sum(p.numel() for p in module.parameters())
    module.train_dataloader = module.val_dataloader = lambda: data()
    callback.run(
        trainer(callback, default_root_dir=tmp_path), module, ckpt_path=tmp_path / "dense" / "dense.ckpt"
    )
    assert sum(p.numel() for p in module.parameters()) < 0.8 * num_params
    loaded = load_pruned(kind, tmp_path / "pruned.ckpt")
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in module.state_dict().items())
    x = torch.randn(3, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_a_small_model_is_trained_on_and_pruned_again(tmp_path):
    run("end", tmp_path)
    small = load_pruned(Toy, tmp_path / f"step={LAST}.ckpt")
    before = small.body[0].out_features
    callback = build("update")
    saving = ModelCheckpoint(tmp_path / "again", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(callback, saving).fit(small, data(), data())
    assert small.body[0].out_features < before
    loaded = load_pruned(Toy, tmp_path / "again" / f"step={LAST}.ckpt")
    assert loaded.body[0].out_features == small.body[0].out_features and len(plans_of(loaded)) > 1


def test_a_copy_of_the_module_is_independent(tmp_path):
    _, module, _ = run("end", tmp_path)
    twin = copy.deepcopy(module)
    checkpoint = {}
    twin.on_save_checkpoint(checkpoint)
    assert read_record(checkpoint) == plans_of(module)


def test_a_compiled_part_shrinks_alike(tmp_path):
    class Compiled(Toy):
        def __init__(self):
            super().__init__()
            self.body.compile(backend="eager")

    expected = everything(*run("update", tmp_path / "plain"))
    assert_equal(expected, everything(*run("update", tmp_path / "compiled", module=Compiled)))


def test_the_example_call_leaves_no_trace(tmp_path):
    """A step that draws numbers, keeps books and moves a buffer: the first run of it is the first real one."""

    class Bookkeeper(Toy):
        def __init__(self):
            super().__init__()
            self.register_buffer("queue", torch.zeros(1))
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.queue += torch.rand(1)
            self.seen.append(float(torch.rand(1)))
            return super().training_step(batch, batch_idx)

    modules = []
    for callback in ([], [build("never", sparsity=0.0)]):
        modules.append(Bookkeeper())
        torch.manual_seed(7)
        trainer(*callback, max_epochs=1).fit(modules[-1], data(), data())
    first, second = modules
    assert first.seen == second.seen and len(first.seen) == NUM_BATCHES
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in first.state_dict().items())


@pytest.mark.parametrize("shrink", ["end", "update"])
def test_a_latency_that_no_smaller_model_has_is_refused_before_the_first_step(monkeypatch, shrink, tmp_path):
    monkeypatch.setattr("lightning_prune.model.prices.latency_ratio", lambda dense, small, precision: 0.9)
    pruning = TrainTimePruning(
        budget=Budget(latency=0.5), granularity=Channel(multiple_of=1), shrink=shrink, report=False
    )
    module, fitted = Toy(), trainer(pruning, default_root_dir=tmp_path)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        ValueError, match=r"`budget` latency=0.5 is out of reach .* latency=0.900 of the dense"
    ):
        fitted.fit(module, data(), data())
    assert fitted.global_step == 0 and list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Keeping(Toy):
    """It keeps what it computed, in itself and in a part of it, and has weights that are computed anew each time."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.head = nn.utils.weight_norm(self.head)
        self.body.append(Keeps())

    def forward(self, x):
        self.hidden = {"last": [self.body(x)]}
        return self.head(self.hidden["last"][0])


class Keeps(nn.Module):
    """It keeps its input."""

    def forward(self, x):
        self.seen = x
        return x


@pytest.mark.parametrize("report", [True, False])
@pytest.mark.parametrize("shrink", ["end", "update"])
def test_a_module_that_keeps_tensors_of_its_graph_becomes_smaller(shrink, report, tmp_path):
    module, callback = Keeping(), build("end", shrink=shrink, report=report)
    before = module.body[0].out_features
    trainer(callback, default_root_dir=tmp_path).fit(module, data(), data())
    assert module.body[0].out_features < before and callback.updates[-1]["achieved"] == pytest.approx(
        0.5, abs=0.05
    )
    assert (callback.dense is not None) == report  # without one nothing is kept of the dense model


def test_a_callback_that_prunes_one_module_after_another_compares_each_with_itself(tmp_path):
    callback, monitor = build("end", report=True), SparsityMonitor(show=False)
    params = []
    for width in (16, 32):
        module = Toy()
        module.body[0], module.body[1] = nn.Linear(8, width), nn.BatchNorm1d(width)
        module.body[4] = nn.Linear(width, 8)
        trainer(callback, monitor, default_root_dir=tmp_path).fit(module, data(), data())
        params.append(
            (monitor.report.cost_before.params, sum(p.numel() for p in callback.dense.parameters()))
        )
    assert params[0][0] == params[0][1] < params[1][0] == params[1][1]


class PartlyFrozen(Toy):
    """What body.0 writes stays, a frozen norm hinders nobody, and a frozen head reads what is left."""

    def __init__(self):
        super().__init__()
        self.body.extend([nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU()])
        self.head = nn.Linear(12, 4)
        for part in (self.body[0], self.body[7], self.head):
            part.requires_grad_(False)


@pytest.mark.parametrize("include", [None, ["body"]])
def test_what_frozen_layers_write_stays_unless_it_is_named(include):
    callback = TrainTimePruning(0.5, granularity=ANY, report=False, include=include)
    trainer(callback).fit(module := PartlyFrozen(), data(), data())
    assert (module.body[0].out_features == 16) is (include is None)
    assert module.body[4].out_features < 8 or module.body[6].out_features < 12
    assert module.head.in_features == module.body[7].num_features == module.body[6].out_features
    assert not module.body[0].weight.requires_grad and not module.head.weight.requires_grad


def test_nothing_is_pruned_where_all_that_writes_channels_is_frozen():
    class OnlyHead(Toy):
        def __init__(self):
            super().__init__()
            self.body.requires_grad_(False)

    with pytest.raises(
        ValueError, match=r"`body.4.weight` \(`include` or `exclude` keeps it, or it is frozen\)"
    ):
        trainer(TrainTimePruning(0.5, granularity=ANY, report=False)).fit(OnlyHead(), data(), data())


@pytest.mark.parametrize("kind", [TrainTimePruning, PostTrainingPruning])
def test_very_little_that_is_left_of_a_group_is_told(kind):
    with pytest.warns(UserWarning, match=r"Very little is left of `body.0.weight` \(1 of 16\)"):
        trainer(kind(0.95, granularity=ANY, report=False, exclude=["body.4"])).fit(Toy(), data(), data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"granularity": Channel},
            r"`granularity` is an object such as Weight\(\), but got <class .*Channel'>",
        ),
        ({"granularity": Layer}, r"`granularity` is an object such as Weight\(\), but got <class .*Layer'>"),
        (
            {"granularity": ANY, "regularizer": GroupLasso},
            r"`regularizer` is an object such as GroupLasso\(\), but",
        ),
    ],
)
def test_classes_in_place_of_their_objects_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainTimePruning(0.5, **settings)
