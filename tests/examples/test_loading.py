from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.examples.data import Digits
from lightning_prune.examples.loading import Pairs, Windows
from lightning_prune.examples.tasks import Classifier


def epoch_of(digits: Digits, epoch: int) -> list[torch.Tensor]:
    loader = digits.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [targets for _, targets in loader]


def digits_ready(**options) -> Digits:
    digits = Digits(**options)
    digits.setup("fit")
    return digits


def test_batches_equal_those_of_a_plain_loader():
    pairs = Pairs(torch.rand(10, 3), torch.arange(10))
    plain = DataLoader(TensorDataset(pairs.inputs, pairs.targets), batch_size=4)
    sliced = DataLoader(pairs, batch_size=4, collate_fn=lambda batch: batch)
    for (a, b), (c, d) in zip(plain, sliced, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_a_single_window_equals_its_row_of_a_batch():
    windows = Windows(torch.arange(20, dtype=torch.uint8), block_size=4)
    inputs, targets = windows.__getitems__([0, 3])
    assert torch.equal(windows[3][0], inputs[1]) and torch.equal(windows[3][1], targets[1])
    assert len(windows) == 4


def test_an_epoch_has_every_example_once_and_its_order_depends_on_seed_and_epoch():
    first, second = (torch.cat(epoch_of(digits_ready(seed=0), epoch)) for epoch in (0, 1))
    assert len(first) == 1257 and torch.equal(first.bincount(), second.bincount())
    assert not torch.equal(first, second)
    assert torch.equal(second, torch.cat(epoch_of(digits_ready(seed=0), 1)))
    assert not torch.equal(first, torch.cat(epoch_of(digits_ready(seed=1), 0)))


def test_a_restored_loader_goes_on_where_the_saved_one_was():
    expected = epoch_of(digits_ready(), 2)
    saved = digits_ready().train_dataloader()
    saved.sampler.set_epoch(2)
    batches = iter(saved)
    for _ in range(3):
        next(batches)
    restored = digits_ready().train_dataloader()
    restored.load_state_dict(saved.state_dict())
    restored.sampler.set_epoch(2)
    rest = [targets for _, targets in restored]
    assert len(rest) == len(expected) - 3
    assert all(torch.equal(a, b) for a, b in zip(rest, expected[3:], strict=True))
    assert len(list(restored)) == len(expected), "only once"


def test_an_epoch_that_was_cut_short_is_not_continued_in_the_next_one():
    saved = digits_ready().train_dataloader()
    next(iter(saved))
    restored = digits_ready().train_dataloader()
    restored.load_state_dict(saved.state_dict())
    restored.sampler.set_epoch(1)
    assert len(list(restored)) == len(restored)


def test_workers_read_the_same_batches():
    alone, with_worker = (epoch_of(digits_ready(batch_size=500, num_workers=n), 0) for n in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(alone, with_worker, strict=True))


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append(batch[1])


def fit(folder, *, max_steps: int, ckpt_path=None, **options):
    L.seed_everything(1, verbose=False)
    recorder, model = Recorder(), Classifier("MLP", sizes=(64, 16, 10))
    trainer = L.Trainer(
        max_epochs=3,
        max_steps=max_steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            recorder,
            ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"),
        ],
        **options,
    )
    trainer.fit(model, Digits(batch_size=128), ckpt_path=ckpt_path, weights_only=True)
    return model, recorder.seen


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("num_steps", "options"), [(4, {}), (10, {}), (13, {}), (5, {"limit_train_batches": 5})]
)
def test_a_resumed_run_sees_the_batches_and_ends_with_the_weights_of_the_whole_one(
    tmp_path, num_steps, options
):
    whole, expected = fit(tmp_path / "whole", max_steps=-1, **options)
    resumed, seen = fit(
        tmp_path / "resumed",
        max_steps=-1,
        ckpt_path=tmp_path / "whole" / f"step={num_steps}.ckpt",
        **options,
    )
    assert len(seen) == len(expected) - num_steps
    assert all(torch.equal(a, b) for a, b in zip(seen, expected[num_steps:], strict=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_lightning_may_overfit_on_few_batches(tmp_path):
    _, seen = fit(tmp_path, max_steps=4, overfit_batches=2)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
