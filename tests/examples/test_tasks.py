from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from lightning_prune.examples.data import Digits, TinyShakespeare
from lightning_prune.examples.settings import LR_SCHEDULES, Optimization
from lightning_prune.examples.tasks import Classifier, LanguageModel


def trainer(folder, **options) -> L.Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **{**defaults, **options})


class LearningRates(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("lr_schedule", LR_SCHEDULES)
def test_the_learning_rate_follows_its_schedule(tmp_path, lr_schedule):
    rates = LearningRates()
    model = Classifier("MLP", sizes=(64, 10), lr=0.1, lr_schedule=lr_schedule)
    run = trainer(
        tmp_path, max_epochs=2, limit_train_batches=10, callbacks=[rates], enable_checkpointing=False
    )
    run.fit(model, Digits())
    expected = {
        "constant": [0.1] * 20,
        "cosine": [0.05 * (1 + math.cos(math.pi * i / 20)) for i in range(20)],
        "constant_then_cosine": [0.1] * 14 + [0.05 * (1 + math.cos(math.pi * i / 6)) for i in range(6)],
    }[lr_schedule]
    assert rates.seen == pytest.approx(expected)
    assert Optimization(lr_schedule=lr_schedule).lr_factor(1.0) == pytest.approx(
        1.0 if lr_schedule == "constant" else 0.0
    )


def test_the_mlp_learns_the_digits(tmp_path):
    L.seed_everything(0, verbose=False)
    model, digits = Classifier("MLP", sizes=(64, 64, 10), lr=5e-3), Digits()
    run = trainer(tmp_path, max_epochs=4, enable_checkpointing=False)
    run.fit(model, digits)
    (metrics,) = run.test(model, digits, verbose=False)
    assert metrics["test/acc"] > 0.9
    inputs, targets = digits.sets["test"].inputs, digits.sets["test"].targets
    with torch.no_grad():
        logits = model.eval()(inputs)
    assert metrics["test/acc"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert metrics["test/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_the_language_model_learns_and_reports_perplexity(tmp_path):
    L.seed_everything(0, verbose=False)
    (tmp_path / "tinyshakespeare.txt").write_text("abcdefgh" * 500)
    data = TinyShakespeare(tmp_path, batch_size=16, block_size=16)
    model = LanguageModel(vocab_size=8, block_size=16, num_layers=1, num_heads=1, width=16, lr=1e-2)
    run = trainer(tmp_path, max_epochs=6, enable_checkpointing=False)
    run.fit(model, data)
    assert run.callback_metrics["val/perplexity"] < 2  # of 8 characters in turn
    (metrics,) = run.test(model, data, verbose=False)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        Classifier("ConvNet", width=8, optimizer="sgd", lr=0.1, num_classes=10),
        LanguageModel(
            "GPT", num_layers=1, num_heads=2, width=16, tied=True, weight_decay=0.1, optimizer="adamw"
        ),
    ],
    ids=["classifier", "language model"],
)
def test_a_checkpoint_is_all_that_is_needed(tmp_path, model):
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert dict(loaded.hparams) == dict(model.hparams)
    assert loaded.optimization == model.optimization
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_optimizer_is_the_one_asked_for(name):
    model = Classifier("MLP", sizes=(4, 2), optimizer=name, lr=0.5, weight_decay=0.25, lr_schedule="constant")
    optimizer = model.configure_optimizers()
    assert type(optimizer).__name__.lower() == name
    assert optimizer.defaults["lr"] == 0.5 and optimizer.defaults["weight_decay"] == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "MPL"}, r"`network` is one of \[.*'MLP'.*\], but got 'MPL'. Did you mean MLP"),
        ({"optimizer": "adma"}, "`optimizer` is one of .* Did you mean adam"),
        ({"lr_schedule": "cosin"}, "`lr_schedule` is one of .* Did you mean cosine"),
        ({"lr": 0.0}, "`lr` is a number above 0, but got 0.0"),
        ({"momentum": 1.0}, r"`momentum` is a number in \[0, 1\), but got 1.0"),
        ({"weight_decay": -1}, "`weight_decay` is a number of at least 0, but got -1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**options)


def test_a_setting_that_the_network_lacks_is_refused():
    with pytest.raises(TypeError, match="widht"):
        Classifier("ConvNet", widht=3)


def test_a_run_of_unknown_length_is_refused(tmp_path):
    run = trainer(tmp_path, max_epochs=-1, max_time="00:00:01:00", enable_checkpointing=False)
    with pytest.raises(ValueError, match="`lr_schedule` 'constant_then_cosine' needs a run of known length"):
        run.fit(Classifier("MLP", sizes=(64, 10)), Digits())
