from __future__ import annotations

import json

import pytest

from lightning_prune import cli
from tests.hydra_runs import QUIET, SMALL, composed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cli.train(
        composed(*SMALL, *QUIET, "trainer.max_epochs=1", "pruning=snip", "model=mlp", output_dir=folder)
    )
    return folder / "checkpoints" / "last.ckpt"


def evaluate(folder, *overrides: str):
    cfg = composed(
        "trainer=cpu", "trainer.enable_progress_bar=false", *overrides, config_name="eval", output_dir=folder
    )
    return cli.evaluate(cfg)


def test_an_evaluation_gives_metrics_and_sparsity(checkpoint, tmp_path, capsys):
    metrics = evaluate(tmp_path, "model=mlp", f"ckpt_path={checkpoint}")
    assert metrics["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert 0 <= metrics["test/acc"] <= 1
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    shown = capsys.readouterr().out
    assert "network.head.weight" in shown
    assert str(tmp_path) in shown


def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match=r"`model` is the one that was saved in .*last.ckpt, but got another"
    ):
        evaluate(tmp_path, "model=convnet", f"ckpt_path={checkpoint}")
