"""Knowledge distillation: a network that is pruned learns from what it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn

from lightning_prune.callbacks.evaluation import builds_late
from lightning_prune.callbacks.own_steps import silenced
from lightning_prune.callbacks.structure import SeesDense
from lightning_prune.core.checks import check_path, check_positive, check_range, did_you_mean
from lightning_prune.graph.sandbox import attributes_kept, buffers_copied, eager
from lightning_prune.model.calls import capture_call, random_states_kept
from lightning_prune.model.copies import copied
from lightning_prune.model.distillation import distillation_loss, feature_loss
from lightning_prune.model.whole import read_checkpoint


class Distillation(L.Callback, SeesDense):
    """Let a dense teacher guide the training: loss = (1 - weight) loss + weight T^2 KL(teacher || student).

    Hinton et al. 2015 (arXiv:1503.02531). The teacher is the module as it is when fitting begins (start from the
    checkpoint of a trained model), or a checkpoint; it is frozen, in eval mode, and no part of the module: neither its
    parameters nor its `state_dict` know of it. What is compared are the outputs of one module, the one that the
    training step calls: nothing in `training_step` has to change. `features` compares inner layers as well, by their
    mean squared difference (Romero et al. 2014, arXiv:1412.6550), as long as they have the same sizes.

    Put it before the pruning callback. A resumed run has the same teacher: its weights are in the callback's state,
    unless it came from a checkpoint.

    Cost: a forward pass of the teacher for each batch, and its weights in memory and, without a file, in checkpoints.

    When: fine-tuning after one-shot pruning, and pruning in training from a trained model, where labels are few or
        noisy.

    Args:
        weight: of the distillation, in [0, 1]; 0 is the labels alone, 1 the teacher alone.
        temperature: above 0.
        teacher: a checkpoint of the module; None is the module when fitting begins.
        output: path of the module whose output are the logits; by default the one that the training step calls.
        class_dim: the dim of the logits along which classes lie.
        features: paths of modules, inside of the one that gives the logits, whose outputs are compared too.
        feature_weight: of their difference, at least 0; it is added.

    Raises:
        ValueError: a value out of its range, at once; manual optimization, a path that is none, or a checkpoint of
            another model, before the first step.

    Example:
        >>> from lightning_prune import Distillation
        >>> Distillation(weight=0.9, temperature=2.0).weight
        0.9
    """

    def __init__(
        self,
        weight: float = 0.5,
        *,
        temperature: float = 4.0,
        teacher: str | Path | None = None,
        output: str | None = None,
        class_dim: int = -1,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
    ) -> None:
        self.weight = check_range("weight", weight, 0.0, 1.0, "a number in [0, 1]")
        check_positive("temperature", temperature)
        self.feature_weight = check_range(
            "feature_weight", feature_weight, 0.0, 1e9, "a number of at least 0"
        )
        self.temperature, self.class_dim, self.output = temperature, class_dim, output
        self.file = None if teacher is None else check_path("teacher", teacher)
        self.features = tuple(features)
        self.teacher: nn.Module | None = None
        self._loaded: dict[str, Any] = {}
        self._step: Callable[..., Any] | None = None
        self._is_own_step, self._is_built, self._is_warned = False, True, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the teacher, before anything is pruned; of a network that the module builds later, when fitting begins.

        Raises:
            ValueError: manual optimization, a path that is none, or a checkpoint of another model.
        """
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "`automatic_optimization` is True with Distillation, which adds to its loss, but got False."
            )
        self.teacher = copied(pl_module)
        self._is_built = not builds_late(pl_module)
        if self._is_built:
            self._check_paths(pl_module)
            self._load_file_()

    def see_dense_(self, module: L.LightningModule) -> None:
        """Copy the teacher where there was nothing to copy before the module's own hooks."""
        if self._is_built:
            return
        assert self.teacher is not None
        self._is_built, known = True, {name for name, _ in self.teacher.named_parameters()}
        if any(name not in known for name, _ in module.named_parameters()):
            self.teacher = copied(module)
        self._check_paths(module)
        self._load_file_()

    def _check_paths(self, module: L.LightningModule) -> None:
        paths = dict(module.named_modules())
        for argument, path in [("output", self.output), *(("features", name) for name in self.features)]:
            if path is not None and path not in paths:
                raise ValueError(
                    f"`{argument}` has paths of modules, but got {path!r}.{did_you_mean(path, list(paths))}"
                )

    def _load_file_(self) -> None:
        if self.file is not None:
            self._load_(read_checkpoint(self.file)["state_dict"])

    def _load_(self, state: dict[str, Tensor]) -> None:
        assert self.teacher is not None
        try:
            self.teacher.load_state_dict(state, strict=bool(self.teacher.strict_loading))
        except RuntimeError as error:
            raise ValueError(
                f"`teacher` is a model of the same kind, before it became smaller, but got another: {error}. Put "
                "Distillation before the pruning callback."
            ) from None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze the teacher, and let the training step's loss listen to it."""
        assert self.teacher is not None
        self.see_dense_(pl_module)
        if self.file is None:
            if "teacher" in self._loaded:
                self._load_(self._loaded["teacher"])
            elif trainer.ckpt_path is not None:  # its weights came after the copy
                self.teacher = copied(pl_module)
        self.output = self.output if self.output is not None else self._loaded.get("output")
        if isinstance(trainer.precision_plugin, (DoublePrecision, HalfPrecision)):
            trainer.precision_plugin.convert_module(self.teacher)  # it was copied before the module was
        self.teacher.eval().to(pl_module.device)
        for parameter in self.teacher.parameters():  # those of scripted modules are copied with their history
            parameter.detach_().requires_grad_(False)
        step = pl_module.training_step

        @wraps(step)
        def taught(*args: Any, **kwargs: Any) -> Any:
            return self._taught(pl_module, step, *args, **kwargs)

        self._step, self._is_own_step = step, "training_step" in vars(pl_module)
        pl_module.training_step = taught  # type: ignore[method-assign]

    def _taught(self, module: L.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the training step, and mix the teacher's opinion into its loss."""
        if self.output is None:
            self.output = self._found(module, step, *args, **kwargs)
        if self.output is None:
            return step(*args, **kwargs)
        student = module.get_submodule(self.output)
        with _watched(student) as calls, _watched_outputs(module, self.features) as ours:
            result = step(*args, **kwargs)
        if result is None:
            return result
        if not calls:
            self._warn_once()
            return result
        assert self.teacher is not None
        teacher = self.teacher.get_submodule(self.output)
        with torch.no_grad(), _watched_outputs(self.teacher, self.features) as theirs:
            goals = [_logits(teacher(*a, **k)) for a, k, _ in calls]
        losses = [
            distillation_loss(_logits(y), goal, self.temperature, self.class_dim)
            for (_, _, y), goal in zip(calls, goals, strict=True)
        ]
        taught = torch.stack(losses).mean()
        module.log("train/distillation", taught.detach(), batch_size=len(goals[0]))
        loss = result["loss"] if isinstance(result, dict) else result
        mixed = (1.0 - self.weight) * loss + self.weight * taught
        if self.features:
            mixed = mixed + self.feature_weight * feature_loss(ours, theirs)
        return {**result, "loss": mixed} if isinstance(result, dict) else mixed

    def _warn_once(self) -> None:
        if not self._is_warned:
            self._is_warned = True
            rank_zero_warn(
                f"Distillation saw no call of `{self.output}`, so that the teacher is not listened to: `output` names "
                "another module, or one within what is compiled. Compile that module, not what calls it."
            )

    def _found(
        self, module: L.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> str | None:
        """Run the training step once without a trace, and return the path of what it calls; None for nothing."""
        with (
            torch.no_grad(),
            random_states_kept(module.device),
            silenced(module),
            attributes_kept(module),
            buffers_copied(module.modules()),
            eager(),
            capture_call(module) as caught,
        ):
            step(*args, **kwargs)
        paths = {found: path for path, found in module.named_modules()}
        return None if caught.call is None else paths[caught.call.module]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its own training step back."""
        if self._step is not None and "training_step" in vars(pl_module):
            del pl_module.training_step
            if self._is_own_step:
                pl_module.training_step = self._step  # type: ignore[method-assign]
        self._step = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the module its own training step back."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher, unless it is in a file, and which module's outputs are compared."""
        if self.teacher is None:
            return self._loaded
        kept = {} if self.file is not None else {"teacher": dict(self.teacher.state_dict())}
        return {"output": self.output, **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the teacher of the run that is resumed, when fitting starts."""
        self._loaded = state_dict


def _logits(output: Any) -> Tensor:
    """Return the tensor of an output: itself, the `logits` of an object or mapping, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        found: Tensor = output["logits"]
        return found
    if hasattr(output, "logits"):
        return output.logits  # type: ignore[no-any-return]
    return _logits(output[0])


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[tuple[Any, Any, Any]]]:
    """Note arguments and outputs of all calls of a module."""
    calls: list[tuple[Any, Any, Any]] = []

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, output))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _watched_outputs(module: nn.Module, paths: Sequence[str]) -> Iterator[list[Tensor]]:
    """Note the outputs of some modules, in the order in which they run."""
    outputs: list[Tensor] = []
    handles = [
        module.get_submodule(path).register_forward_hook(
            lambda _, __, output: outputs.append(_logits(output))
        )
        for path in paths
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
