"""`sensitivity.py`: each layer's curve against pruning it by hand, what is interrupted, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_prune import allocate, cli
from lightning_prune.examples.data import Digits
from lightning_prune.examples.tasks import Classifier
from tests.hydra_runs import QUIET, SMALL, composed

NUM_LAYERS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = [*SMALL, *QUIET, "trainer.max_epochs=2", "pruning=none", "model=mlp"]
    cli.train(composed(*words, output_dir=folder))
    return folder / "checkpoints" / "last.ckpt"


def analyse(folder, checkpoint, *words: str):
    folder.mkdir(exist_ok=True)  # Hydra does
    words = ("trainer=cpu", "model=mlp", f"ckpt_path={checkpoint}", "sparsities=[0.5,0.9]", *words)
    return cli.analyse(composed(*words, config_name="sensitivity", output_dir=folder))


def by_hand(checkpoint, name: str, sparsity: float) -> float:
    """Return the validation accuracy with the smallest weights of one layer set to zero."""
    model = weights_of(checkpoint)
    weight = model.get_parameter(name).data
    order = weight.abs().flatten().argsort()
    weight.view(-1)[order[: round(sparsity * weight.numel())]] = 0.0
    digits = Digits()
    digits.setup("fit")
    with torch.no_grad():
        hits = [model.network(x).argmax(1) == y for loader in digits.val_dataloader() for x, y in loader]
    return float(torch.cat(hits).float().mean())


def weights_of(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    model = Classifier(**state["hyper_parameters"])
    model.load_state_dict(state["state_dict"])
    return model


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("metric", ["val/acc", "val/loss"])
def test_the_curves_prune_to_any_sparsity(checkpoint, tmp_path, metric):
    """One file, one shot at another sparsity than it was written for; each layer against pruning it by hand."""
    analyse(tmp_path, checkpoint, f"metric={metric}", "sparsity=0.6")
    file = tmp_path / "sensitivity.json"
    words = [*SMALL, *QUIET, "model=mlp", "train=false", f"ckpt_path={checkpoint}", "pruning=one_shot"]
    words += ["pruning/scope=allocated", f"pruning.scope.curves={file}", "pruning.sparsity=0.8"]
    cli.train(composed(*words, output_dir=tmp_path))
    pruned = torch.load(tmp_path / "checkpoints" / "pruned.ckpt", weights_only=True)["state_dict"]
    sign = -1.0 if metric == "val/acc" else 1.0
    curves = json.loads(file.read_text())["curves"]
    losses = {n: {float(s): sign * v for s, v in c.items()} for n, c in curves.items()}
    model = weights_of(checkpoint)
    sizes = {name: model.get_parameter(name).numel() for name in curves}
    for name, sparsity in allocate(losses, sizes, 0.8).items():
        assert int((pruned[name] == 0).sum()) == pytest.approx(sparsity * sizes[name], abs=1)
    assert sum(int((pruned[n] == 0).sum()) for n in sizes) == round(0.8 * sum(sizes.values()))


def test_curves_are_those_of_pruning_by_hand(checkpoint, tmp_path, capsys):
    allocation = analyse(tmp_path, checkpoint, "metric=val/acc", "sparsity=0.7")
    found = json.loads((tmp_path / "sensitivity.json").read_text())
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert set(found["curves"]) == {n for n, w in state.items() if w.dim() == 2}
    for name, curve in found["curves"].items():
        assert curve == {k: pytest.approx(by_hand(checkpoint, name, float(k))) for k in ("0.0", "0.5", "0.9")}
    sizes = {name: state[name].numel() for name in allocation}
    total = sum(allocation[name] * size for name, size in sizes.items()) / sum(sizes.values())
    losses = {n: {float(s): -v for s, v in c.items()} for n, c in found["curves"].items()}
    assert total == pytest.approx(0.7) and allocation == allocate(losses, sizes, 0.7) == found["allocation"]
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "allocated" in capsys.readouterr().out


def test_an_interrupted_analysis_goes_on(checkpoint, tmp_path, monkeypatch):
    whole = analyse(tmp_path / "whole", checkpoint)
    import lightning as L

    validate, calls = L.Trainer.validate, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return validate(self, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyse(tmp_path / "half", checkpoint)
    half = tmp_path / "half" / "sensitivity.json"
    assert "allocation" not in json.loads(half.read_text())
    assert analyse(tmp_path / "rest", checkpoint, f"curves={half}") == whole
    in_all = NUM_LAYERS * 2 + 1  # and the dense model
    assert len(calls) == in_all + 1  # the one that was cut off is run again, and no other
    files = [json.loads((tmp_path / name / "sensitivity.json").read_text()) for name in ("whole", "rest")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["metric=val/ac"], "`metric`.*did you mean.*val/acc"),
        (["sparsity=0.95"], "`sparsity` is at most the largest of `sparsities`, 0.9, but got 0.95"),
        (["sparsities=[1.5]"], r"`sparsity`.*\[0, 1\).*1.5"),
        (["curves=nowhere.json"], "`curves` is a sensitivity.json of a run before, but got nowhere.json"),
        (["include=[nothing]"], "nothing"),
        (["model=convnet"], "`model` is the one that was saved"),
    ],
)
def test_settings_that_are_no_good_are_refused(checkpoint, tmp_path, words, told):
    with pytest.raises(cli.SettingsError, match=f"(?is){told}"):
        analyse(tmp_path, checkpoint, *words)


def test_curves_of_another_model_or_metric_are_refused(checkpoint, tmp_path):
    analyse(tmp_path, checkpoint)
    file = tmp_path / "sensitivity.json"
    with pytest.raises(
        cli.SettingsError, match="`metric` is that of `curves`, 'val/loss', but got 'val/acc'"
    ):
        analyse(tmp_path, checkpoint, f"curves={file}", "metric=val/acc")
    file.write_text(json.dumps({"metric": "val/loss", "curves": {"stranger": {"0.0": 1.0}}}))
    with pytest.raises(cli.SettingsError, match="stranger"):
        analyse(tmp_path, checkpoint, f"curves={file}")
