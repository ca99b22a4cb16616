"""Soft masks against training loops written out, in which masks are part of what autograd sees."""

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.func import functional_call
from torch.nn import functional as F

from lightning_prune import (
    Constant,
    Dormant,
    Linear,
    Movement,
    NofM,
    StraightThrough,
    TrainTimePruning,
    Window,
)
from tests.callbacks.toy import GAN, NUM_BATCHES, Toy, Witness, data, pruned_weights, trainer
from tests.core.test_masking import PublishedStraightThrough
from tests.hydra_runs import composed

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
LAST = 4 * NUM_BATCHES
END = 16  # step at which masks settle
EACH = Window(end=END, every=1, unit="steps")


class Plain(Toy):
    """Without dropout, so that a loop written out sees the same numbers."""

    def __init__(self, **options):
        super().__init__("SGD", **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options})
        self.body[3].p = 0.0


class Learned(torch.autograd.Function):
    """Sanh et al. 2020: forward top-k(S) W; to S goes dL/dW' W, to W dL/dW' times the mask."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, grad_output):
        weight, mask = ctx.saved_tensors
        return grad_output * mask, grad_output * weight, None


class Explored(torch.autograd.Function):
    """Jayakumar et al. 2020: forward the largest weights, A; dL/dw to these and a quarter of the layer more, B.

    The exploration loss is half the squares of B without A over the density of A.
    """

    @staticmethod
    def forward(ctx, weight, mask, decay):
        others = weight.abs()[~mask].sort(descending=True).values
        learning = ~mask & (weight.abs() >= others[round(0.25 * mask.numel()) - 1])
        ctx.save_for_backward(weight, mask, learning)
        ctx.rate = decay * mask.numel() / int(mask.sum())
        return weight * mask

    @staticmethod
    def backward(ctx, grad_output):
        weight, mask, learning = ctx.saved_tensors
        return grad_output * (mask | learning) + ctx.rate * weight * learning, None, None


def top(scores, sparsity):
    """Masks of the highest of all scores."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    order = flat.argsort(descending=True, stable=True)
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[: len(flat) - round(sparsity * len(flat))]] = True
    parts = mask.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def largest_of_each(weights):
    """ERK where it comes out even: as many of each layer as it has inputs and outputs, 60 of 288."""
    return {name: top({name: w.abs()}, 1 - sum(w.shape) / w.numel())[name] for name, w in weights.items()}


def two_of_four(scores):
    def one(s):
        best = s.view(-1, 4).argsort(dim=1, descending=True, stable=True)[:, :2]
        return torch.zeros(s.numel() // 4, 4, dtype=torch.bool).scatter_(1, best, True).view(s.shape)

    return {name: one(s) for name, s in scores.items()}


def by_hand(choose, read, start=0, every=1, **options):
    """Train without a callback: masks are chosen again and again up to END, and the network reads what `read` makes.

    choose: (weights, scores, progress) -> masks; read: (weight, scores, mask) -> what the network reads.
    """
    module = Plain(**options)
    weights = dict(module.named_parameters())
    names = [n for n, p in weights.items() if p.dim() == 2]
    scores = {n: torch.zeros_like(weights[n], requires_grad=True) for n in names}
    masks = {n: torch.ones_like(weights[n], dtype=torch.bool) for n in names}
    optimizer, learner = module.configure_optimizers(), torch.optim.SGD(scores.values(), lr=1.0)
    if start == 0:
        masks = choose({n: weights[n].detach() for n in names}, scores, 0.0)
    module.train()
    for step in range(1, LAST + 1):
        batch = list(data())[(step - 1) % NUM_BATCHES]
        settled = step > END
        seen = {n: weights[n] * masks[n] if settled else read(weights[n], scores[n], masks[n]) for n in names}
        loss = F.cross_entropy(functional_call(module, seen, (batch[0],)), batch[1])
        optimizer.zero_grad(), learner.zero_grad()
        loss.backward()
        optimizer.step(), learner.step()
        with torch.no_grad():
            if start <= step <= END and ((step - start) % every == 0 or step == END):
                masks = choose({n: weights[n] for n in names}, scores, (step - start) / (END - start))
            if step >= END:  # settled: what is pruned is gone, for the optimizer too
                for n in names:
                    weights[n] *= masks[n]
                    if state := optimizer.state[weights[n]]:
                        state["momentum_buffer"] *= masks[n]
    return masks, {n: p.detach() for n, p in weights.items()}


def fit(callback, module, *others, **options):
    run = trainer(callback, *others, **options)
    run.fit(module, data(), data() if isinstance(module, Toy) else None)
    return run


def assert_alike(callback, module, expected):
    masks, weights = expected
    assert set(masks) == set(callback.masks)
    assert all(torch.equal(mask, callback.masks[name]) for name, mask in masks.items())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_straight_through_is_the_loop_written_out(decay):
    callback, module = build(masking=StraightThrough(decay), schedule=Constant()), Plain()
    fit(callback, module)
    expected = by_hand(
        lambda weights, scores, progress: top({n: w.abs() for n, w in weights.items()}, 0.75),
        lambda weight, scores, mask: PublishedStraightThrough.apply(weight, mask, decay),
    )
    assert_alike(callback, module, expected)


def test_dpf_is_straight_through_along_a_ramp():
    callback, module = build(masking=StraightThrough(), schedule=Linear()), Plain()
    fit(callback, module)
    expected = by_hand(
        lambda weights, scores, progress: top({n: w.abs() for n, w in weights.items()}, 0.75 * progress),
        lambda weight, scores, mask: PublishedStraightThrough.apply(weight, mask, 0.0),
    )
    assert_alike(callback, module, expected)


def test_sr_ste_is_the_loop_written_out():
    callback, module = build(None, masking=StraightThrough(0.05), scope=NofM(), schedule=Constant()), Plain()
    fit(callback, module)
    expected = by_hand(
        lambda weights, scores, progress: two_of_four({n: w.abs() for n, w in weights.items()}),
        lambda weight, scores, mask: PublishedStraightThrough.apply(weight, mask, 0.05),
    )
    assert_alike(callback, module, expected)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0, "weight_decay": 0.0}], ids=["momentum", "plain"])
def test_top_kast_is_the_loop_written_out(every, options):
    """With plain gradient descent what lies outside of B rests, as published."""
    recipe = ("pruning=top_kast", "pruning.masking.wider=0.25", "pruning.masking.decay=0.05")
    window = (f"pruning.window.end={END / LAST}", f"pruning.window.every={every / LAST}")
    settings = composed(*recipe, *window, f"pruning.sparsity={1 - 60 / 288}").callbacks.pruning
    callback, module = instantiate(settings, report=False), Plain(**options)
    fit(callback, module)
    expected = by_hand(
        lambda weights, scores, progress: largest_of_each(weights),
        lambda weight, scores, mask: Explored.apply(weight, mask, 0.05),
        every=every,
        **options,
    )
    assert_alike(callback, module, expected)


def test_movement_behind_masks_has_the_scores_that_are_learned():
    window = Window(start=4, end=END, every=1, unit="steps")
    callback = build(masking=Dormant(), criterion=Movement(), schedule=Linear(), window=window)
    module = Plain()
    fit(callback, module)
    expected = by_hand(lambda weights, scores, progress: top(scores, 0.75 * progress), Learned.apply, start=4)
    assert_alike(callback, module, expected)


def build(sparsity=0.75, **options):
    return TrainTimePruning(sparsity, **{"window": EACH, "report": False, **options})


class Changes(L.Callback):
    """Counts the weights that come back."""

    def __init__(self, callback):
        self.callback, self.before, self.num_back = callback, {}, 0

    def on_train_batch_end(self, *_):
        masks = self.callback.masks
        self.num_back += sum(int((m & ~self.before[n]).sum()) for n, m in masks.items() if n in self.before)
        self.before = dict(masks)


@pytest.mark.parametrize("masking", [None, StraightThrough(), Dormant()], ids=str)
def test_weights_come_back_with_a_masking_and_never_without(masking):
    callback = build(masking=masking, criterion=Movement(), window=Window(2, END, 1, "steps"))
    changes = Changes(callback)
    fit(callback, Plain(), changes)
    assert (changes.num_back > 0) == (masking is not None)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Toy, {}),
        (lambda: Toy("SGD", momentum=0.9, weight_decay=0.1), {}),
        (lambda: Toy(fused=True), {}),
        (Toy, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}),
        (Toy, {"precision": "bf16-mixed"}),
        (Toy, {"precision": "bf16-true"}),
        (GAN, {}),
    ],
    ids=["adamw", "sgd", "fused", "accumulate-clip", "bf16-mixed", "bf16-true", "gan"],
)
@pytest.mark.parametrize("masking", [StraightThrough(0.01), Dormant()], ids=str)
def test_no_forward_reads_a_pruned_weight_as_nonzero(module, options, masking):
    callback = build(masking=masking, window=Window(every=1e-9))
    witness, trained = Witness(callback), module()
    fit(callback, trained, witness, **options)
    assert witness.reads > 20 and witness.violations == 0
    assert not any(bool(w.count_nonzero()) for w in pruned_weights(trained, callback))
    assert callback.pruner.sparsity == pytest.approx(0.75, abs=0.005) and not callback.pruner.behind


class Overflowing(Plain):
    """Gradients that overflow at some steps, in float16 or on request."""

    skips = (2, 3, 9)

    def training_step(self, batch, batch_idx):
        seen = self.trainer.current_epoch * NUM_BATCHES + batch_idx
        return super().training_step(batch, batch_idx) * (float("inf") if seen in self.skips else 1.0)


def test_a_step_that_mixed_precision_skips_leaves_masks_and_what_is_behind_them_alone():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    callback, behind = build(masking=StraightThrough(), schedule=Constant()), []

    class Reader(L.Callback):
        def on_train_batch_end(self, *_):
            behind.append((dict(callback.masks), {n: w.clone() for n, w in callback.pruner.behind.items()}))

    witness = Witness(callback)
    module = Overflowing()
    fit(callback, module, witness, Reader(), plugins=plugins)
    assert witness.reads > 20 and witness.violations == 0
    for step in (2, 3, 9):
        before, after = behind[step - 1], behind[step]
        assert all(torch.equal(w, after[1][n]) for n, w in before[1].items()) and after[1]
    assert any(not torch.equal(w, behind[4][1][n]) for n, w in behind[3][1].items())
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_checkpoints_hold_plain_masked_weights_and_what_is_behind_them(tmp_path):
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callback, module = build(masking=StraightThrough()), Plain()
    fit(callback, module, every)
    middle = torch.load(tmp_path / "step=10.ckpt", weights_only=True)
    state = middle["callbacks"]["TrainTimePruning"]["pruner"]
    assert set(middle["state_dict"]) == set(Plain().state_dict())
    Plain().load_state_dict(middle["state_dict"])
    for name, kept in ((n, middle["state_dict"][n] != 0) for n in state["masks"]):
        behind = state["behind"][name]
        assert int((~kept).sum()) > 0 and bool(behind[~kept].count_nonzero())
        assert torch.equal(behind[kept], middle["state_dict"][name][kept])
    last = torch.load(tmp_path / f"step={LAST}.ckpt", weights_only=True)
    assert last["callbacks"]["TrainTimePruning"]["pruner"]["behind"] == {}


def test_an_average_of_the_weights_is_as_sparse():
    callback, module = build(masking=StraightThrough()), Plain()
    fit(callback, module, EMAWeightAveraging(decay=0.9))
    assert not any(bool(w.count_nonzero()) for w in pruned_weights(module, callback))


def test_updates_at_one_sparsity_are_written_down_once():
    callback = build(masking=StraightThrough(), schedule=Constant())
    fit(callback, Plain())
    assert [update["step"] for update in callback.updates] == [END]
    callback = build(masking=StraightThrough(), schedule=Linear())
    fit(callback, Plain())
    assert [update["step"] for update in callback.updates] == list(range(END + 1))


def test_an_optimizer_that_asks_for_the_loss_within_a_step_is_refused():
    with pytest.raises(ValueError, match="`masking` needs an optimizer that reads one gradient a step"):
        fit(build(masking=StraightThrough()), Toy("LBFGS"))


@pytest.mark.parametrize("first", [None, StraightThrough()], ids=str)
def test_a_run_can_be_gone_on_with_other_masks(first, tmp_path):
    second = StraightThrough() if first is None else None
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(build(masking=first), Plain(), every)
    callback, module = build(masking=second), Plain()
    was = r"`masking` was (None|StraightThrough\(.*\)) in the run that is resumed, and is (None|StraightThrough)"
    with pytest.warns(UserWarning, match=was):
        trainer(callback).fit(module, data(), data(), ckpt_path=tmp_path / "step=10.ckpt")
    assert callback.pruner.sparsity == pytest.approx(0.75, abs=0.005)
    assert not any(bool(w.count_nonzero()) for w in pruned_weights(module, callback))
