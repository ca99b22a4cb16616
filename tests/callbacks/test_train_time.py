"""Pruned weights are zero whenever anything reads them, whatever the trainer and the optimizers do."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F

from lightning_prune import (
    ActivationVariance,
    Alternating,
    APoZ,
    BatchNormScale,
    Constant,
    Fisher,
    Global,
    Linear,
    Movement,
    NofM,
    PerRow,
    PostTrainingPruning,
    Random,
    Saliency,
    Slice,
    Steps,
    Taylor,
    TrainTimePruning,
    Wanda,
    Window,
)
from lightning_prune.core.masks import sparsity_of
from tests.callbacks.toy import GAN, NUM_BATCHES, Toy, Witness, data, pruned_weights, trainer


def pruning(sparsity=0.75, **nouns):
    return TrainTimePruning(sparsity, **{"report": False, "window": Window(every=0.1), **nouns})


def fit(callback, module=None, *others, **options):
    module = module or Toy()
    run = trainer(*others, callback, **options)
    run.fit(module, data(), data() if isinstance(module, Toy) else None)
    return run, module


def sparsity(module, callback):
    zeros = sum(w.numel() - int(w.count_nonzero()) for w in pruned_weights(module, callback))
    return zeros / sum(m.numel() for m in callback.masks.values())


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (lambda: Toy(), {}),
        (lambda: Toy("SGD", momentum=0.9, weight_decay=0.1, nesterov=True), {}),
        (lambda: Toy(fused=True), {}),
        (lambda: Toy("Adam", amsgrad=True, foreach=True), {}),
        (lambda: Toy(), {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}),
        (lambda: Toy(), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (lambda: Toy(), {"precision": "bf16-mixed"}),
        (lambda: Toy(), {"precision": "bf16-true"}),
        (lambda: Toy(), {"precision": "64-true"}),
        (lambda: GAN(), {}),
    ],
    ids=[
        "adamw",
        "sgd",
        "fused",
        "foreach",
        "accumulate-clip",
        "clip-value",
        "bf16-mixed",
        "bf16-true",
        "64",
        "gan",
    ],
)
def test_no_forward_reads_a_pruned_weight_as_nonzero(module, options):
    callback = pruning()
    witness = Witness(callback)
    _, trained = fit(callback, module(), witness, **options)
    assert witness.reads > 20 and witness.violations == 0
    assert (
        sparsity(trained, callback)
        == 1
        - sum(int(m.sum()) for m in callback.masks.values()) / sum(m.numel() for m in callback.masks.values())
        == pytest.approx(0.75, abs=0.005)
    )


def test_steps_that_mixed_precision_skips_lose_neither_masks_nor_the_end_of_the_ramp():
    """A gradient scale far too large: the first steps overflow in float16 and are skipped, as on a GPU."""

    class Overflowing(Toy):
        def training_step(self, batch, batch_idx):
            factor = float("inf") if self.trainer.global_step in (2, 3, 9, 16) else 1.0
            return super().training_step(batch, batch_idx) * factor

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    callback = pruning(criterion=Saliency(), window=Window(end=17, every=3, unit="steps"))
    witness = Witness(callback)
    _, module = fit(callback, Overflowing(), witness, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert witness.violations == 0 and callback.updates[-1]["progress"] == 1.0
    assert sparsity(module, callback) == pytest.approx(0.75, abs=0.005)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_lbfgs_is_masked_outside_of_its_own_closure(tmp_path):
    """Inside of a step LBFGS walks where it likes; what validation, checkpoints and the user see is masked."""
    seen = []

    class Reader(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            seen.extend(float(w.abs().sum()) for w in pruned_weights(pl_module, callback))

    callback = pruning()
    _, module = fit(
        callback, Toy("LBFGS", lr=0.1, max_iter=3), Reader(), ModelCheckpoint(tmp_path, save_last=True)
    )
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert len(seen) > 20 and set(seen) == {0.0}
    assert all(bool((weights[name][~mask] == 0).all()) for name, mask in callback.masks.items())
    assert sparsity(module, callback) == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize("first", [True, False], ids=["averaging-first", "averaging-last"])
@pytest.mark.parametrize(
    "averaging",
    [lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=2), lambda: EMAWeightAveraging(decay=0.9)],
    ids=["swa", "ema"],
)
def test_averaged_weights_are_as_sparse_as_the_others(averaging, first, tmp_path):
    """Masks alone leave 0.0 (SWA) and 0.014 (EMA) of a sparsity of 0.5, in the checkpoint as well."""
    callback, average = pruning(), averaging()
    order = [average, callback] if first else [callback, average]
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=5)
    run = trainer(*order, checkpoint, max_epochs=5)
    module = Toy()
    run.fit(module, data(), data())
    assert sparsity(module, callback) == pytest.approx(0.75, abs=0.005)
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda f: f.stat().st_mtime)
    weights = torch.load(files[-1], weights_only=True)["state_dict"]
    assert all(bool((weights[name][~mask] == 0).all()) for name, mask in callback.masks.items())


def test_averages_are_masked_while_validation_reads_them():
    callback = pruning(schedule=Linear())
    witness = Witness(callback)
    fit(callback, Toy(), witness, EMAWeightAveraging(decay=0.99))
    assert witness.reads > 20 and witness.violations == 0


def test_tied_weights_share_one_mask():
    module = Toy()
    module.body[4] = nn.Linear(16, 8)
    module.extra = nn.Linear(16, 8)
    module.extra.weight = module.body[4].weight
    callback = pruning()
    fit(callback, module)
    assert "body.4.weight" in callback.masks and "extra.weight" not in callback.masks
    assert module.extra.weight is module.body[4].weight and sparsity(module, callback) == pytest.approx(
        0.75, abs=0.005
    )


@pytest.mark.parametrize("inside", [True, False], ids=["submodule", "module"])
def test_compiled_modules(inside):
    class Quiet(Toy):  # dynamo cannot trace `self.log`
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            return self(batch[0])

    module = Quiet()
    callback = pruning()
    compiled = module
    if inside:
        module.body = torch.compile(module.body, backend="eager")
    else:
        compiled = torch.compile(module, backend="eager")
    run = trainer(callback)
    run.fit(compiled, data(), data())
    assert sparsity(module, callback) == pytest.approx(0.75, abs=0.005)
    assert callback.masks.keys() == {name for name, p in module.named_parameters() if p.dim() > 1}


def test_optimizer_state_of_pruned_weights_is_zero_after_each_update():
    seen = []

    class Reader(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if callback.updates and callback.updates[-1]["step"] == trainer.global_step:
                for name, mask in callback.masks.items():
                    state = trainer.optimizers[0].state[pl_module.get_parameter(name)]
                    seen.extend(float(state[key][~mask].abs().sum()) for key in ("exp_avg", "exp_avg_sq"))

    callback = pruning()
    fit(callback, Toy(), Reader())
    assert len(seen) > 20 and set(seen) == {0.0}


def test_sparsity_follows_the_schedule_to_its_exact_end():
    callback = pruning(0.8, schedule=Linear(), window=Window(0, 20, 7, unit="steps"))
    fit(callback)
    assert [u["step"] for u in callback.updates] == [0, 7, 14, 20]
    assert [u["requested"] for u in callback.updates] == pytest.approx([0.0, 0.28, 0.56, 0.8])
    total = sum(m.numel() for m in callback.masks.values())
    kept = sum(int(m.sum()) for m in callback.masks.values())
    assert kept == total - round(0.8 * total)


@pytest.mark.parametrize(
    ("nouns", "expected"),
    [
        ({"criterion": BatchNormScale(), "granularity": Slice(dim=0), "include": ["body.0"]}, 0.5),
        ({"criterion": Taylor()}, 0.5),
        ({"criterion": Fisher()}, 0.5),
        ({"criterion": ActivationVariance(), "granularity": Slice(dim=0), "include": ["body.0"]}, 0.5),
        ({"criterion": Wanda(), "scope": PerRow()}, 0.5),
        ({"criterion": APoZ(), "granularity": Slice(dim=0), "include": ["body.0"]}, 0.5),
        ({"criterion": Movement()}, 0.5),
        ({"criterion": Random(seed=3)}, 0.5),
        ({"schedule": Constant(), "window": Window(end=0.0)}, 0.5),
        ({"schedule": Constant(), "window": Window(end=0.0), "criterion": Saliency()}, 0.5),
        ({"schedule": Steps(num_steps=3)}, 0.5),
        ({"sparsity": None, "scope": NofM(n=1, m=4)}, 0.75),
        ({"sparsity": {"head": 0.25, "*": 0.5}}, None),
    ],
    ids=[
        "batch-norm-scale",
        "taylor",
        "fisher",
        "variance",
        "wanda",
        "apoz",
        "movement",
        "random",
        "one-shot",
        "snip",
        "steps",
        "n-of-m",
        "by-pattern",
    ],
)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulate"])
def test_every_kind_of_noun_reaches_its_target(nouns, expected, options):
    callback = pruning(**{"sparsity": 0.5, **nouns})
    witness = Witness(callback)
    _, module = fit(callback, Toy(), witness, **options)
    assert witness.violations == 0 and callback.ramp.is_over
    if expected:
        assert sparsity(module, callback) == pytest.approx(expected, abs=0.02)
    else:
        kept = {name: float(mask.float().mean()) for name, mask in callback.masks.items()}
        assert kept == {"body.0.weight": 0.5, "body.4.weight": 0.5, "head.weight": 0.75}


def test_alternating_brings_weights_back_and_ends_sparse():
    callback = pruning(schedule=Alternating(num_phases=4))
    nonzero = []

    class Reader(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            nonzero.append(
                sum(int(p.count_nonzero()) for n, p in pl_module.named_parameters() if p.dim() > 1)
            )

    _, module = fit(callback, Toy(), Reader())
    total = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    # dense, sparse, dense again, sparse
    dense = [n > 0.8 * total for n in nonzero]
    assert [a for a, b in zip(dense, [None, *dense], strict=False) if a != b] == [True, False, True, False]
    assert sparsity(module, callback) == pytest.approx(0.75, abs=0.005)


def test_gradients_of_two_optimizers_are_waited_for():
    callback = pruning(criterion=Saliency())
    witness = Witness(callback)
    fit(callback, GAN(), witness)
    assert witness.violations == 0 and callback.ramp.is_over
    assert {name.split(".")[0] for name in callback.masks} == {"generator", "discriminator"}
    assert [u["step"] for u in callback.updates][-1] == round(0.7 * 4 * NUM_BATCHES)


def test_steps_of_several_optimizers_count_once_a_batch():
    callback = pruning()
    run, _ = fit(callback, GAN())
    assert run.global_step == 8 * NUM_BATCHES and callback.ramp.num_steps == 4 * NUM_BATCHES


def test_one_of_two_optimizers():
    callback = pruning(include=["generator"])
    _, module = fit(callback, GAN())
    assert {name.split(".")[0] for name in callback.masks} == {"generator"}
    assert all(int(p.count_nonzero()) == p.numel() for n, p in module.discriminator.named_parameters())


def test_two_callbacks_prune_parts_of_one_model():
    body, head = pruning(0.9, include=["body"]), pruning(0.5, include=["head"])
    assert body.state_key != head.state_key
    _, module = fit(body, Toy(), head)
    assert sparsity(module, body) == pytest.approx(0.9, abs=0.01) and sparsity(module, head) == pytest.approx(
        0.5, abs=0.02
    )


def test_a_frozen_teacher_is_left_alone():
    module = Toy()
    module.teacher = copy.deepcopy(module.body).requires_grad_(False)
    callback = pruning()
    fit(callback, module)
    assert not [name for name in callback.masks if "teacher" in name]
    assert all(int(p.count_nonzero()) == p.numel() for p in module.teacher.parameters() if p.dim() > 1)


def test_sparsity_is_logged_and_shown_in_the_progress_bar():
    run, _ = fit(pruning(0.5))
    assert float(run.callback_metrics["pruning/sparsity"]) == pytest.approx(0.5, abs=0.005)
    assert float(run.progress_bar_metrics["pruning/sparsity"]) == pytest.approx(0.5, abs=0.005)


class Decaying(Toy):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_learning_rate_that_decays_before_the_ramp_ends_is_warned_of():
    callback = pruning(window=Window(end=0.9))
    with pytest.warns(
        UserWarning, match=r"learning rate had fallen to \d+% of its peak when the sparsity ramp ended"
    ):
        fit(callback, Decaying())
    assert len(callback.warnings) == 1
    calm = pruning(window=Window(end=0.4))
    fit(calm, Decaying())
    assert calm.warnings == []


def test_a_run_that_stops_early_says_what_was_reached():
    callback = pruning(window=Window(end=1.0, every=0.1))

    class Stopper(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step >= 9

    with pytest.warns(
        UserWarning, match=r"stopped after 9 steps, before the ramp ended at 24: sparsity is 0\.\d+"
    ):
        fit(callback, Toy(), Stopper())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_epochs": None, "max_time": "00:00:01:00"},
            r"`window` is counted in fractions of the run.*unit='steps'",
        ),
        ({"max_epochs": -1}, r"`window` is counted in fractions of the run"),
    ],
)
def test_a_run_of_unknown_length_is_refused_before_the_first_step(options, message):
    module = Toy()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(pruning(), module, **options)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"max_steps": 10, "max_epochs": -1}, 7),
        ({"max_epochs": 2}, 8),
        ({"max_epochs": 2, "limit_train_batches": 3}, 4),
        ({"max_epochs": 4, "accumulate_grad_batches": 4}, 6),
        ({"max_epochs": 100, "max_steps": 20}, 14),
        ({"max_epochs": 2, "overfit_batches": 2}, 3),
        ({"fast_dev_run": True}, 1),
        ({"max_epochs": 2, "max_time": "00:01:00:00"}, 8),
    ],
)
def test_the_window_is_resolved_from_the_trainers_own_estimate(options, last):
    callback = pruning()
    fit(callback, **options)
    assert callback.updates[-1]["step"] == last and callback.updates[-1]["progress"] == 1.0


def test_fractions_under_manual_optimization_with_max_steps_are_refused():
    with pytest.raises(ValueError, match=r"`max_steps`, 20, counts the steps of 2 optimizers together"):
        fit(pruning(), GAN(), max_steps=20, max_epochs=-1)
    fit(callback := pruning(window=Window(0, 8, 2, unit="steps")), GAN(), max_steps=20, max_epochs=-1)
    assert callback.ramp.is_over


class Seldom(Toy):
    """Accumulates by hand, over `every` batches."""

    def __init__(self, every):
        super().__init__()
        self.every, self.automatic_optimization = every, False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("unit", ["run", "epochs"])
def test_manual_optimization_that_steps_seldom_is_told_after_one_epoch(unit):
    seen = []

    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer, *_):
            seen.append(list(callback.warnings))

    callback = pruning(window=Window(0, 3 if unit == "epochs" else 0.75, unit=unit))
    early, late = "The first epoch took 3 optimizer steps", "Training stopped after 12 steps"
    with pytest.warns(UserWarning, match=early), pytest.warns(UserWarning, match=late):
        trainer(callback, Looks()).fit(Seldom(2), data(), data())
    assert [len(found) for found in seen] == [0, 1, 1, 1]
    assert (
        "took 3 optimizer steps, of 6 batches: the run will end after 12, before the ramp does, at 18"
        in seen[1][0]
    )


@pytest.mark.parametrize(("every", "window"), [(1, Window()), (2, Window(0, 9, 1, unit="steps"))])
def test_manual_optimization_in_time_hears_nothing(every, window):
    trainer(callback := pruning(window=window)).fit(Seldom(every), data(), data())
    assert callback.is_final and not callback.warnings


def test_epochs_as_the_unit():
    callback = pruning(window=Window(1, 3, 0.5, unit="epochs"))
    fit(callback)
    assert [u["step"] for u in callback.updates] == [6, 9, 12, 15, 18]


@pytest.mark.parametrize(
    ("nouns", "message"),
    [
        ({"exclude": ["haed"]}, r"'haed'. Did you mean head"),
        ({"sparsity": None, "scope": NofM(n=3, m=7)}, "3:7 needs an input dim"),
        ({"window": Window(0, 500, 5, unit="steps")}, "ends at optimizer step 500, but the run has 24 steps"),
        ({"include": ["body"], "exclude": ["body"]}, "leave nothing to prune"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(nouns, message):
    module = Toy()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(pruning(**nouns), module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("nouns", "message"),
    [
        ({"sparsity": 1.5}, r"`sparsity` is a sparsity"),
        ({"sparsity": "0.5"}, r"`sparsity` is a sparsity"),
        ({"sparsity": None}, "say how much"),
        ({"exclude": "head"}, "list of patterns"),
        ({"criterion": lambda weight: weight}, "keyword-only"),
    ],
)
def test_bad_values_are_refused_when_the_callback_is_built(nouns, message):
    with pytest.raises(ValueError, match=message):
        pruning(**nouns)


def test_a_strategy_that_shards_is_refused():
    from lightning.pytorch.strategies import ModelParallelStrategy

    with pytest.raises(ValueError, match=r"`strategy` keeps whole weights .* but got ModelParallelStrategy"):
        PostTrainingPruning(0.5).setup(trainer(strategy=ModelParallelStrategy()), Toy(), "fit")


def test_nothing_is_left_behind_and_a_crash_is_no_exception():
    callback = pruning(criterion=Wanda(), scope=PerRow())
    during = []

    class Reader(L.Callback):
        def on_train_start(self, trainer, pl_module):
            during.append((trainer.optimizers[0], len(trainer.optimizers[0]._optimizer_step_post_hooks)))

    _, module = fit(callback, Toy(), Reader())
    optimizer, num_hooks = during[0]
    assert num_hooks == 1 and not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_hooks for m in module.modules())

    class Crash(Toy):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 9:
                raise RuntimeError("crash")
            return super().training_step(batch, batch_idx)

    module = Crash()
    with pytest.raises(RuntimeError, match="crash"):
        fit(pruning(criterion=Wanda(), scope=PerRow()), module)
    assert not any(m._forward_hooks for m in module.modules())


def test_weights_keep_their_names_class_and_shape():
    module = Toy()
    before = {name: (type(p), p.shape) for name, p in module.named_parameters()}
    _, trained = fit(pruning(), module)
    assert {name: (type(p), p.shape) for name, p in trained.named_parameters()} == before
    assert not [name for name in trained.state_dict() if "mask" in name or "orig" in name]


def test_a_second_fit_goes_on_with_the_masks():
    """Fine-tuning with the same callback on the same module never loses sparsity."""
    callback = pruning()
    _, module = fit(callback)
    witness = Witness(callback)
    fit(callback, module, witness)
    assert (
        witness.reads
        and witness.violations == 0
        and sparsity(module, callback) == pytest.approx(0.75, abs=0.005)
    )


def test_another_module_starts_anew():
    callback = pruning()
    fit(callback)
    first = {name: mask.clone() for name, mask in callback.masks.items()}
    other = Toy()
    with torch.no_grad():
        other.head.weight.copy_(torch.randn(4, 8))
    fit(callback, other)
    assert callback.updates[0]["step"] == 0 and any(
        not torch.equal(first[n], callback.masks[n]) for n in first
    )


def test_global_masks_are_those_of_the_functional_form():
    callback = pruning(schedule=Constant(), window=Window(end=0.0), scope=Global())
    module = Toy()
    from lightning_prune import prune

    expected = prune(copy.deepcopy(module), 0.75)
    fit(callback, module)
    assert all(torch.equal(callback.masks[name], expected[name]) for name in expected)
    assert sparsity_of(callback.masks) == pytest.approx(0.75, abs=0.003)
