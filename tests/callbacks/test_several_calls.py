"""Steps that call several modules, one after the other or one on several inputs: all of them become smaller."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import (
    Budget,
    Channel,
    Fisher,
    GraSP,
    InitialPruning,
    Layer,
    Magnitude,
    PerRow,
    PostTrainingPruning,
    Saliency,
    SparseGPT,
    SparsityMonitor,
    TrainTimePruning,
    Wanda,
    Window,
    load_pruned,
    preview,
    shrink,
)
from lightning_prune.model.history import plans_of
from tests.callbacks.toy import Toy, data, trainer

CHANNELS = {"granularity": Channel(multiple_of=1), "report": False}


def images():
    draw = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(48, 32, generator=draw)), 8)


def pairs():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(48, 20, generator=draw)
    return DataLoader(TensorDataset(x, torch.randint(0, 30, (48,), generator=draw)), 8)


class AutoEncoder(Toy):
    """Lightning's own first example: the step calls an encoder, then a decoder."""

    def __init__(self):
        super().__init__()
        del self.body, self.head
        self.encoder = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 32))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.decoder(self.encoder(batch[0])), batch[0])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


class TwoInputs(Toy):
    """One model, called on an image and on a text: each call takes another way through it."""

    def __init__(self):
        super().__init__()
        del self.body, self.head
        self.image, self.text = nn.Linear(20, 16), nn.Embedding(30, 16)
        self.trunk = nn.Sequential(nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, image=None, text=None):
        return self.trunk(self.image(image) if text is None else self.text(text))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(image=batch[0]), self(text=batch[1]))

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("shrink_at", ["end", "update"])
def test_encoder_and_decoder_become_smaller_and_what_lies_between_stays(shrink_at, tmp_path):
    callback = TrainTimePruning(0.5, shrink=shrink_at, **CHANNELS)
    fit = trainer(callback, default_root_dir=tmp_path)
    fit.fit(module := AutoEncoder(), images(), images())
    encoder, decoder = module.encoder, module.decoder
    assert encoder[0].out_features + decoder[0].out_features == pytest.approx(22, abs=1)
    assert encoder[0].out_features < 24 and decoder[0].out_features < 20
    assert (encoder[2].out_features, decoder[0].in_features, decoder[2].out_features) == (4, 4, 32)
    frozen = callback.pruner.couplings.frozen
    assert (frozen["encoder.2.bias[0]"], frozen["decoder.2.bias[0]"]) == (
        "output of `encoder`",
        "output of `decoder`",
    )
    fit.save_checkpoint(tmp_path / "small.ckpt")
    loaded = load_pruned(AutoEncoder, tmp_path / "small.ckpt")
    x = torch.rand(3, 32)
    assert torch.equal(loaded.decoder(loaded.encoder(x)), decoder(encoder(x)))


def test_a_plan_for_several_calls_keeps_what_stays_of_each():
    callback = PostTrainingPruning(0.5, **CHANNELS)
    trainer(trained := Keeps(), callback).fit(module := AutoEncoder(), images(), images())
    (plan,) = plans_of(module)
    for name, weight in module.named_parameters():
        expected = trained.weights[name]
        for dim, kept in plan.slices.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(kept))
        assert torch.equal(weight, expected)
    assert {"encoder.0.weight", "encoder.2.weight", "decoder.0.weight", "decoder.2.weight"} <= set(
        plan.slices
    )


class Keeps(L.Callback):
    """Keeps the weights as they are after the last step, before anything is pruned."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}


def test_a_budget_counts_the_work_of_all_calls(tmp_path):
    def work(module):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module.decoder(module.encoder(torch.rand(8, 32)))
        return counter.get_total_flops()

    monitor = SparsityMonitor(latency=False, show=False)
    callback = TrainTimePruning(budget=Budget(macs=0.5), granularity=Channel(multiple_of=1))
    before = work(module := AutoEncoder())
    trainer(callback, monitor, default_root_dir=tmp_path).fit(module, images(), images())
    assert monitor.report.target_sparsity is None and monitor.report.updates[-1].requested is None
    assert work(module) == pytest.approx(0.5 * before, rel=0.03)
    assert (
        monitor.report.cost_before.macs == before // 2 and monitor.report.cost_after.macs == work(module) // 2
    )


@pytest.mark.parametrize("kind", [TrainTimePruning, PostTrainingPruning])
def test_all_ways_through_a_model_follow(kind):
    trainer(kind(0.5, **CHANNELS)).fit(module := TwoInputs(), pairs(), pairs())
    assert module.image.out_features == module.text.embedding_dim == module.trunk[1].in_features < 16
    assert module.trunk[1].out_features == module.trunk[3].in_features < 12


class Auxiliary(Toy):
    """Gives a second output in training, as GoogLeNet does, and its step asks for both."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(8, 4)

    def forward(self, x):
        h = self.body(x)
        return (self.head(h), self.auxiliary(h)) if self.training else self.head(h)

    def training_step(self, batch, batch_idx):
        first, second = self(batch[0])
        return F.cross_entropy(first, batch[1]) + 0.4 * F.cross_entropy(second, batch[1])


@pytest.mark.parametrize("kind", [TrainTimePruning, PostTrainingPruning])
def test_outputs_of_training_alone_follow(kind):
    trainer(kind(0.5, **CHANNELS)).fit(module := Auxiliary(), data(), data())
    assert module.auxiliary.in_features == module.head.in_features == module.body[4].out_features < 8
    x = torch.randn(3, 8)
    assert [y.shape for y in module.train()(x)] == [(3, 4), (3, 4)] and module.eval()(x).shape == (3, 4)


class Teaches(AutoEncoder):
    """A second encoder that nobody has frozen is asked without gradients."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            goal = self.teacher(batch[0])
        return F.mse_loss(self.encoder(batch[0]), goal) + super().training_step(batch, batch_idx)


def test_what_is_asked_without_gradients_is_no_part_of_what_is_pruned():
    callback = TrainTimePruning(0.5, exclude=["teacher"], **CHANNELS)
    trainer(callback).fit(module := Teaches(), images(), images())
    assert module.teacher[0].out_features == 24 > module.encoder[0].out_features


class AsksItself(AutoEncoder):
    """Its encoder is asked without gradients first, on a batch of the same shape."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            goal = self.encoder(batch[0].flip(0))
        return F.mse_loss(self.encoder(batch[0]), goal) + super().training_step(batch, batch_idx)


def test_what_is_asked_without_gradients_too_is_pruned():
    trainer(TrainTimePruning(0.5, **CHANNELS)).fit(module := AsksItself(), images(), images())
    assert module.encoder[0].out_features < 24 and module.decoder[0].out_features < 20


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x, gives_features=False):
        h = self.first(x).relu()
        return h if gives_features else self.last(self.second(h).relu())


class KeepsFeatures(Toy):
    """Its step reads features without gradients, for a bank of their width."""

    def __init__(self):
        super().__init__()
        self.network = Features()
        self.register_buffer("bank", torch.zeros(16))
        del self.body, self.head

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.bank += self.network(batch[0], gives_features=True).mean(0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("shrink_at", ["end", "update"])
def test_what_a_trained_module_gives_without_gradients_stays_whole(shrink_at):
    callback = TrainTimePruning(0.5, shrink=shrink_at, **CHANNELS)
    trainer(callback).fit(module := KeepsFeatures(), data(), data())
    assert module.network.first.out_features == 16 > module.network.second.out_features


class AsksInSteps(TwoInputs):
    """Asks itself for images of many sizes of a batch before it reads the text."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for num in range(1, 7):
                self(image=batch[0][:num])
        return self(text=batch[1]).square().mean() + self(image=batch[0]).square().mean()


def test_many_calls_without_gradients_hide_none_with_them():
    callback = TrainTimePruning(0.5, **CHANNELS)
    trainer(callback).fit(module := AsksInSteps(), pairs(), pairs())
    assert module.image.out_features == module.text.embedding_dim == module.trunk[1].in_features < 16


class Checkpointed(Toy):
    """Its body is run once more in the backward pass."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            return super().forward(x)
        return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_reports_do_not_count_what_the_backward_pass_repeats(reentrant, tmp_path):
    def costs(module):
        monitor = SparsityMonitor(latency=False, show=False)
        callback = TrainTimePruning(0.5, granularity=Channel(multiple_of=1))
        fit = trainer(callback, monitor, default_root_dir=tmp_path, num_sanity_val_steps=0)
        fit.fit(module, data(), data())
        return monitor.report.cost_before.macs, monitor.report.cost_after.macs

    assert costs(Checkpointed(reentrant)) == costs(Checkpointed())


class Whole(AutoEncoder):
    """Is called as a whole in validation, where its training step calls two modules, by hand if asked so."""

    def __init__(self, is_manual=False):
        super().__init__()
        self.automatic_optimization = not is_manual

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.mse_loss(self(batch[0]), batch[0]))


@pytest.mark.parametrize(
    ("kind", "num_sanity_val_steps", "is_manual"),
    [("update", 0, False), ("update", 2, False), ("post", 0, True), ("post", 2, False), ("initial", 0, True)],
)
def test_reports_compare_the_same_call_before_and_after(kind, num_sanity_val_steps, is_manual, tmp_path):
    callback = {
        "update": lambda: TrainTimePruning(0.5, shrink="update", granularity=CHANNELS["granularity"]),
        "post": lambda: PostTrainingPruning(0.5, granularity=CHANNELS["granularity"]),
        "initial": lambda: InitialPruning(
            0.5, criterion=Magnitude(), shrink="end", granularity=CHANNELS["granularity"]
        ),
    }[kind]()
    sizes = {"default_root_dir": tmp_path, "num_sanity_val_steps": num_sanity_val_steps}
    trainer(callback, monitor := SparsityMonitor(show=False), **sizes).fit(
        module := Whole(is_manual), images(), images()
    )
    before, after = monitor.report.cost_before, monitor.report.cost_after
    assert before.macs == 8 * sum(w.numel() for w in AutoEncoder().parameters() if w.dim() > 1)
    assert after.macs == 8 * sum(w.numel() for w in module.parameters() if w.dim() > 1) < before.macs
    assert before.latency and after.latency and not before.unmeasured


class MixedPrecision(AutoEncoder):
    """Computes its decoder alone in bfloat16, which is called in two pieces."""

    def training_step(self, batch, batch_idx):
        code = self.encoder(batch[0])
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(self.decoder[1:](self.decoder[0](code)).float(), batch[0])


def test_each_call_is_measured_in_the_precision_that_it_had(tmp_path):
    callback = TrainTimePruning(0.5, granularity=CHANNELS["granularity"])
    fit = trainer(callback, monitor := SparsityMonitor(show=False), default_root_dir=tmp_path)
    fit.fit(module := MixedPrecision(), images(), images())
    before, after = monitor.report.cost_before, monitor.report.cost_after
    assert before.macs == 8 * sum(w.numel() for w in AutoEncoder().parameters() if w.dim() > 1)
    assert after.macs == 8 * sum(w.numel() for w in module.parameters() if w.dim() > 1) < before.macs
    assert before.latency and after.latency and not before.unmeasured and not after.unmeasured


class Phases(AutoEncoder):
    """Asks a second decoder, too: in its first epochs, or in its last ones."""

    def __init__(self, is_first=True):
        super().__init__()
        self.second = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 32))
        self.is_first = is_first

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if (self.global_step < 9) == self.is_first and (self.current_epoch < 2) == self.is_first:
            loss = loss + F.mse_loss(self.second(self.encoder(batch[0])), batch[0])
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", super().training_step(batch, batch_idx))


class SavesAfter(L.Callback):
    """Saves a checkpoint at the end of an epoch."""

    def __init__(self, path, epoch=1):
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("target", [{"sparsity": 0.5, "shrink": "update"}, {"budget": Budget(macs=0.5)}])
@pytest.mark.filterwarnings("ignore:`second` is trained, but no part of the call")
def test_a_resumed_run_follows_the_calls_that_the_first_one_saw(target, is_first, tmp_path):
    def fitted(path=None):
        saving = [SavesAfter(tmp_path / "half.ckpt")] if path is None else []
        fit = trainer(TrainTimePruning(**target, **CHANNELS), *saving)
        fit.fit(module := Phases(is_first), images(), images(), ckpt_path=path)
        assert (fit.current_epoch, fit.global_step) == (4, 24)
        return module.state_dict()

    straight, resumed = fitted(), fitted(tmp_path / "half.ckpt")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    assert (len(straight["second.0.bias"]) < 16) == is_first


class PerSample(Toy):
    """Calls its body once more for each example on its own, under vmap, and if asked so only then."""

    def __init__(self, is_all=False):
        super().__init__()
        self.network, self.is_all = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), is_all
        del self.body, self.head

    def forward(self, x):
        weights = dict(self.network.named_parameters())
        each = torch.vmap(lambda row: functional_call(self.network, weights, (row[None],))[0])(x)
        return each if self.is_all else each + self.network(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(PerSample.forward(self, batch[0]), batch[1])


def test_what_runs_under_vmap_is_not_followed():
    trainer(TrainTimePruning(0.5, **CHANNELS)).fit(module := PerSample(), data(), data())
    assert module.network[0].out_features == module.network[2].in_features == 8
    with pytest.raises(ValueError, match="What runs under torch.func, as with vmap, is not followed"):
        trainer(TrainTimePruning(0.5, **CHANNELS)).fit(PerSample(is_all=True), data(), data())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.easy, self.hard = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(16, 2)

    def forward(self, x):
        h = self.stem(x).relu()
        return self.easy(h) if float(x.sum()) > 0 else self.hard(h)


def test_a_module_that_the_call_does_not_reach_is_named():
    with pytest.warns(UserWarning, match="`hard` is trained, but no part of the call"):
        shrink(Branches(), torch.ones(2, 8), 0.5)
    plan = shrink(small := Branches(), torch.ones(2, 8), 0.5, exclude=["hard"])
    assert plan.slices and small.hard.in_features == 16


class Adds(nn.Module):
    """A pre-norm block of one branch."""

    def __init__(self, width, is_small=False):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU())
        if is_small:
            nn.init.normal_(self.branch[0].weight, std=1e-3)
            nn.init.zeros_(self.branch[0].bias)

    def forward(self, x):
        return x + self.branch(self.norm(x))


class DeepAutoEncoder(AutoEncoder):
    """The encoder's second and the decoder's third block add next to nothing; the encoder is called on two inputs."""

    def __init__(self, is_siamese=False):
        super().__init__()
        self.is_siamese = is_siamese
        torch.manual_seed(0)
        self.encoder = nn.Sequential(*(Adds(32, place == 1) for place in range(4)), nn.Linear(32, 8))
        self.decoder = nn.Sequential(*(Adds(8, place == 2) for place in range(4)), nn.Linear(8, 32))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.encoder(batch[0][:4].flip(0)).square().mean() if self.is_siamese else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("is_siamese", [False, True])
def test_blocks_of_all_modules_that_a_step_calls_compete(is_siamese, unit, tmp_path):
    fit = trainer(PostTrainingPruning(2 / 8, granularity=Layer(unit=unit)), default_root_dir=tmp_path)
    fit.fit(module := DeepAutoEncoder(is_siamese), images(), images())
    inside = "" if unit == "block" else ".branch"
    (plan,) = plans_of(module)
    assert set(plan.replaced) == {f"encoder.1{inside}", f"decoder.2{inside}"}
    fit.save_checkpoint(tmp_path / "small.ckpt")
    loaded = load_pruned(DeepAutoEncoder, tmp_path / "small.ckpt", is_siamese=is_siamese)
    x = torch.rand(3, 32)
    assert torch.equal(loaded.decoder(loaded.encoder(x)), module.decoder(module.encoder(x)))


def test_a_budget_of_blocks_counts_the_work_of_all_calls(tmp_path):
    monitor = SparsityMonitor(latency=False, show=False)
    callback = PostTrainingPruning(budget=Budget(macs=0.6, tolerance=0.05), granularity=Layer())
    trainer(callback, monitor, default_root_dir=tmp_path).fit(DeepAutoEncoder(), images(), images())
    before, after = monitor.report.cost_before.macs, monitor.report.cost_after.macs
    assert before == 8 * (4 * 32 * 32 + 2 * 32 * 8 + 4 * 8 * 8)
    assert after / before == pytest.approx(0.6, abs=0.05)


def by_tasks():
    """The batches of `data`, by turns of one task and of another, which the first feature tells."""
    loader = data()
    loader.dataset.inputs[:, 0] = 1 - 2 * (torch.arange(48) // 8 % 2)
    return loader


class Tasks(Toy):
    """Each batch is of one task, and runs its head alone."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: self.new_head() for name in ("easy", "hard")})
        del self.head

    def new_head(self):
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x):
        return self.heads["easy" if x[0, 0] > 0 else "hard"](self.body(x))


class SavesAtStep(L.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [4, 9])
@pytest.mark.parametrize("target", [{"sparsity": 0.5, "shrink": "update"}, {"budget": Budget(macs=0.5)}])
@pytest.mark.filterwarnings("error:`heads")
def test_what_other_batches_run_follows_and_a_resumed_run_sees_the_same(target, step, tmp_path):
    def fitted(path=None):
        saving = [SavesAtStep(tmp_path / "half.ckpt", step)] if path is None else []
        fit = trainer(TrainTimePruning(**target, **CHANNELS), *saving)
        fit.fit(module := Tasks(), by_tasks(), by_tasks(), ckpt_path=path)
        assert fit.global_step == 24
        return module.state_dict()

    straight, resumed = fitted(), fitted(tmp_path / "half.ckpt")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    trunk = len(straight["body.4.bias"])
    for head in ("easy", "hard"):
        assert straight[f"heads.{head}.0.weight"].shape[1] == trunk < 8
        assert len(straight[f"heads.{head}.0.bias"]) < 12


class AnchoredTask(Tasks):
    """The easy task, which the first batch is of, holds biases near to what they were, beside all calls."""

    def __init__(self):
        super().__init__()
        self.anchor = self.body[4].bias.detach().clone()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.body[4].bias - self.anchor).square().sum() if batch[0][0, 0] > 0 else loss


def test_steps_are_tried_on_each_batch_that_showed_a_call():
    callback = TrainTimePruning(0.5, **CHANNELS)
    with pytest.warns(
        UserWarning, match=r"`body.4.weight` stays whole, since `training_step` fails once it is"
    ):
        trainer(callback).fit(module := AnchoredTask(), by_tasks(), by_tasks())
    assert module.body[4].out_features == 8 and module.body[0].out_features < 16


@pytest.mark.parametrize("kind", [PostTrainingPruning, InitialPruning])
def test_what_other_batches_run_follows_outside_of_training(kind):
    trainer(kind(0.5, criterion=Magnitude(), **CHANNELS)).fit(module := Tasks(), by_tasks(), by_tasks())
    trunk = module.body[4].out_features
    assert {head[0].in_features for head in module.heads.values()} == {trunk} and trunk < 8


def test_a_preview_tells_of_what_other_batches_run():
    found = preview(TrainTimePruning(0.5, granularity=Channel(multiple_of=1)), Tasks(), by_tasks())
    after = {layer.name: layer.shape_after for layer in found.layers}
    assert found.is_fine and after["heads.easy.0.weight"][1] == after["heads.hard.0.weight"][1] < 8


class Stream(IterableDataset):
    """Rows of an iterator that nobody can start anew."""

    def __init__(self):
        self.rows = iter(data().dataset.inputs)

    def __iter__(self):
        return self.rows


class Shuffled(Toy):
    """Notes the batches that it is trained on; has prompts, and may have a layer that no step runs."""

    def __init__(self, has_unused=False):
        super().__init__()
        self.prompts = nn.ParameterList([nn.Parameter(torch.zeros(8))])
        self.unused = nn.Linear(8, 2) if has_unused else None
        self.seen, self.num_others = [], SimpleNamespace(value=0)

    def training_step(self, batch, batch_idx):
        if self.training:
            self.seen.append(batch[:, 0].tolist())
        else:
            self.num_others.value += 1
        return self(batch + self.prompts[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self(batch).square().mean())


@pytest.mark.parametrize("has_unused", [False, True])
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.filterwarnings("ignore:`(prompts|unused)` is trained, but no part of the call")
def test_looking_at_more_batches_takes_none_from_training(is_stream, has_unused):
    def seen(*callbacks):
        rows, draw = data().dataset.inputs, torch.Generator().manual_seed(0)
        order = {"shuffle": True, "generator": draw}
        loader = DataLoader(Stream(), 8) if is_stream else DataLoader(rows, 8, **order)
        fit = trainer(*callbacks, max_epochs=1 if is_stream else 2)
        fit.fit(module := Shuffled(has_unused), loader, DataLoader(rows, 8))
        return module

    plain, pruned = seen(), seen(TrainTimePruning(0.5, **CHANNELS, window=Window(1, 4, 1, "steps")))
    assert pruned.seen == plain.seen and pruned.body[0].out_features < 16
    assert (pruned.num_others.value > 4) is (has_unused and not is_stream)


class Deep(Toy):
    """Supervised within, too, by a head that runs in training alone: its step runs in eval mode as well."""

    def __init__(self):
        super().__init__()
        del self.body, self.head
        self.stem, self.trunk = nn.Linear(8, 32), nn.Linear(32, 16)
        self.aux, self.head = nn.Linear(32, 4), nn.Linear(16, 4)

    def forward(self, x):
        within = self.stem(x).relu()
        out = self.head(self.trunk(within).relu())
        return (out, self.aux(within)) if self.training else out

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        if not isinstance(out, tuple):
            return F.cross_entropy(out, batch[1])
        return sum(F.cross_entropy(one, batch[1]) for one in out)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainTimePruning(0.5, window=Window(end=0.5, every=0.1), **CHANNELS),
        lambda: TrainTimePruning(0.5, shrink="update", window=Window(end=0.5, every=0.1), **CHANNELS),
        lambda: InitialPruning(0.5, **CHANNELS),
    ],
    ids=["end", "update", "initial"],
)
def test_a_head_that_runs_in_training_alone_becomes_smaller_with_what_it_reads(make):
    module, callback = Deep(), make()
    run = trainer(callback, max_epochs=3)
    run.fit(module, data(), data())
    assert run.global_step == 18 and not callback.warnings
    width = module.stem.out_features
    assert width < 32 and module.aux.in_features == module.trunk.in_features == width


@pytest.mark.parametrize(
    "make",
    [
        lambda: InitialPruning(0.5, report=False),
        lambda: InitialPruning(0.5, criterion=GraSP(), report=False),
        lambda: PostTrainingPruning(0.5, criterion=Fisher(), report=False),
        lambda: PostTrainingPruning(0.5, criterion=Wanda(), scope=PerRow(), report=False),
    ],
    ids=["snip", "grasp", "fisher", "wanda"],
)
def test_what_is_measured_of_a_head_that_runs_in_training_alone_is_measured_in_training(make):
    callback = make()
    trainer(callback, max_epochs=1).fit(Deep(), data(), data())
    assert "aux.weight" in callback.masks and callback.pruner.sparsity == pytest.approx(0.5, abs=0.01)


class Remembering(Toy):
    """Keeps a queue and counts its steps in buffers, as contrastive methods do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(6, 4))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        with torch.no_grad():
            self.queue[self.num_steps % 6] = out[0]
            self.num_steps += 1
        return F.cross_entropy(out, batch[1]) + (out @ self.queue.clone().T).square().mean()


@pytest.mark.parametrize(
    "make",
    [
        lambda: InitialPruning(0.5, report=False),
        lambda: InitialPruning(0.5, num_rounds=4, report=False),
        lambda: PostTrainingPruning(0.5, criterion=Wanda(), scope=PerRow(), report=False),
        lambda: PostTrainingPruning(0.5, solver=SparseGPT(), reestimate_batch_norm=True, report=False),
        lambda: PostTrainingPruning(0.5, criterion=Saliency(), **CHANNELS),
    ],
    ids=["snip", "rounds", "wanda", "sparsegpt", "channels"],
)
def test_calibration_leaves_what_a_step_keeps_in_buffers_as_it_was(make):
    module, twin = Remembering(), Remembering()
    for each, callbacks in ((twin, []), (module, [make()])):
        torch.manual_seed(0)  # of dropout
        trainer(*callbacks, max_epochs=1).fit(each, data(), data())
    assert int(module.num_steps) == int(twin.num_steps) == 6
    if not isinstance(make(), InitialPruning):
        assert torch.equal(module.queue, twin.queue)


class AveragesInStep(Toy):
    """A momentum encoder that the step itself updates, as MoCo's code does, and a weight of its loss."""

    def __init__(self):
        super().__init__()
        self.average = copy.deepcopy(self.body).requires_grad_(False)
        self.balance = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(()))})

    def update_(self):
        with torch.no_grad():
            for ours, its in zip(self.body.parameters(), self.average.parameters(), strict=True):
                its.mul_(0.9).add_(ours, alpha=0.1)

    def training_step(self, batch, batch_idx):
        if self.in_step:
            self.update_()
        return super().training_step(batch, batch_idx) * self.balance["weight"].exp() + self.balance["weight"]

    def on_train_batch_end(self, *_):
        if not self.in_step:
            self.update_()


def test_an_average_that_the_step_itself_updates_is_named_with_what_helps():
    module = AveragesInStep()
    module.in_step = True
    with pytest.raises(
        ValueError, match="average weights into `average` in on_train_batch_end, not in the step"
    ):
        trainer(TrainTimePruning(0.5, **CHANNELS)).fit(module, data(), data())
    module = AveragesInStep()
    module.in_step = False
    trainer(callback := TrainTimePruning(0.5, **CHANNELS), max_epochs=2).fit(module, data(), data())
    assert module.average[0].out_features == module.body[0].out_features < 16
    assert (
        not callback.warnings
    )  # none of the number that weighs the loss, which fits whatever becomes smaller
