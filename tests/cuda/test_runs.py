"""Training on a GPU: masks hold under mixed precision, skipped steps and compilation, and runs go on bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import (
    Channel,
    Magnitude,
    NofM,
    PerRow,
    PostTrainingPruning,
    SparseGPT,
    SparseTraining,
    SparsityMonitor,
    TrainTimePruning,
    Wanda,
    Window,
    prune,
    shrink,
    to_semi_structured,
)
from lightning_prune.examples.networks import GPT, ResNet20
from lightning_prune.model.calls import Call
from lightning_prune.model.latency import measure_latencies
from tests.callbacks.test_post_training import Plain
from tests.callbacks.toy import NUM_BATCHES, Toy, Witness, data, trainer
from tests.cuda.test_tensors import no_waiting

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),  # in a run that goes on on a CPU
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match"),  # under DDP
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # of the compiler
]
QUICK = Window(start=2, end=16, every=2, unit="steps")
KINDS = {
    "magnitude": lambda **k: TrainTimePruning(0.8, **k),
    "wanda": lambda **k: TrainTimePruning(0.8, criterion=Wanda(), scope=PerRow(), **k),
    "channels": lambda **k: TrainTimePruning(0.5, granularity=Channel(), shrink="never", **k),
    "rigl": lambda **k: SparseTraining(0.8, **k),
}


def sparsity(module, pruning):
    """The fraction of zeros among the target weights."""
    weights = [module.get_parameter(name) for name in pruning.masks]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def on_gpu(*callbacks, **options):
    return trainer(*callbacks, accelerator="gpu", **options)


class Overflowing(Toy):
    """Its scaled gradients overflow at every third batch: the step is skipped."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 1e30 if batch_idx % 3 == 1 else loss


@pytest.mark.parametrize(
    "optimizer", [{"optimizer": "SGD", "lr": 0.1}, {"fused": True}, {"foreach": True}], ids=str
)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "32"])
def test_no_forward_reads_a_pruned_weight(precision, optimizer):
    pruning = TrainTimePruning(0.8, window=QUICK, report=False)
    witness = Witness(pruning)
    module = (Overflowing if precision == "16-mixed" else Toy)(**optimizer)
    scales = []
    fitted = on_gpu(pruning, witness, precision=precision)
    module.on_train_batch_end = lambda *_: scales.append(getattr(fitted.precision_plugin, "scaler", None))
    fitted.fit(module, data(), data())
    for name, mask in pruning.masks.items():  # where Lightning has put the weights after the run
        assert mask.device == module.get_parameter(name).device
    assert witness.violations == 0 and witness.reads > 3 * NUM_BATCHES
    assert sparsity(module, pruning) == pytest.approx(0.8, abs=0.01)
    if precision == "16-mixed":
        assert scales[-1].get_scale() < 2.0**16  # steps were skipped


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device_between_updates(kind):
    """As the GPU itself sees it: torch makes what waits an error, while the callback's hooks run."""
    window = Window(start=4, end=16, every=4, unit="steps")
    callback, quiet = KINDS[kind](window=window, report=False), []

    def watched(inner):
        def hook(*args, **kwargs):
            if callback._ramp.is_near or callback._ramp.is_due or not callback.updates:
                return inner(*args, **kwargs)
            quiet.append(inner.__name__)
            with no_waiting():
                return inner(*args, **kwargs)

        return hook

    for name in ("on_train_batch_start", "on_before_optimizer_step", "_after_step"):
        setattr(callback, name, watched(getattr(callback, name)))
    fitted = on_gpu(callback)
    fitted.fit(Toy(), data(), data())
    assert quiet.count("_after_step") >= NUM_BATCHES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_it_goes_on_bit_for_bit(kind, precision, tmp_path):
    def fit(folder, ckpt_path=None, seed=7):
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        pruning = KINDS[kind](window=QUICK, report=False)
        module = Toy()
        torch.manual_seed(seed)
        on_gpu(pruning, saving, precision=precision).fit(
            module, data(shuffle=True), data(), ckpt_path=ckpt_path, weights_only=True
        )
        return module.state_dict(), pruning

    whole, pruning = fit(tmp_path)
    resumed, again = fit(tmp_path / "resumed", tmp_path / "step=9.ckpt", seed=8)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruning.masks.items())


@pytest.mark.parametrize(("first", "then"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_a_run_goes_on_on_another_device(first, then, tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=9, save_top_k=-1)
    trainer(TrainTimePruning(0.8, window=QUICK, report=False), saving, accelerator=first).fit(
        Toy(), data(), data()
    )
    pruning = TrainTimePruning(0.8, window=QUICK, report=False)
    witness, module = Witness(pruning), Toy()
    fitted = trainer(pruning, witness, accelerator=then)
    fitted.fit(module, data(), data(), ckpt_path=tmp_path / "step=9.ckpt", weights_only=True)
    assert fitted.global_step == 4 * NUM_BATCHES and witness.violations == 0
    assert sparsity(module, pruning) == pytest.approx(0.8, abs=0.01)


def test_a_compiled_module_keeps_its_masks():
    pruning = TrainTimePruning(0.8, window=QUICK, report=False)
    module = Toy()
    module.body.compile()
    on_gpu(pruning).fit(module, data(), data())
    assert sparsity(module, pruning) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_nccl_with_one_process(strategy):
    pruning = TrainTimePruning(0.8, criterion=Wanda(), window=QUICK, report=False)
    witness, module = Witness(pruning), Toy()
    on_gpu(pruning, witness, strategy=strategy, devices=1).fit(module, data(), data())
    assert witness.violations == 0 and sparsity(module, pruning) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("network", ["resnet", "gpt"])
def test_surgery_is_proved_on_the_gpu(network, device):
    torch.manual_seed(0)
    if network == "resnet":
        model, example = ResNet20().to(device), torch.randn(4, 3, 32, 32, device=device)
    else:
        model, example = GPT(vocab_size=17).to(device), torch.randint(0, 17, (2, 16), device=device)
    before = sum(p.numel() for p in model.parameters())
    plan = shrink(model, example, 0.5)
    assert plan.error is not None and plan.error < 1e-10
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before
    assert all(p.is_cuda for p in model.parameters()) and model(example).isfinite().all()


def test_a_trained_model_is_pruned_where_it_lies(tmp_path):
    module = Toy()
    pruning = PostTrainingPruning(criterion=Magnitude(), scope=NofM(2, 4), solver=SparseGPT(), report=False)
    pruning.run(on_gpu(pruning, default_root_dir=tmp_path), module, Plain())
    assert len(pruning.masks) == 3
    for name, mask in pruning.masks.items():
        assert torch.equal(mask.view(-1, 4).sum(1), torch.full((mask.numel() // 4,), 2, device=mask.device))
        assert not module.get_parameter(name)[~mask].any()


def test_sparse_tensor_cores_compute_the_same(device):
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("needs sparse tensor cores")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 8192), nn.ReLU(), nn.Linear(8192, 4096)).to(device).half()
    prune(model, scope=NofM(2, 4))
    example = torch.randn(4096, 4096, device=device).half()
    wanted = model(example)
    found = to_semi_structured(model, example)
    assert [layer.reason for layer in found.layers] == [None, None], found
    torch.testing.assert_close(model(example), wanted, rtol=2e-2, atol=2e-2)
    assert found.error is None or found.error < 1e-2


def test_latency_is_that_of_the_gpu(device):
    model = nn.Linear(64, 64).to(device)
    (found,) = measure_latencies(Call(model, (torch.randn(8, 64, device=device),), {}), seconds=0.01)
    assert found.device.startswith("cuda") and found.clock == "wall" and found.median_ms > 0


@pytest.mark.parametrize("shrinks", [True, False])
def test_a_report_is_of_latencies_on_the_gpu(shrinks, tmp_path):
    what = {"granularity": Channel(multiple_of=1)} if shrinks else {}
    pruning, monitor = TrainTimePruning(0.5, window=QUICK, **what), SparsityMonitor(show=False)
    module = Toy()
    on_gpu(pruning, monitor, default_root_dir=tmp_path).fit(module, data(), data())
    for cost in (monitor.report.cost_before, monitor.report.cost_after):
        assert cost.latency.device.startswith("cuda")
    assert {p.device.type for p in module.parameters()} == {"cpu"}  # where Lightning has put it
