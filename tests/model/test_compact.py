"""Steps of the survivors alone come to what steps of everything come to."""

import copy
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch import nn, optim

from lightning_prune.model import reach
from lightning_prune.model.apply import apply_masks_
from lightning_prune.model.compact import CompactSteps
from lightning_prune.model.optimizer import cut_state_, mask_state_
from lightning_prune.model.reach import Reach, is_worth_it

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": lambda p: optim.Adam(p, 1e-3, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, 1e-3),
    "adamw foreach": lambda p: optim.AdamW(p, 1e-3, foreach=True),
    "rmsprop": lambda p: optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, 1e-2),
    "nadam": lambda p: optim.NAdam(p),
    "radam": lambda p: optim.RAdam(p),
    "adamax": lambda p: optim.Adamax(p),
    "adadelta": lambda p: optim.Adadelta(p),
}
NAMES = ("0.weight", "2.weight")


@pytest.fixture(autouse=True)
def everywhere(request, monkeypatch):
    """Small networks will do, with every optimizer."""
    if "gains" not in request.node.name:
        monkeypatch.setattr(reach, "ELEMENTWISE", dict.fromkeys(reach.ELEMENTWISE, Reach(0.2, 1)))
        monkeypatch.setattr(reach, "ONE_PASS", Reach(0.2, 1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(301, 103), nn.ReLU(), nn.Linear(103, 203))


def masks_of(model, density=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(model.get_parameter(n).shape, generator=generator) < density for n in NAMES}


class Training:
    """A loop by hand; with `compact` the survivors are stepped alone."""

    def __init__(self, build, *, compact):
        self.model = network()
        self.targets = {name: self.model.get_parameter(name) for name in NAMES}
        self.masks = masks_of(self.model)
        self.optimizer = build(self.model.parameters())
        self.steps = CompactSteps(self.optimizer) if compact else None
        self.data = torch.Generator().manual_seed(2)
        self.mask()

    def mask(self, but=frozenset()):
        names = [name for name in NAMES if id(self.targets[name]) not in but]
        apply_masks_([self.targets[name].detach() for name in names], [self.masks[name] for name in names])

    def loss(self):
        self.optimizer.zero_grad()
        x, y = torch.randn(8, 301, generator=self.data), torch.randn(8, 203, generator=self.data)
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        return loss

    def run(self, num, by_closure=False, is_alone=True):
        for _ in range(num):
            if self.steps is not None and not self.steps.is_following:
                self.steps.follow(self.targets, self.masks)
            if by_closure:
                self.optimizer.step(self.loss)
            else:
                self.loss()
                self.optimizer.step()
            done = self.steps.masked if self.steps is not None else set()
            assert self.steps is None or ((len(done) == 2) == is_alone and len(self.steps.parts) == 2)
            self.mask(done)
        return self


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("by_closure", [False, True])
def test_weights_and_state_are_those_of_whole_steps_bit_for_bit(build, by_closure):
    whole, compact = Training(build, compact=False).run(12, by_closure), Training(build, compact=True)
    compact.run(12, by_closure)
    for (name, a), b in zip(
        whole.model.state_dict().items(), compact.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    mask_state_([whole.optimizer], whole.targets, whole.masks)  # of masked weights ours remembers nothing
    theirs, ours = whole.optimizer.state_dict(), compact.optimizer.state_dict()
    assert theirs["param_groups"] == ours["param_groups"]
    for key, state in theirs["state"].items():
        assert {k: torch.is_tensor(v) for k, v in state.items()} == {
            k: torch.is_tensor(v) for k, v in ours["state"][key].items()
        }
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours["state"][key][name])), name


def test_what_is_held_is_of_the_survivors_only():
    training = Training(OPTIMIZERS["adam"], compact=True).run(2)
    for name in NAMES:
        state = training.optimizer.state[training.targets[name]]
        kept = int(training.masks[name].sum())
        assert {tuple(v.shape) for k, v in state.items() if k != "step"} == {(kept,)}
        part = training.steps.parts[training.targets[name]]
        assert (
            part.version == training.targets[name]._version
        )  # known to be masked: no pass over it is needed
    assert training.optimizer.param_groups[0]["params"] == list(training.model.parameters())


def test_a_fused_kernel_comes_to_the_same_within_rounding():
    def build(parameters):
        return optim.AdamW(parameters, 1e-3, fused=True)

    whole, compact = Training(build, compact=False).run(12), Training(build, compact=True).run(12)
    for a, b in zip(whole.model.parameters(), compact.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert torch.equal(a == 0, b == 0)


def test_training_goes_on_from_a_saved_state_bit_for_bit():
    one = Training(OPTIMIZERS["adamw"], compact=True).run(6)
    saved = copy.deepcopy((one.model.state_dict(), one.optimizer.state_dict(), one.data.get_state()))
    one.run(6)
    other = Training(OPTIMIZERS["adamw"], compact=True).run(1)
    other.model.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    other.data.set_state(saved[2])
    other.run(6)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_someone_else_writes_is_kept_and_masked():
    training = Training(OPTIMIZERS["sgd"], compact=True).run(3)
    weight, mask = training.targets["0.weight"].detach(), training.masks["0.weight"]
    weight.fill_(5.0)
    training.run(1)
    assert torch.equal(weight != 0, mask)
    assert float(weight[mask].min()) > 4
    weight.data.clamp_(-1, 1)  # past torch's count of writes, as Wasserstein GANs do
    training.run(1)
    assert float(weight.max()) < 1.5
    assert torch.equal(weight != 0, mask)


def test_gradients_that_are_not_numbers_do_not_reach_what_is_masked():
    training = Training(OPTIMIZERS["sgd"], compact=True).run(2)
    weight, mask = training.targets["0.weight"], training.masks["0.weight"]
    training.loss()
    weight.grad[~mask] = float("nan")
    training.optimizer.step()
    assert bool(weight.isfinite().all())


def test_parameters_without_a_gradient_are_passed_over():
    training = Training(OPTIMIZERS["adam"], compact=True).run(2)
    weight = training.targets["0.weight"]
    before = weight.detach().clone(), training.optimizer.state[weight]["step"].clone()
    training.loss()
    weight.grad = None
    training.optimizer.step()
    assert torch.equal(weight, before[0])
    assert training.optimizer.state[weight]["step"] == before[1]


def test_a_step_that_raises_leaves_the_optimizer_usable():
    training = Training(OPTIMIZERS["sgd"], compact=True).run(2)
    training.optimizer.param_groups[0]["lr"] = "wrong"
    training.loss()
    with pytest.raises(TypeError):
        training.optimizer.step()
    training.optimizer.param_groups[0]["lr"] = 0.01
    training.optimizer.zero_grad()
    training.optimizer.state_dict()
    assert training.optimizer.param_groups[0]["params"] == list(training.model.parameters())
    training.run(1)


@pytest.mark.parametrize("change", ["clamp", "noise"])
def test_hooks_of_others_behind_a_step_find_and_keep_what_it_has_made(change):
    """Those that were registered before, too, as in `configure_optimizers`."""

    def build(parameters):
        parameters = list(parameters)
        optimizer = optim.SGD(parameters, 0.05, momentum=0.9)
        draw = torch.Generator().manual_seed(3)

        def after(*_):
            for parameter in parameters:
                assert all(
                    p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True)
                )
                noise = torch.randn(parameter.shape, generator=draw) * 1e-3
                parameter.detach().add_(noise) if change == "noise" else parameter.detach().clamp_(
                    -0.02, 0.02
                )

        optimizer.register_step_post_hook(after)
        return optimizer

    whole = Training(build, compact=False).run(6)
    compact = Training(build, compact=True).run(6, is_alone=False)
    for a, b in zip(whole.model.parameters(), compact.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["mask_state_", "cut_state_", "close"])
def test_whoever_changes_the_state_finds_it_whole(change):
    training = Training(OPTIMIZERS["adam"], compact=True).run(3)
    expected = training.optimizer.state_dict()["state"][0]["exp_avg"]
    if change == "mask_state_":
        mask_state_([training.optimizer], training.targets, training.masks)
    elif change == "cut_state_":
        cut_state_(training.optimizer, {}, SimpleNamespace(slices={}), ExitStack())
    else:
        training.steps.close()
    assert torch.equal(training.optimizer.state[training.targets["0.weight"]]["exp_avg"], expected)
    assert not training.steps.is_following


def test_new_masks_forget_what_was_and_remember_nothing_of_what_comes():
    training = Training(OPTIMIZERS["sgd"], compact=True).run(3)
    before = training.optimizer.state_dict()["state"][0]["momentum_buffer"]
    new = masks_of(training.model, seed=5)
    training.steps.follow(training.targets, new)
    after = training.optimizer.state_dict()["state"][0]["momentum_buffer"]
    old = training.masks["0.weight"]
    assert torch.equal(after, before * new["0.weight"])
    assert not after[new["0.weight"] & ~old].any()


def test_only_what_gains_is_stepped_alone():
    numel = reach.MANY_PASSES.numel
    parameter, large = nn.Parameter(torch.zeros(numel)), nn.Parameter(torch.zeros(reach.ONE_PASS.numel))

    def told(optimizer, density=0.1):
        (parameter,) = optimizer.param_groups[0]["params"]
        mask = torch.arange(parameter.numel()).view_as(parameter) < density * parameter.numel()
        return is_worth_it(optimizer, optimizer.param_groups[0], parameter, mask)

    assert told(optim.Adam([parameter]))
    assert not told(optim.Adam([parameter]), 0.3)
    assert not told(optim.Adam([parameter], fused=True))
    assert told(optim.Adam([large], fused=True))
    assert told(optim.SGD([large], 0.1, momentum=0.9))
    assert not told(optim.SGD([large], 0.1))  # it remembers nothing that could be spared
    assert not told(optim.Adafactor([nn.Parameter(torch.zeros(256, 256))]))
    assert not told(type("Mine", (optim.Adam,), {})([parameter]))  # who knows what it does
    assert not told(optim.Adam([nn.Parameter(torch.zeros(10))]))
    assert not told(optim.Adam([nn.Parameter(torch.zeros(128, 256).T)]))
