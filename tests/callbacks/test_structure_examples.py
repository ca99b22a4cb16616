"""The example networks become smaller while they train: resumed, loaded and reported on, with real data and tasks."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from lightning_prune import (
    Budget,
    Channel,
    Head,
    Layer,
    PostTrainingPruning,
    Saliency,
    TrainTimePruning,
    Window,
    load_pruned,
)
from lightning_prune.examples.data import Digits
from lightning_prune.examples.loading import Pairs, ResumableLoader, as_sliced
from lightning_prune.examples.tasks import Classifier, LanguageModel
from lightning_prune.model.history import plans_of
from lightning_prune.report.storage import load
from tests.callbacks.toy import GAN, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]
GPT = {
    "num_layers": 2,
    "width": 32,
    "block_size": 16,
    "vocab_size": 11,
    "lr": 3e-3,
    "lr_schedule": "constant",
}
NETWORKS = {
    "mlp": (Classifier, {"network": "MLP", "sizes": [64, 48, 32, 10]}, {}),
    "convnet": (Classifier, {"network": "ConvNet", "width": 8, "lr": 3e-3}, {}),
    "convnet-macs": (Classifier, {"network": "ConvNet"}, {"sparsity": None, "budget": Budget(macs=0.5)}),
    "convnet-sgd": (
        Classifier,
        {"network": "ConvNet", "optimizer": "sgd", "lr": 0.05},
        {"criterion": Saliency()},
    ),
    "resnet": (Classifier, {"network": "ResNet20", "in_channels": 1, "lr": 3e-3}, {}),
    "gpt": (LanguageModel, GPT, {}),
    "gpt-heads": (LanguageModel, GPT, {"granularity": Head()}),
    "gpt-tied": (
        LanguageModel,
        {**GPT, "tied": True},
        {"granularity": Channel(multiple_of=2, heads="whole")},
    ),
}
NUM_STEPS = 10


def tokens(num=8 * NUM_STEPS // 2, length=12):
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(11, (num, length + 1), generator=draw)
    pairs = Pairs(text[:, :-1], text[:, 1:])
    sampler = DistributedSampler(pairs, num_replicas=1, rank=0, shuffle=True)
    return ResumableLoader(pairs, batch_size=8, sampler=sampler, collate_fn=as_sliced)


def fit(name, folder, shrink="update", ckpt_path=None, report=False):
    task, settings, options = NETWORKS[name]
    torch.manual_seed(3)
    module = task(**settings)
    callback = TrainTimePruning(
        **{"sparsity": 0.4, "granularity": Channel(multiple_of=2), **options},
        window=Window(every=0.2, end=0.8),
        shrink=shrink,
        report=report,
    )
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        callback,
        saving,
        max_epochs=2,
        limit_train_batches=NUM_STEPS // 2,
        limit_val_batches=1,
        default_root_dir=folder,
    )
    loaders = (tokens(), tokens(8)) if task is LanguageModel else (None, None)
    datamodule = Digits(batch_size=32) if task is Classifier else None
    run.fit(module, *loaders, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    return run, module, callback


def state(run, module):
    found = dict(module.state_dict())
    for optimizer in run.optimizers:
        for i, values in optimizer.state_dict()["state"].items():
            found |= {f"{i}.{k}": v for k, v in values.items() if torch.is_tensor(v)}
    return found


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def example(module):
    return torch.zeros(2, 5).long() if isinstance(module, LanguageModel) else torch.randn(2, 1, 8, 8)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_shrinks_resumes_and_loads(name, tmp_path):
    run, module, callback = fit(name, tmp_path)
    task, settings, _ = NETWORKS[name]
    dense = sum(p.numel() for p in task(**settings).parameters())
    assert sum(p.numel() for p in module.parameters()) < dense and plans_of(module)
    assert all(plan.error < 1e-10 for plan in plans_of(module))
    for step in (3, NUM_STEPS - 1):
        path = tmp_path / f"step={step}.ckpt"
        assert_same(state(run, module), state(*fit(name, tmp_path / f"from{step}", ckpt_path=path)[:2]))
    loaded = load_pruned(task, tmp_path / f"step={NUM_STEPS}.ckpt")
    x = example(module)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert callback.warnings == [w for w in callback.warnings if "learning rate" in w]


@pytest.mark.parametrize("name", ["convnet", "gpt"])
def test_a_report_tells_what_was_gained(name, tmp_path):
    _, module, _ = fit(name, tmp_path, shrink="end", report=True)
    report = load(tmp_path / "report.json")
    assert report.cost_after.params == sum(p.numel() for p in module.parameters())
    assert report.cost_after.params < report.cost_before.params
    assert report.cost_after.macs < report.cost_before.macs
    assert "load_pruned(" in report.load_command


def test_blocks_are_skipped_in_one_shot(tmp_path):
    module = LanguageModel(**{**GPT, "num_layers": 4})
    callback = PostTrainingPruning(0.5, granularity=Layer(), report=False)
    trainer(callback, ModelCheckpoint(tmp_path), max_epochs=1).fit(module, tokens(), tokens(8))
    assert len([n for n, _ in module.named_parameters() if n.endswith("qkv.weight")]) == 2
    loaded = load_pruned(LanguageModel, tmp_path / "pruned.ckpt")
    x = example(module)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_a_model_with_two_optimizers_shrinks(tmp_path):
    """Manual optimization: the step that shows the model is the validation step, which the GAN has to have."""

    class Gan(GAN):
        def validation_step(self, batch, batch_idx):
            self.discriminator(self.generator(batch[0][:, :4]))

    callback = TrainTimePruning(
        0.5,
        granularity=Channel(multiple_of=1),
        window=Window(every=0.2, end=0.6),
        shrink="update",
        report=False,
    )
    module = Gan()
    run = trainer(callback, max_epochs=2)
    run.fit(module, data(), data())
    assert module.generator[0].out_features < 16 or module.discriminator[0].out_features < 16
    for optimizer in run.optimizers:
        for p, values in optimizer.state.items():
            assert values["exp_avg"].shape == p.shape


class Encoder(nn.Module):
    """Torch's own encoder layer around tokens of 8 numbers."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(1, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.layer(self.inside(x.flatten(1)[:, :8].unsqueeze(-1))).mean(1))


@pytest.mark.parametrize("heads", ["dim", "whole"])
def test_the_attention_of_torch_shrinks_too(heads, tmp_path):
    class Attending(Classifier):
        def __init__(self):
            super().__init__("MLP", sizes=[64, 10], lr=3e-3)
            torch.manual_seed(0)
            self.network = Encoder()

    granularity = Channel(multiple_of=1, heads=heads)
    callback = PostTrainingPruning(0.5, granularity=granularity, report=False)
    module, digits = Attending(), Digits(batch_size=32)
    run = trainer(
        callback, ModelCheckpoint(tmp_path), max_epochs=1, limit_train_batches=5, limit_val_batches=2
    )
    run.fit(module, datamodule=digits)
    attention = module.network.layer.self_attn
    assert (attention.num_heads, attention.head_dim) != (4, 4)
    loaded, x = load_pruned(Attending, tmp_path / "pruned.ckpt"), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), module.eval()(x))
    loaded.train()(x).sum().backward()
    again = trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    again.fit(loaded, datamodule=digits)
