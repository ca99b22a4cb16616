"""ONNX files and exported programs compute what the model computes, or there is no file."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

from lightning_prune import Budget, export_onnx, export_program, prune, shrink
from lightning_prune.examples.networks import GPT
from lightning_prune.model.export import calls

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)
BOTH = pytest.mark.parametrize(("export", "ending"), [(export_onnx, ".onnx"), (export_program, ".pt2")])
ONNX = pytest.param(export_onnx, ".onnx", marks=pytest.mark.slow)
EXPORTS = pytest.mark.parametrize(("export", "ending"), [ONNX, (export_program, ".pt2")])


class Net(nn.Module):
    """Keyword arguments, a constant, several outputs by name, whole numbers among them, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))

    def forward(self, x, shift, scale=1.0):
        y = self.body(x) * scale + shift
        return {"y": y, "best": y.argmax(1)}


def load(path):
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda *tensors: list(program(*tensors).values())
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [found.name for found in session.get_inputs()]
    return lambda *tensors: [
        torch.from_numpy(out)
        for out in session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
    ]


@BOTH
def test_outputs_are_those_of_the_model_for_any_batch(tmp_path, export, ending):
    torch.manual_seed(0)
    model = Net()
    path = tmp_path / f"net{ending}"
    found = export(model, (torch.randn(3, 8), torch.randn(4)), path, latency=export is export_onnx)
    assert found.error < 1e-5 and found.num_bytes == path.stat().st_size
    assert found.state_bytes == sum(p.numel() * 4 for p in model.parameters())
    assert (found.before is not None) == (export is export_onnx)
    assert list(tmp_path.iterdir()) == [path] and model.training
    model.eval()
    for size in (1, 3, 11):
        x, shift = torch.randn(size, 8), torch.randn(4)
        wanted = model(x, shift)
        y, best = load(path)(x, shift)
        torch.testing.assert_close(y, wanted["y"], rtol=1e-5, atol=1e-6)
        assert torch.equal(best, wanted["best"])


@EXPORTS
def test_a_smaller_model_and_a_single_example_are_exported(tmp_path, export, ending):
    torch.manual_seed(0)
    dense, tokens = GPT(num_layers=1, width=32, vocab_size=9), torch.randint(9, (1, 6))
    small = GPT(num_layers=1, width=32, vocab_size=9)
    shrink(small, tokens, budget=Budget(params=0.5))
    sizes = []
    for i, model in enumerate((dense, small)):
        found = export(model, {"tokens": tokens} if i else tokens, tmp_path / f"{i}{ending}", latency=False)
        assert found.error < 1e-5
        sizes.append(found.num_bytes)
    assert sizes[1] < sizes[0]


def test_a_file_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "largest_difference", lambda a, b: 0.5)
    with pytest.raises(ValueError, match=r"`tolerance` of the outputs is 0.0001, but got 5.0e-01 from pt2"):
        export_program(nn.Linear(2, 2), torch.ones(3, 2), tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


@EXPORTS
def test_what_torch_cannot_follow_is_refused(tmp_path, export, ending):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x) if len(x) == 3 else x

    with pytest.raises(ValueError, match=r"`model` is one that torch.export can follow.*dynamic_batch=False"):
        export(Fixed(), torch.ones(3, 2), tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())
    assert (
        export(Fixed(), torch.ones(3, 2), tmp_path / f"a{ending}", dynamic_batch=False, latency=False).error
        < 1e-5
    )


@BOTH
@pytest.mark.parametrize("is_second", [False, True])
def test_a_dict_that_comes_last_is_an_argument_and_no_keywords(tmp_path, export, ending, is_second):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, *args):
            *first, inputs = args
            return self.layer((self.embedding(inputs["ids"]) * inputs["mask"][..., None]).mean(1)) + sum(
                first
            )

    class Second(Masked):
        def forward(self, first, inputs):
            return super().forward(first, inputs)

    class Only(Masked):
        def forward(self, inputs):
            return super().forward(inputs)

    torch.manual_seed(0)
    inputs = {"ids": torch.randint(9, (4, 6)), "mask": torch.ones(4, 6)}
    model, example = (Second(), (torch.ones(4, 1), inputs)) if is_second else (Only(), (inputs,))
    assert export(model, example, tmp_path / f"a{ending}", latency=False).error < 1e-5


@BOTH
def test_the_cause_of_a_failure_is_told_in_plain_text(tmp_path, export, ending):
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("\x1b[96mno such kernel\x1b[0m")

    with pytest.raises(ValueError, match=r"but got RuntimeError: no such kernel$"):
        export(Fails(2, 2), torch.ones(3, 2), tmp_path / f"a{ending}")


def test_settings_out_of_range_are_refused(tmp_path):
    model, x = nn.Linear(2, 2), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"`path` ends in '.onnx', but got 'a.pt2'"):
        export_onnx(model, x, "a.pt2")
    with pytest.raises(ValueError, match="`tolerance` is a number above 0"):
        export_program(model, x, tmp_path / "a.pt2", tolerance=0)
    with pytest.raises(ValueError, match="`example` has a tensor with a batch in its first dim"):
        export_program(model, torch.tensor(1.0), tmp_path / "a.pt2")


def test_masks_do_not_change_what_is_exported(tmp_path):
    """Zeros are stored like other numbers: only smaller layers make the file smaller."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(2, 64)
    dense = export_program(model, x, tmp_path / "a.pt2", latency=False).num_bytes
    prune(model, 0.9)
    masked = export_program(model, x, tmp_path / "b.pt2", latency=False)
    assert masked.num_bytes == dense and masked.error == 0.0


def test_examples_of_all_kinds_are_doubled():
    Pair = namedtuple("Pair", "a b")
    call = calls.Call(nn.ReLU(), (torch.ones(3), [torch.ones(2), 5]), {"p": Pair(torch.ones(3, 1), "x")})
    twice = calls.doubled(call)
    assert twice.args[0].shape == (6,) and twice.args[1][0].shape == (2,) and twice.args[1][1] == 5
    assert twice.kwargs["p"].a.shape == (6, 1) and twice.kwargs["p"].b == "x"
