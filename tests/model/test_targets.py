import pytest
import torch
from torch import nn

from lightning_prune.model.targets import select_targets


class Zoo(nn.Module):
    """One layer of each kind that matters here, and weights that must never be taken."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose1d(4, 2, 3)
        self.norm = nn.BatchNorm2d(4)
        self.layernorm = nn.LayerNorm((4, 4))  # two dims, yet the scale of a norm
        self.attn = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.rnn = nn.LSTM(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(8, 8))
        self.head = nn.Linear(8, 10)


DEFAULT = [
    "conv.weight",
    "up.weight",
    "attn.in_proj_weight",
    "attn.out_proj.weight",
    "cross.q_proj_weight",
    "cross.k_proj_weight",
    "cross.v_proj_weight",
    "cross.out_proj.weight",
    "blocks.0.weight",
    "blocks.1.weight",
    "head.weight",
]


def test_default_is_linear_convolution_and_attention_weights():
    assert list(select_targets(Zoo())) == DEFAULT


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"exclude": ["head"]}, DEFAULT[:-1]),
        (
            {"exclude": [nn.MultiheadAttention, nn.Conv2d, "head", "*.out_proj"]},
            ["up.weight", "blocks.0.weight", "blocks.1.weight"],
        ),
        ({"include": ["blocks"]}, ["blocks.0.weight", "blocks.1.weight"]),
        ({"include": [nn.Embedding, "re:blocks\\.1.*"]}, ["emb.weight", "blocks.1.weight"]),
        (
            {"include": ["*"], "exclude": ["blocks", "attn", "cross", "rnn", "conv", "up", "head"]},
            ["scale", "emb.weight"],
        ),
        ({"include": [nn.LSTM]}, ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        ({"include": ["blocks"], "exclude": ["blocks.0"]}, ["blocks.1.weight"]),
    ],
)
def test_include_replaces_the_default_and_exclude_wins(arguments, expected):
    assert list(select_targets(Zoo(), **arguments)) == expected


def test_biases_and_norms_are_never_taken():
    taken = select_targets(Zoo(), include=["*"])
    assert not [name for name in taken if "bias" in name or "norm" in name] and len(taken) == 15
    with pytest.raises(ValueError, match=r"`include` has a pattern that matches no weight: '\*\.bias'"):
        select_targets(Zoo(), include=["*.bias"])


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_computed_layers_are_named_where_there_are_no_others(wrap):
    net = nn.Sequential(wrap(nn.Linear(4, 8)), nn.ReLU(), wrap(nn.Linear(8, 2)))
    with pytest.raises(
        ValueError, match=r"leave nothing to prune .*The weights of `0`, `2` are computed .*`include`"
    ):
        select_targets(net)
    with pytest.raises(ValueError, match=r"The weights of `2` are computed from others"):
        select_targets(net, exclude=["0"])


@pytest.mark.parametrize(
    ("wrap", "name"),
    [(nn.utils.weight_norm, "0.weight_v"), (nn.utils.parametrizations.weight_norm, "0.*.original1")],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_directions_that_weight_norm_divides_by_the_length_of_are_refused(wrap, name):
    """A row of which nothing is left would have no length: the weight that is computed from it is NaN."""
    net = nn.Sequential(wrap(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    for include in (["*"], [name], ["0"]):
        with pytest.raises(ValueError, match=r"`include` names .*0\..*weight_norm.*remove_parametrizations"):
            select_targets(net, include=include)
    assert (
        list(select_targets(net)) == list(select_targets(net, include=["*"], exclude=["0"])) == ["2.weight"]
    )


def test_tied_weights_are_taken_once_and_answer_to_each_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert list(select_targets(net)) == ["0.weight"]
    assert list(select_targets(net, include=["1"])) == ["0.weight"]
    with pytest.raises(ValueError, match="nothing to prune"):
        select_targets(net, exclude=["1"])


def test_an_output_layer_tied_to_an_embedding_is_left_alone_unless_asked_for():
    zoo = Zoo()
    zoo.head.weight = zoo.emb.weight
    assert "emb.weight" not in select_targets(zoo) and "head.weight" not in select_targets(zoo)
    assert list(select_targets(zoo, include=["head"])) == ["emb.weight"]


def test_without_include_only_trained_weights_are_taken():
    net = nn.ModuleDict({"student": nn.Linear(3, 3), "teacher": nn.Linear(3, 3)})
    trained = {id(p) for p in net["student"].parameters()}
    assert list(select_targets(net, trained=trained)) == ["student.weight"]
    assert list(select_targets(net, include=["teacher"], trained=trained)) == ["teacher.weight"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: select_targets(Zoo(), exclude=["haed"]),
            r"`exclude` .*'haed'\. Did you mean head.*\? The candidates are",
        ),
        (
            lambda: select_targets(Zoo(), include=[nn.Bilinear]),
            r"`include` has a type that no weight belongs to.*Bilinear",
        ),
        (
            lambda: select_targets(nn.BatchNorm1d(3)),
            "leave nothing to prune in BatchNorm1d.*candidates.*are none",
        ),
        (lambda: select_targets(nn.LazyLinear(3)), "`weight` is a lazy parameter without a shape"),
    ],
)
def test_mistakes_name_the_candidates(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_complex_integer_and_empty_parameters_are_no_candidates():
    net = nn.Module()
    net.complex = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    net.codes = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    net.empty = nn.Parameter(torch.ones(0, 2))
    net.fc = nn.Linear(2, 2)
    assert list(select_targets(net, include=["*"])) == ["fc.weight"]
