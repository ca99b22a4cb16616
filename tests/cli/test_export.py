"""`export.py`: a checkpoint becomes a file that computes the same; mistakes are answered before torch is loaded."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_prune import cli, load_pruned
from lightning_prune.examples.tasks import Classifier
from tests.cli.test_errors import refused
from tests.hydra_runs import QUIET, SMALL, composed

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = [
        *SMALL,
        *QUIET,
        "trainer.max_epochs=1",
        "pruning=global_structured",
        "pruning.sparsity=0.5",
        "model=mlp",
    ]
    cli.train(composed(*words, output_dir=folder))
    return folder / "checkpoints" / "last.ckpt"


def export(folder, checkpoint, *words: str):
    folder.mkdir(exist_ok=True)
    cfg = composed("model=mlp", f"ckpt_path={checkpoint}", *words, config_name="export", output_dir=folder)
    return cli.export(cfg)


@pytest.mark.parametrize("format", ["compressed", "safetensors"])
def test_weights_load_into_the_smaller_model(checkpoint, tmp_path, format, capsys):
    found = export(tmp_path, checkpoint, f"format={format}")
    again = load_pruned(Classifier, tmp_path / "model.safetensors")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    told = json.loads((tmp_path / "export.json").read_text())
    assert told["num_bytes"] == found["num_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert "of the weights" in (shown := capsys.readouterr().out) and f"run folder: {tmp_path}" in shown


def test_a_program_is_the_network_alone(checkpoint, tmp_path, capsys):
    found = export(
        tmp_path, checkpoint, "format=pt2", "filename=small.pt2", "latency=false", "data.batch_size=5"
    )
    assert found["error"] < 1e-5
    program = torch.export.load(tmp_path / "small.pt2").module()
    x = torch.randn(3, 1, 8, 8)
    model = load_pruned(Classifier, checkpoint).eval()
    torch.testing.assert_close(program(x), model(x))
    assert "difference of outputs" in capsys.readouterr().out


@pytest.mark.slow
def test_onnx_is_measured(checkpoint, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert export(tmp_path, checkpoint, "format=onnx")["error"] < 1e-5
    told = json.loads((tmp_path / "export.json").read_text())
    assert told["before"]["median_ms"] > 0 and told["after"]["median_ms"] > 0
    assert "latency, file" in capsys.readouterr().out and (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["format=onxx"],
            "`format` is one of ['safetensors', 'compressed', 'onnx', 'pt2'], but got 'onxx'. Did you mean onnx?",
        ),
        (["filename=../model.safetensors"], "`filename` is a name within the run folder, without a path"),
        (["filename=model.bin"], "`path` ends in '.safetensors', but got 'model.bin'."),
        (["tolerance=0"], "`tolerance` is a number above 0, but got 0."),
        (["latency=maybe"], "`latency` is true or false, but got 'maybe'."),
        (
            ["ckpt_path=nope.ckpt"],
            "`ckpt_path` is a checkpoint file, but got 'nope.ckpt', which is not there.",
        ),
        (["fromat=onnx"], "Key 'fromat' is not in struct"),
    ],
)
def test_a_mistake_is_answered_without_torch(root, subprocess_env, tmp_path, words, message):
    (tmp_path / "a.ckpt").touch()
    words = [f"ckpt_path={tmp_path / 'a.ckpt'}", *words] if not words[0].startswith("ckpt") else words
    assert message in refused(root, subprocess_env, tmp_path / "out", *words, script="export.py")


def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path):
    with pytest.raises(cli.SettingsError, match="`model` is the one that was saved in"):
        export(tmp_path, checkpoint, "model=convnet")
