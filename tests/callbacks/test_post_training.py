"""One-shot pruning when fitting ends, and on a checkpoint without training."""

import copy
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune import (
    APoZ,
    Channel,
    Local,
    Magnitude,
    Movement,
    NofM,
    PerRow,
    PostTrainingPruning,
    Saliency,
    Slice,
    SynFlow,
    Wanda,
    Weight,
    preview,
    prune,
)
from lightning_prune.core.masks import sparsity_of
from lightning_prune.examples.loading import ResumableLoader
from tests.callbacks.toy import GAN, Toy, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")


class Plain(L.LightningDataModule):
    def train_dataloader(self) -> ResumableLoader:
        return data()

    def val_dataloader(self) -> ResumableLoader:
        return data()


def pruning(sparsity=0.5, **nouns):
    return PostTrainingPruning(sparsity, **{"report": False, **nouns})


def evaluate(module):
    return float(
        L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ).validate(module, data(), verbose=False)[0]["val/acc"]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained module and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    module = Toy(lr=0.03)
    trainer(ModelCheckpoint(folder, filename="dense"), max_epochs=10).fit(module, data(), data())
    return module, folder / "dense.ckpt"


def test_metrics_before_and_after_are_those_of_a_plain_validation():
    callback, module = pruning(0.9), Toy(lr=0.03)
    dense = {}

    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            dense.update(copy.deepcopy(pl_module.state_dict()))

    trainer(callback, Keep(), max_epochs=6).fit(module, data(), data())
    reference = Toy()
    reference.load_state_dict(dense)
    assert callback.metrics_before["val/acc"] == pytest.approx(evaluate(reference), abs=1e-6)
    expected = prune(reference, 0.9)
    assert callback.metrics_after["val/acc"] == pytest.approx(evaluate(reference), abs=1e-6)
    assert all(torch.equal(callback.masks[name], expected[name]) for name in expected)
    assert callback.metrics_before["val/acc"] > callback.metrics_after["val/acc"]
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in module.named_parameters())


def test_the_pruned_checkpoint_is_plain_and_masked_and_the_others_stay_dense(tmp_path):
    callback, module = pruning(0.8), Toy()
    trainer(callback, ModelCheckpoint(tmp_path, filename="dense"), max_epochs=2).fit(module, data(), data())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dense.ckpt", "pruned.ckpt"]
    pruned, dense = (
        torch.load(tmp_path / f, weights_only=True)["state_dict"] for f in ("pruned.ckpt", "dense.ckpt")
    )
    assert callback.path == str(tmp_path / "pruned.ckpt")
    Toy().load_state_dict(pruned, strict=True)
    for name, mask in callback.masks.items():
        assert torch.equal(pruned[name], dense[name] * mask)
    assert sparsity_of({n: dense[n] != 0 for n in callback.masks}) == 0.0


def test_the_best_checkpoint_is_what_is_pruned(tmp_path):
    class Worse(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))  # the first epoch is the best one

    callback = pruning(checkpoint="best")
    best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val/loss", save_top_k=-1)
    module = Worse()
    trainer(callback, best).fit(module, data(), data())
    first = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert best.best_model_path.endswith("epoch=0.ckpt")
    assert all(torch.equal(module.get_parameter(n), first[n] * m) for n, m in callback.masks.items())


def test_callbacks_that_choose_do_not_see_the_validations_around_pruning(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=1)
    stop = EarlyStopping("val/loss", patience=50)
    callback = pruning(0.95)
    trainer(callback, best, stop, max_epochs=3).fit(Toy(), data(), data())
    assert (
        float(best.best_model_score) == pytest.approx(callback.metrics_before["val/loss"], abs=1e-6)
        or float(best.best_model_score) <= callback.metrics_before["val/loss"]
    )
    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert all(bool((weights[n] != 0).all()) for n in callback.masks)


@pytest.mark.parametrize(
    "nouns",
    [
        {},
        {"criterion": Wanda(), "scope": PerRow()},
        {"criterion": Wanda(), "scope": NofM(), "sparsity": None},
        {"criterion": Saliency()},
        {"criterion": APoZ(), "granularity": Slice(dim=0), "scope": Local(), "include": ["body"]},
    ],
    ids=["magnitude", "wanda", "wanda-2:4", "saliency", "apoz"],
)
def test_on_a_checkpoint_without_training(nouns, trained, tmp_path):
    module, path = trained
    callback, fresh = pruning(**nouns), Toy()
    after = callback.run(trainer(callback, default_root_dir=tmp_path), fresh, Plain(), ckpt_path=path)
    assert callback.metrics_before["val/acc"] == pytest.approx(evaluate(module), abs=1e-6)
    assert after == callback.metrics_after and after["val/acc"] == pytest.approx(evaluate(fresh), abs=1e-6)
    for name, mask in callback.masks.items():
        assert torch.equal(fresh.get_parameter(name), module.get_parameter(name) * mask)
    assert sparsity_of(callback.masks) == pytest.approx(0.5, abs=0.02)
    weights = torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[n], p) for n, p in fresh.state_dict().items())


def test_calibration_is_what_the_functional_form_does(trained, tmp_path):
    module, path = trained
    callback, fresh, reference = (
        pruning(criterion=Wanda(), scope=PerRow(), num_calibration_batches=3),
        Toy(),
        Toy(),
    )
    callback.run(trainer(callback, default_root_dir=tmp_path), fresh, Plain(), ckpt_path=path)
    reference.load_state_dict(module.state_dict())
    expected = prune(reference, 0.5, criterion=Wanda(), scope=PerRow(), batches=list(data())[:3])
    assert all(torch.equal(callback.masks[n], m) for n, m in expected.items())


def test_calibration_leaves_no_trace(trained, tmp_path):
    """No logging, no metric updated, no batch-norm statistics moved, modes as before."""

    class Metered(Toy):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(4)

        def training_step(self, batch, batch_idx):
            self.accuracy.update(self(batch[0]), batch[1])
            self.log("train/acc", self.accuracy)
            self.log_dict({"train/other": 1.0})
            return super().training_step(batch, batch_idx)

    module, path = trained
    fresh = Metered()
    callback = pruning(criterion=Saliency(), scope=Local())
    callback.run(trainer(callback, default_root_dir=tmp_path), fresh, Plain(), ckpt_path=path)
    assert float(fresh.accuracy.tp.sum() if torch.is_tensor(fresh.accuracy.tp) else 0) == 0
    assert torch.equal(fresh.body[1].running_mean, module.body[1].running_mean)
    assert all(p.grad is None for p in fresh.parameters())
    assert "log" not in fresh.__dict__ and not any(m._forward_hooks for m in fresh.modules())


def test_batch_norm_is_reestimated_on_request(trained, tmp_path):
    module, path = trained
    plain, anew = Toy(), Toy()
    for fresh, flag in ((plain, False), (anew, True)):
        callback = pruning(0.8, reestimate_batch_norm=flag)
        callback.run(trainer(callback, default_root_dir=tmp_path), fresh, Plain(), ckpt_path=path)
    assert torch.equal(plain.body[1].running_mean, module.body[1].running_mean)
    outputs = [anew.body[0](x).detach() for x, _ in data()]
    torch.testing.assert_close(anew.body[1].running_mean, torch.stack([o.mean(0) for o in outputs]).mean(0))
    assert torch.equal(plain.body[0].weight, anew.body[0].weight)


@pytest.mark.parametrize(
    ("nouns", "module", "message"),
    [
        ({"checkpoint": "best"}, Toy, r'`checkpoint` is "best" only with a ModelCheckpoint\(monitor=...\)'),
        ({"exclude": ["haed"]}, Toy, "Did you mean head"),
        ({"criterion": Saliency()}, GAN, "gradients, which need automatic optimization"),
        ({"scope": NofM(n=3, m=7), "sparsity": None}, Toy, "3:7 needs an input dim"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(nouns, module, message):
    fresh = module()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer(pruning(**nouns)).fit(fresh, data(), data() if module is Toy else None)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


class Words(Toy):
    """Begins with an embedding, whose matrix the head may share, and has a layer that no step runs."""

    def __init__(self, is_tied=False):
        super().__init__()
        self.embedding, self.spare, self.is_tied = nn.Embedding(10, 8), nn.Linear(8, 8), is_tied

    def forward(self, x):
        hidden = self.embedding(x.abs().long().clamp(max=9)).mean(1)
        hidden = self.body(hidden)
        return hidden @ self.embedding.weight[:4].T if self.is_tied else self.head(hidden)


@pytest.mark.parametrize("granularity", [Weight(), Channel(multiple_of=1)], ids=str)
def test_what_no_flow_reaches_is_refused_before_the_first_step(granularity):
    """The flow begins behind the embedding: its gradients are those of a network whose input is one everywhere."""
    module = Words()
    include = ["embedding"] if granularity == Weight() else ["body", "spare"]
    fit = trainer(pruning(criterion=SynFlow(), granularity=granularity, include=include))
    name = "embedding" if granularity == Weight() else "spare"
    said = nullcontext() if granularity == Weight() else pytest.warns(UserWarning, match="`spare` is trained")
    with (
        said,
        pytest.raises(ValueError, match=rf"`{name}.weight` has no `flow_gradient`: no flow .* Exclude it"),
    ):
        fit.fit(module, data(), data())
    assert fit.global_step == 0


def test_what_flow_reaches_is_pruned_and_the_check_leaves_no_trace():
    found = {}
    for criterion in (SynFlow(), Magnitude()):
        module, callback = Words(is_tied=True), pruning(criterion=criterion, include=["embedding"])
        torch.manual_seed(7)
        trainer(callback).fit(module, data(), data())
        found[type(criterion)] = module, callback.masks["embedding.weight"]
    (module, mask), (other, other_mask) = found.values()
    both = mask & other_mask
    assert both.any() and not torch.equal(mask, other_mask)
    assert torch.equal(module.embedding.weight[both], other.embedding.weight[both])
    assert not module.embedding.weight[~mask].any()


class Counting(Toy):
    """Keeps count of its steps, in an attribute and in a buffer."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.seen += 1
        return super().training_step(batch, batch_idx)


def test_the_check_of_the_flow_is_no_step():
    starts = []

    class First(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            starts.append((trainer.global_step, module.calls, int(module.seen)))

    trainer(pruning(criterion=SynFlow(), include=["body"]), First()).fit(Counting(), data(), data())
    assert all(step == calls == seen for step, calls, seen in starts) and starts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"checkpoint": "bset"},
            r"`checkpoint` is one of \['last', 'best'\], but got 'bset'. Did you mean best\?",
        ),
        (
            {"num_calibration_batches": 0},
            r"`num_calibration_batches` is a whole number of at least 1, but got 0",
        ),
        ({"sparsity": -0.1}, r"`sparsity` is a sparsity"),
        ({"criterion": Movement()}, r"got Movement\(\), a sum over training: use TrainTimePruning"),
    ],
)
def test_bad_values_are_refused_when_the_callback_is_built(settings, message):
    with pytest.raises(ValueError, match=message):
        pruning(**settings)


def test_batches_alone_are_no_datamodule():
    with pytest.raises(ValueError, match="`datamodule` gives training batches, .* but got a ResumableLoader"):
        PostTrainingPruning(0.5).run(trainer(), Toy(), data())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("kind", ["no step", "no data", "no batches"])
def test_without_validation_data_it_prunes_all_the_same(kind):
    """Without the step, without the data for it, or with none of the data to be used."""

    class Bare(Toy):
        validation_step = L.LightningModule.validation_step

    callback, module = pruning(), (Bare if kind == "no step" else Toy)()
    options = {"limit_val_batches": 0} if kind == "no batches" else {}
    trainer(callback, **options).fit(module, data(), data() if kind == "no batches" else None)
    assert callback.metrics_before == {} == callback.metrics_after and callback.masks
    assert sparsity_of({n: module.get_parameter(n) != 0 for n in callback.masks}) == pytest.approx(
        0.5, abs=0.01
    )


def test_arguments_in_another_order_are_told():
    callback = PostTrainingPruning(0.5, report=False)
    with pytest.raises(
        ValueError, match="a Trainer and a LightningModule, in this order, but got Toy and Trainer"
    ):
        callback.run(Toy(), trainer(callback))
    with pytest.raises(ValueError, match="`pruning` and `model` are .* but got Toy and PostTrainingPruning"):
        preview(Toy(), callback, data())
