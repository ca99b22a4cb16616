"""What goes wrong with Lightning's ModelPruning and with other libraries, each as a test that passes here."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn

from lightning_prune import Constant, NofM, Polynomial, Steps, TrainTimePruning, Window
from lightning_prune.core.masks import sparsity_of
from tests.callbacks.toy import NUM_BATCHES, Toy, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")


def zeros(module):
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def fit(callback, module=None, *others, max_epochs=3, **options):
    module = module or Toy()
    run = trainer(callback, *others, max_epochs=max_epochs)
    run.fit(module, data(), data(), **options)
    return module


def test_half_is_half_however_many_updates_there_are():
    """ModelPruning(amount=0.5) prunes half of what is left after each epoch: 87.5 % after three."""
    theirs = fit(
        ModelPruning("l1_unstructured", amount=0.5, use_global_unstructured=True, parameters_to_prune=None)
    )
    assert zeros(theirs) > 0.8  # the trap is still there
    ours = fit(TrainTimePruning(0.5, schedule=Steps(num_steps=3), report=False))
    assert zeros(ours) == pytest.approx(0.5, abs=0.005)


def test_a_resumed_run_does_not_forget_its_masks(tmp_path):
    """ModelPruning's checkpoints hold no masks: two epochs after a resume its sparsity is 0."""

    def resumed(build, folder):
        checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fit(build(), None, checkpoint, max_epochs=2)
        module = Toy()
        fit(build(), module, max_epochs=4, ckpt_path=folder / "epoch=1.ckpt")
        return zeros(module)

    once = lambda epoch: epoch == 0  # noqa: E731
    theirs = resumed(
        lambda: ModelPruning("l1_unstructured", amount=0.5, use_global_unstructured=True, apply_pruning=once),
        tmp_path / "a",
    )
    ours = resumed(
        lambda: TrainTimePruning(0.5, window=Window(0, 6, 1, unit="steps"), report=False), tmp_path / "b"
    )
    assert theirs < 0.1 and ours == pytest.approx(0.5, abs=0.005)


def test_weights_are_not_renamed_in_training_and_load_anywhere(tmp_path):
    """ModelPruning renames `weight` to `weight_orig` while it trains."""
    names = []

    class Reader(Toy):
        def training_step(self, batch, batch_idx):
            names.append(set(self.state_dict()))
            return super().training_step(batch, batch_idx)

    fit(TrainTimePruning(0.5, report=False), Reader())
    assert set.union(*names) == set(Toy().state_dict())


def test_biases_are_kept():
    """ModelPruning prunes biases by default."""
    theirs = fit(ModelPruning("l1_unstructured", amount=0.9, use_global_unstructured=True))
    assert int((theirs.body[0].bias == 0).sum()) > 0
    callback = TrainTimePruning(0.9, report=False)
    ours = fit(callback)
    assert not [name for name in callback.masks if "bias" in name]
    assert all(int((p == 0).sum()) == 0 for n, p in ours.named_parameters() if n.endswith("bias"))


def test_no_copy_of_the_weights_is_kept_that_could_drift():
    """The lottery-ticket copy of ModelPruning, on by default, shares memory with the live weights."""
    callback, module = TrainTimePruning(0.5, report=False), Toy()
    fit(callback, module)
    addresses = {p.data_ptr() for p in module.parameters()}
    held = [v for v in vars(callback.pruner).values() if torch.is_tensor(v)]
    assert not held and {p.data_ptr() for p in callback.pruner.targets.values()} <= addresses


def test_an_end_off_the_grid_is_reached():
    """tfmot and JaxPruner update where `step % frequency == 0`, and miss an end that is no multiple."""
    callback = TrainTimePruning(
        0.8, schedule=Polynomial(), window=Window(0, 13, 5, unit="steps"), report=False
    )
    module = fit(callback)
    assert callback.updates[-1]["step"] == 13 and zeros(module) == pytest.approx(0.8, abs=0.003)


def test_n_of_m_follows_its_schedule():
    """JaxPruner's N:M prunes at once whatever the schedule says."""
    callback = TrainTimePruning(scope=NofM(), window=Window(0, 12, 3, unit="steps"), report=False)
    fit(callback)
    reached = [u["achieved"] for u in callback.updates]
    assert reached == sorted(reached) and reached[0] == 0.0 and 0.1 < reached[1] < 0.45 and reached[-1] == 0.5


def test_equal_scores_prune_exactly_what_was_asked_for():
    """Thresholds keep all or nothing of equal scores (llm-compressor, Torch-Pruning's global ties)."""
    module = Toy()
    with torch.no_grad():
        for p in (p for p in module.parameters() if p.dim() > 1):
            p.fill_(0.1)
    callback = TrainTimePruning(0.5, schedule=Constant(), window=Window(end=0.0), report=False)
    fit(callback, module)
    assert sparsity_of(callback.masks) == 0.5


def test_the_schedule_goes_on_after_a_load(tmp_path):
    """Cerebras drops the schedule's state on load and starts over."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    window = Window(0, 2 * NUM_BATCHES, 3, unit="steps")
    build = lambda: TrainTimePruning(0.8, window=window, report=False)  # noqa: E731
    fit(build(), None, checkpoint)
    callback = build()
    fit(callback, Toy(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [u["step"] for u in callback.updates] == [0, 3, 6, 9, 12]


def test_two_callbacks_do_not_share_state():
    """A default dict shared by two pruners (Torch-Pruning), masks global to the process (APEX ASP)."""
    first, second = TrainTimePruning(0.9, report=False), TrainTimePruning(0.1, report=False)
    a, b = fit(first), fit(second)
    assert zeros(a) == pytest.approx(0.9, abs=0.005) and zeros(b) == pytest.approx(0.1, abs=0.005)
    assert first.pruner is not second.pruner and first.recipe != second.recipe


def test_the_optimizer_holds_the_live_parameters():
    """fasterai leaves the optimizer with parameters that are no longer part of the model."""
    callback, module = TrainTimePruning(0.5, report=False), Toy()
    run = trainer(callback, max_epochs=2)
    held = []
    module.on_train_end = lambda: held.extend(p for g in run.optimizers[0].param_groups for p in g["params"])
    run.fit(module, data(), data())
    assert {id(p) for p in held} == {id(p) for p in module.parameters()}


def test_optimizers_that_get_a_closure_from_lightning_step_as_before():
    """rigl-torch wraps `optimizer.step` without the closure that Lightning passes, and nothing is trained."""
    plain, pruned = Toy(), Toy()
    trainer(max_epochs=1).fit(plain, data(), data())
    fit(TrainTimePruning(0.5, window=Window(0.9, 1.0), report=False), pruned, max_epochs=1)
    start = Toy()
    moved = [
        float((a - b).detach().abs().sum())
        for a, b in zip(pruned.parameters(), start.parameters(), strict=True)
    ]
    assert all(m > 0 for m in moved)
    assert isinstance(copy.deepcopy(pruned.head.weight), nn.Parameter)
