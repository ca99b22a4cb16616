"""Layers are solved in the order in which they run, each on what the pruned ones before it give."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import LeastSquares, Local, NofM, PerRow, Slice, SparseGPT, Wanda, prune
from lightning_prune.core.recipe import Recipe
from lightning_prune.examples.networks import GPT, LeNet5, ResNet20
from lightning_prune.model.layerwise import solve_
from lightning_prune.model.matrices import Grams, matrix_of
from lightning_prune.model.pruning import Pruner
from lightning_prune.model.stages import stages_of

TOKENS = torch.randint(0, 11, (6, 4, 16), generator=torch.Generator().manual_seed(0))


def gpt():
    torch.manual_seed(0)
    return GPT(vocab_size=11, num_layers=3, num_heads=2, width=32).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": (5, 3), "padding": "same"},
        {"kernel_size": 1, "padding": "valid"},
    ],
)
def test_a_convolution_is_its_matrix_times_its_features(options):
    conv, x = nn.Conv2d(4, 5, **options, bias=False), torch.randn(2, 4, 9, 8)
    matrix = matrix_of(conv, "weight", conv.weight)
    y = matrix.features(x) @ matrix.to_matrix(conv.weight).t()
    expected = conv(x)
    torch.testing.assert_close(
        y.view(2, *expected.shape[2:], 5).movedim(-1, 1), expected, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(matrix.to_weight(matrix.to_matrix(conv.weight)), conv.weight)


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3, padding_mode="circular")]
)
def test_layers_that_no_solver_knows_are_refused_before_anything_is_changed(module):
    net = nn.Sequential(nn.Conv2d(4, 4, 1), module)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"`1.weight` belongs to Conv.*: exclude it"):
        prune(net, 0.5, scope=Local(), solver=SparseGPT(), batches=[torch.randn(1, 4, 5, 5)])
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_gram_matrix_is_that_of_all_positions_of_all_batches():
    net = nn.Linear(3, 2)
    grams, batches = (
        Grams({"weight": matrix_of(net, "weight", net.weight)}),
        [torch.randn(2, 5, 3), torch.randn(4, 3)],
    )
    with grams.watch():
        for batch in batches:
            net(batch)
    x = torch.cat([batch.flatten(0, -2) for batch in batches]).double()
    torch.testing.assert_close(grams.read("weight"), x.t() @ x, rtol=1e-5, atol=1e-5)


def seen_by(model, name, batches):
    """The Gram matrix of a layer in a plain run of the whole model."""
    grams = Grams({name: matrix_of(model, name, model.get_parameter(name))})
    with grams.watch(), torch.no_grad():
        for batch in batches:
            model(batch)
    return grams.read(name)


@pytest.mark.parametrize("blocks", [None, "blocks"])
def test_a_block_sees_what_the_pruned_ones_before_it_give(blocks):
    model, found = gpt(), {}
    pruner = Pruner(model, Recipe(0.5, scope=Local()))
    name = "blocks.2.attention.qkv.weight"

    def solver(*, weight, gram, mask):
        found[len(found)] = gram
        return weight * mask, mask

    pruner.choose_(1.0)
    solve_(pruner, solver, list(TOKENS), blocks=blocks)
    order = [
        f"blocks.{i}.{n}" for i in range(3) for n in ("attention.qkv", "attention.out", "grow", "shrink")
    ]
    reference = gpt()  # the blocks before it pruned, the rest dense
    for other in order[:8]:
        parameter = reference.get_parameter(f"{other}.weight")
        parameter.data.mul_(pruner.masks[f"{other}.weight"])
    torch.testing.assert_close(found[8], seen_by(reference, name, TOKENS), rtol=1e-4, atol=1e-4)


def test_each_block_runs_twice_for_a_batch_and_once_to_see_its_arguments():
    model = gpt()
    runs = [0, 0, 0]
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    prune(model, 0.5, scope=Local(), solver=SparseGPT(), batches=list(TOKENS), exclude=["head"])
    to_find = 2  # order and chain, on the first batch
    assert runs == [3 * len(TOKENS) + to_find] * 3


def test_arguments_by_keyword_tuples_and_caches():
    """As a decoder of Hugging Face has them: hidden states by name, a mask, a cache that grows with each call."""

    class GrowingCache:
        def __init__(self):
            self.seen = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden_states, scale=None, cache=None, use_cache=True):
            if cache is not None:
                cache.seen.append(hidden_states)
                assert len(cache.seen) <= 2
            return (hidden_states + scale * self.linear(hidden_states).relu(), None)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layers, self.head = (
                nn.Linear(4, 8),
                nn.ModuleList(Block() for _ in range(2)),
                nn.Linear(8, 3),
            )

        def forward(self, x):
            hidden, cache = self.first(x), GrowingCache()
            for layer in self.layers:
                hidden, _ = layer(hidden_states=hidden, scale=0.5, cache=cache)
            return self.head(hidden)

    torch.manual_seed(0)
    model, batches = Decoder(), [torch.randn(16, 4) for _ in range(3)]
    names = [f"layers.{i}.linear.weight" for i in range(2)]
    with torch.no_grad():
        matrices = {n: matrix_of(model, n, p) for n, p in model.named_parameters() if n.endswith("weight")}
        stages = [stage.names for stage in stages_of(model, matrices, batches, lambda m, b: m(b))]
    assert stages == [("first.weight",), (names[0],), (names[1],), ("head.weight",)]
    masks = prune(model, 0.5, scope=Local(), solver=SparseGPT(), batches=batches)
    assert all(int(masks[name].sum()) == 32 for name in names)


@pytest.mark.parametrize("make", [LeNet5, lambda: ResNet20(in_channels=1, num_blocks=1)])
@pytest.mark.parametrize("solver", [SparseGPT(), LeastSquares()], ids=lambda s: type(s).__name__)
def test_networks_without_a_chain_are_solved_layer_by_layer(make, solver):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(4, 1, 28, 28)
    dense, plain = model(x).detach(), copy.deepcopy(model)
    prune(plain, 0.5, scope=Local())
    masks = prune(model, 0.5, scope=Local(), solver=solver, batches=[x])
    for name, mask in masks.items():
        assert int(mask.sum()) == mask.numel() - round(0.5 * mask.numel())
        assert not model.get_parameter(name)[~mask].any()
    assert F.mse_loss(model(x), dense) < F.mse_loss(plain(x), dense)


def test_a_criterion_by_activations_says_what_stays_and_least_squares_its_values():
    by_wanda = prune(gpt(), 0.5, criterion=Wanda(), scope=PerRow(), batches=list(TOKENS))
    masks = prune(gpt(), 0.5, criterion=Wanda(), scope=PerRow(), batches=list(TOKENS), solver=LeastSquares())
    assert all(torch.equal(by_wanda[name], masks[name]) for name in masks)


def test_n_of_m_by_surgery():
    masks = prune(gpt(), scope=NofM(), batches=list(TOKENS), solver=SparseGPT(), exclude=["head"])
    assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in masks.values())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batches": None}, "`batches` is calibration data, which a solver needs"),
        ({"batches": []}, "`batches` is calibration data, which a solver needs"),
        (
            {"blocks": "block"},
            "`blocks` is the path of an nn.ModuleList .* but got 'block'. Did you mean",
        ),
        ({"granularity": Slice(dim=0)}, "`solver` SparseGPT.* chooses single weights, but got Slice"),
        ({"num_rounds": 2}, "`num_rounds` is 1 with a solver"),
    ],
)
def test_what_does_not_fit_is_refused(options, match):
    settings = {"scope": Local(), "solver": SparseGPT(), "batches": list(TOKENS), **options}
    with pytest.raises(ValueError, match=match):
        prune(gpt(), 0.5, **settings)


def test_inputs_that_are_no_numbers_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"`0.weight` has inputs that are infinite or NaN"):
        prune(model, 0.5, scope=Local(), solver=SparseGPT(), batches=[torch.full((2, 4), torch.nan)])


def numbers_alive(is_counted):
    """Return how many numbers there are in tensors of some kind, each memory once."""
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and is_counted(t)]
    return sum({t.untyped_storage().data_ptr(): t.numel() for t in tensors}.values())


@pytest.mark.parametrize("needs", ["gram", "gradients"])
def test_what_a_solver_needs_does_not_grow_with_the_depth(needs):
    """Gram matrices of a block, or gradients of a layer, are gone before those of the next are made."""
    most = {}
    for num_layers in (2, 6):
        torch.manual_seed(0)
        model = GPT(vocab_size=11, num_layers=num_layers, num_heads=2, width=32).eval()
        pruner, seen = Pruner(model, Recipe(0.5, scope=Local(), exclude=["head"])), []

        def by_gram(*, weight, gram, mask):
            seen.append(numbers_alive(lambda t: t.dtype == torch.float64 and t.dim() == 2))  # noqa: B023
            return weight * mask, mask

        def by_gradients(*, weight, gradients, mask):
            seen.append(numbers_alive(lambda t: t.dim() == 3 and len(t) == len(TOKENS)))  # noqa: B023
            return weight * mask, mask

        def loss(net, batch):
            return net(batch).square().mean()

        gc.collect()
        pruner.choose_(1.0)
        solve_(
            pruner,
            {"gram": by_gram, "gradients": by_gradients}[needs],
            list(TOKENS),
            loss=loss,
            blocks="blocks",
        )
        assert len(seen) == 4 * num_layers
        most[num_layers] = max(seen)
    assert most[2] == most[6] > 0
