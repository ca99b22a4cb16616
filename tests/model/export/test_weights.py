"""Weights as safetensors: smaller with the sparsity, equal bit for bit, and loaded as a whole or not at all."""

from __future__ import annotations

import copy
import json
import struct

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune import Budget, export_weights, load_pruned, load_weights_, prune, shrink
from lightning_prune.examples.tasks import Classifier
from lightning_prune.model.export import formats
from lightning_prune.model.export.files import ENTRY, VERSION
from lightning_prune.model.history import plans_of

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

BOTH = pytest.mark.parametrize("compressed", [True, False])


class Lit(L.LightningModule):
    """Tied weights, buffers, a batch norm, and arguments of several kinds."""

    def __init__(
        self, width: int = 64, betas: tuple[float, float] = (0.9, 0.99), head: object = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Linear(32, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        )
        self.tied, self.out = nn.Linear(width, width), nn.Linear(width, 10)
        self.tied.weight = self.body[3].weight
        self.register_buffer("table", torch.arange(7))
        self.betas = betas

    def forward(self, x):
        return self.out(self.tied(self.body(x)))


def trained(**settings) -> Lit:
    torch.manual_seed(0)
    model = Lit(**settings)
    model.body[1](torch.randn(9, settings.get("width", 64)))  # running statistics, and a counter
    return model


def bits(state):
    return {n: t.detach().contiguous().view(-1).view(torch.uint8) for n, t in state.items() if t.numel()}


def assert_equal(one, other):
    one, other = bits(one.state_dict()), bits(other.state_dict())
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_all_comes_back_bit_for_bit(tmp_path, compressed, dtype):
    model = trained().to(dtype)
    prune(model, 0.9)
    model.out.weight.data[0, :3] = torch.tensor([-0.0, float("nan"), float("-inf")])
    found = export_weights(model, tmp_path / "a.safetensors", compressed=compressed)
    fresh = Lit().to(dtype)
    load_weights_(fresh, found.path)
    assert_equal(fresh, model)
    assert fresh.tied.weight is fresh.body[3].weight
    assert found.num_bytes == (tmp_path / "a.safetensors").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_a_file_shrinks_with_the_sparsity(tmp_path):
    """An entry of 32 bits that stays costs 33, one that goes costs 1."""
    sizes = {}
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        model = nn.Linear(512, 512, bias=False)
        prune(model, sparsity)
        found = export_weights(model, tmp_path / "a.safetensors")
        sizes[sparsity] = found.num_bytes
        assert found.density == pytest.approx(1 - sparsity + 1 / 32, abs=0.002)
        assert found.state_bytes == 512 * 512 * 4
    dense = export_weights(nn.Linear(512, 512, bias=False), tmp_path / "a.safetensors")
    assert 0 < dense.num_bytes - dense.state_bytes < 1000  # not compressed where that would not pay


def test_an_uncompressed_file_is_what_any_reader_takes(tmp_path):
    model = trained()
    export_weights(model, tmp_path / "a.safetensors", compressed=False)
    plain = load_file(tmp_path / "a.safetensors")
    assert torch.equal(plain["out.weight"], model.out.weight)
    assert set(model.state_dict()) - set(plain) == {"tied.weight"}


@BOTH
def test_a_smaller_model_comes_back_through_its_record(tmp_path, compressed):
    model = Classifier("MLP", sizes=[64, 32, 32, 10])
    example = torch.randn(4, 1, 8, 8)
    shrink(model, example, budget=Budget(params=0.5))
    export_weights(model, tmp_path / "a.safetensors", compressed=compressed)
    again = load_pruned(Classifier, tmp_path / "a.safetensors")
    assert_equal(again, model)
    assert plans_of(again) == plans_of(model) and torch.equal(again(example), model(example))


def test_hyperparameters_come_back_as_they_were(tmp_path):
    export_weights(Lit(48, betas=(0.5, 0.6)), tmp_path / "a.safetensors")
    assert load_pruned(Lit, tmp_path / "a.safetensors").betas == (0.5, 0.6)
    assert load_pruned(Lit, tmp_path / "a.safetensors", betas=(0.1, 0.2)).betas == (0.1, 0.2)
    model = Lit(48)
    model.hparams["head"] = object()
    export_weights(model, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"`settings` hold the arguments that .* but got no \[?'?head"):
        load_pruned(Lit, tmp_path / "b.safetensors")
    assert load_pruned(Lit, tmp_path / "b.safetensors", head=None).out.in_features == 48


def assert_refused(path, message, model=None):
    model = model or Lit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_weights_(model, path)
    after = model.state_dict()
    assert before.keys() == after.keys() and plans_of(model) == ()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.fixture
def path(tmp_path):
    model = trained()
    prune(model, 0.9)
    export_weights(model, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("length", [0, 5, 200, -1, -500])
def test_a_truncated_file_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    assert_refused(path, "cut short or damaged|lightning_prune wrote")


def test_every_changed_byte_is_noticed(path):
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(8, len(whole), (60,), generator=generator).tolist()
    for place in [*places, len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_refused(path, "`path`|`version`|`checksum`|`record`")


def rewritten(path, change):
    """Change what the header says, and leave the tensors alone."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    facts = json.loads(header["__metadata__"][ENTRY])
    change(facts)
    header["__metadata__"][ENTRY] = json.dumps(facts)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(version=VERSION + 1), "a newer lightning_prune wrote"),
        (lambda f: f.update(tied={}), "it was changed"),
        (lambda f: f["packed"].pop("out.weight"), "it was changed"),
        (lambda f: f.update(record={"version": 1}), "it was changed"),
        (lambda f: f.pop("tied"), "the header of .* was changed"),
    ],
)
def test_a_changed_header_is_refused(path, change, message):
    rewritten(path, change)
    assert_refused(path, message)


def test_files_of_others_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "b.safetensors")
    assert_refused(tmp_path / "b.safetensors", "a file that lightning_prune wrote")
    (tmp_path / "c.safetensors").write_text("hello, this is no safetensors file")
    assert_refused(tmp_path / "c.safetensors", "cut short or damaged")
    with pytest.raises(FileNotFoundError, match="which is not there"):
        load_weights_(Lit(), tmp_path / "nowhere.safetensors")


def test_another_model_is_refused(path):
    assert_refused(path, r"`body.0.weight` is torch.float32 of shape \(64, 32\), and in Lit", Lit(width=65))
    assert_refused(path, "and in Lit torch.bfloat16", Lit().to(torch.bfloat16))
    assert_refused(path, "has no .* of Linear", nn.Linear(2, 2))


def test_a_record_is_undone_where_the_weights_do_not_fit(tmp_path):
    small = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    shrink(small, torch.ones(2, 8), 0.5)
    export_weights(small, tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2), nn.Linear(2, 2))
    assert_refused(tmp_path / "a.safetensors", r"has no .*3.weight.* of Sequential", other)
    assert other[0].out_features == 32


def test_what_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Module):
        def get_extra_state(self):
            return {"a": 1}

    for model, message in (
        (Extra(), "got dict for `_extra_state`"),
        (nn.Linear(2, 2, device="meta"), "on the meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            export_weights(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"`path` ends in '.safetensors', but got .*a.bin"):
        export_weights(nn.Linear(2, 2), tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_file_that_was_there(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(
        "safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        export_weights(trained(), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install 'lightning-prune\[export\]'"):
        export_weights(nn.Linear(2, 2), tmp_path / "a.safetensors")
