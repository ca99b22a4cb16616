"""Solvers after training, by the callback: the module's own steps calibrate, and the report says what was done."""

import copy

import pytest
import torch
from lightning import Callback
from torch.nn import functional as F

from lightning_prune import (
    OBD,
    Channel,
    LeastSquares,
    Local,
    NofM,
    PostTrainingPruning,
    Saliency,
    SparseGPT,
    WoodFisher,
    load_pruned,
    prune,
)
from lightning_prune.core.quotas import Quota
from tests.callbacks.toy import Toy, data, trainer
from tests.members import AXES


@pytest.mark.parametrize("solver", [kind() for kind in AXES["solver"]], ids=str)
def test_it_loses_less_than_zeroing_does(solver, tmp_path):
    losses = {}
    for name, chosen in (("zeroed", None), ("solved", solver)):
        callback = PostTrainingPruning(0.5, scope=Local(), solver=chosen, report=False)
        module = Toy()
        trainer(callback, max_epochs=8, default_root_dir=tmp_path).fit(module, data(), data())
        assert callback.pruner.sparsity == pytest.approx(0.5)
        for weight, mask in ((module.get_parameter(n), m) for n, m in callback.masks.items()):
            assert not weight[~mask].any()
        losses[name] = callback.metrics_after["val/loss"]
    assert losses["solved"] < losses["zeroed"]


def test_a_checkpoint_is_pruned_without_training(tmp_path):
    dense = Toy()
    fitted = trainer(max_epochs=2, default_root_dir=tmp_path)
    fitted.fit(dense, data(), data())
    fitted.save_checkpoint(tmp_path / "dense.ckpt")
    callback = PostTrainingPruning(scope=NofM(), solver=SparseGPT(), report=False)
    module = Toy()
    module.train_dataloader, module.val_dataloader = data, data
    callback.run(trainer(callback, default_root_dir=tmp_path), module, ckpt_path=tmp_path / "dense.ckpt")
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in callback.masks.values())
    saved = torch.load(callback.path, weights_only=True)
    assert saved["callbacks"]["PostTrainingPruning"]["nouns"]["solver"] == str(SparseGPT())
    assert saved["state_dict"].keys() == Toy().state_dict().keys()
    for name, mask in callback.masks.items():
        assert not saved["state_dict"][name][~mask].any()


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    with pytest.raises(
        ValueError, match=r"`solver` for channels .* LeastSquares\(\), but got SparseGPT.* Channel"
    ):
        PostTrainingPruning(0.5, granularity=Channel(), solver=SparseGPT())

    class Grouped(Toy):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(8, 8, 1, groups=8)

        def training_step(self, batch, batch_idx):
            raise AssertionError("it should not come to this")

    callback = PostTrainingPruning(0.5, scope=Local(), solver=SparseGPT(), report=False)
    with pytest.raises(ValueError, match="`conv.weight` belongs to Conv1d: exclude it"):
        trainer(callback, default_root_dir=tmp_path).fit(Grouped(), data(), data())


def test_a_language_model_is_walked_through_block_by_block(tmp_path):
    from lightning_prune.examples.tasks import LanguageModel

    torch.manual_seed(0)
    module = LanguageModel("GPT", vocab_size=11, num_layers=2, num_heads=2, width=32)
    tokens = torch.randint(0, 11, (8, 17))
    loader = torch.utils.data.DataLoader(list(zip(tokens[:, :-1], tokens[:, 1:], strict=True)), batch_size=4)
    callback = PostTrainingPruning(
        0.5,
        scope=Local(),
        solver=SparseGPT(),
        blocks="network.blocks",
        exclude=["network.head"],
        report=False,
    )
    before = F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    module.train_dataloader = module.val_dataloader = lambda: loader
    after = callback.run(trainer(callback, default_root_dir=tmp_path), module)
    assert len(callback.masks) == 8 and callback.pruner.sparsity == pytest.approx(0.5)
    assert after["val/perplexity"] == pytest.approx(float(before.detach().exp()), rel=0.1)


def test_a_solver_by_gradients_needs_a_loss_and_sees_one_gradient_for_each_batch():
    """By hand: gradients of the toy's own step, batch by batch, layer by layer, each with those before it pruned."""
    callback = PostTrainingPruning(
        0.5, scope=Local(), solver=WoodFisher(16), num_calibration_batches=3, report=False
    )
    module, before = Toy(), {}

    class Keeps(Callback):
        def on_train_end(self, trainer, pl_module):
            before.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    torch.manual_seed(0)
    trainer(Keeps(), callback, max_epochs=2).fit(module, data(), data())
    reference = Toy()
    reference.load_state_dict(before)
    reference.eval()
    for name, mask in callback.masks.items():
        weight = reference.get_parameter(name)
        losses = [F.cross_entropy(reference(x), y) for x, y in list(data())[:3]]
        gradients = torch.stack([torch.autograd.grad(loss, weight)[0] for loss in losses])
        quota = Quota(Local(), int(mask.sum()), tuple(mask.shape))
        new, places = WoodFisher(16)(weight=weight.detach(), gradients=gradients, quota=quota)
        assert torch.equal(places, mask)
        torch.testing.assert_close(module.get_parameter(name).detach(), new, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            weight.copy_(new)
    with pytest.raises(ValueError, match="`loss` is a function .* which the solver needs, but got None"):
        prune(Toy(), 0.5, scope=Local(), solver=WoodFisher(), batches=[next(iter(data()))])


@pytest.mark.parametrize(
    "options",
    [{"solver": WoodFisher(16), "scope": Local()}, {"criterion": Saliency()}, {"criterion": OBD()}],
    ids=str,
)
@pytest.mark.parametrize("frozen", [["head"], ["body", "head"]], ids=str)
def test_frozen_weights_have_gradients_while_it_calibrates(options, frozen, tmp_path):
    """What is frozen does not matter to what is pruned; it is as frozen afterwards as it was."""

    def pruned(frozen):
        module = Toy()
        for name in frozen:
            module.get_submodule(name).requires_grad_(False)
        module.train_dataloader = module.val_dataloader = data
        callback = PostTrainingPruning(0.5, num_calibration_batches=3, report=False, **options)
        torch.manual_seed(0)
        callback.run(trainer(callback, default_root_dir=tmp_path), module)
        return module

    expected, found = pruned([]), pruned(frozen)
    for name, weight in expected.named_parameters():
        assert torch.equal(weight, found.get_parameter(name))
        assert found.get_parameter(name).requires_grad is (name.split(".")[0] not in frozen)
        assert found.get_parameter(name).grad is None


def test_channels_are_made_up_for_and_the_checkpoint_loads(tmp_path):
    dense = Toy()
    trainer(max_epochs=8, default_root_dir=tmp_path).fit(dense, data(), data())
    losses = {}
    for name, chosen in (("cut", None), ("solved", LeastSquares())):
        granularity = Channel(multiple_of=1)
        callback = PostTrainingPruning(0.3, granularity=granularity, solver=chosen, report=False)
        module = copy.deepcopy(dense)
        module.train_dataloader, module.val_dataloader = data, data
        callback.run(trainer(callback, default_root_dir=tmp_path / name), module)
        losses[name] = callback.metrics_after["val/loss"]
        again = load_pruned(Toy, callback.path)
        assert all(torch.equal(again.state_dict()[n], t) for n, t in module.state_dict().items())
        assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in dense.parameters())
    assert losses["solved"] < losses["cut"]
