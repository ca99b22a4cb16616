"""The record of a pruning, replayed: a freshly built dense model becomes as small as a checkpoint, without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.core.patterns import listed
from lightning_prune.graph import Plan
from lightning_prune.model.history import KEY as KEY
from lightning_prune.model.history import plans_of, read_record
from lightning_prune.model.surgery import carry_out_
from lightning_prune.model.whole import check_whole

HOOK = "on_load_checkpoint"
M = TypeVar("M", bound=nn.Module)
_PATCHING = RLock()
_PLAIN, _NORM = nn.Module._load_from_state_dict, _NormBase._load_from_state_dict


def replay_(model: nn.Module, plans: Iterable[Plan], copies: Sequence[nn.Module] = ()) -> None:
    """Carry out plans one after another on a model and copies of it, all of them or none.

    Raises:
        ValueError: the plans belong to another model; this one is then as it was.
    """
    with ExitStack() as undo:
        for plan in plans:
            carry_out_(model, plan, undo, copies=copies)
        undo.pop_all()


def shrink_to_(
    model: nn.Module, checkpoint: Mapping[str, Any], copies: Sequence[nn.Module] = ()
) -> list[Plan]:
    """Make a model as small as the one of a checkpoint, as far as it is not yet, and return the checkpoint's plans.

    Call it before the weights are loaded. One without a record, whose weights fit, changes nothing.

    Raises:
        ValueError: the record is damaged, of a newer version or of another model, or this one is smaller already. It is
            then as it was.
    """
    replay_(model, missing_plans(model, checkpoint), copies)
    return list(read_record(checkpoint))


@contextmanager
def shrunk_to(
    module: nn.Module, checkpoint: Mapping[str, Any], copies: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Make a module as small as the one of a checkpoint; it is as it was if what follows fails.

    So it is where the weights, which are loaded next, do not fit.

    Raises:
        ValueError: as for `shrink_to_`; or the checkpoint's weights do not fit the smaller module.
    """
    with ExitStack() as undo:
        missing = missing_plans(module, checkpoint)
        for plan in missing:
            carry_out_(module, plan, undo, copies=copies)
        yield
        if missing and (reason := _misfit(module, checkpoint)):
            raise ValueError(
                f"`ckpt_path` is a checkpoint whose weights fit a {type(module).__name__} once it is as small, but "
                f"got one {reason}."
            )
        undo.pop_all()


def _misfit(module: nn.Module, checkpoint: Mapping[str, Any]) -> str | None:
    """Say what keeps a checkpoint's weights from being loaded; names count where a Trainer loads them by itself."""
    if "state_dict" not in checkpoint:
        return f"of {', '.join(checkpoint)} alone"
    own, weights = module.state_dict(), checkpoint["state_dict"]
    if wrong := [n for n in own if n in weights and _shape(own[n]) != _shape(weights[n])]:
        return f"in which {listed(wrong)} has another shape"
    is_plain = type(module).load_state_dict is nn.Module.load_state_dict and not any(
        part._load_state_dict_pre_hooks or type(part)._load_from_state_dict not in (_PLAIN, _NORM)
        for part in module.modules()
    )
    if is_plain and getattr(module, "_trainer", None) is not None and getattr(module, "strict_loading", True):
        if lacking := [name for name in own if name not in weights]:
            return f"without {listed(lacking)}"
        if unknown := [name for name in weights if name not in own]:
            return f"with {listed(unknown)}, which it has not"
    return None


def _shape(value: object) -> object:
    return getattr(value, "shape", None)


def missing_plans(model: nn.Module, checkpoint: Mapping[str, Any]) -> tuple[Plan, ...]:
    """Return the plans of a checkpoint that were not carried out on a model yet.

    Raises:
        ValueError: as for `shrink_to_`.
    """
    plans, done = read_record(checkpoint), plans_of(model)
    if plans[: len(done)] == done:
        return plans[len(done) :]
    if not plans and _fits(model, checkpoint.get("state_dict", {})):
        return ()
    raise ValueError(_why_not(model, plans, done))


def _fits(model: nn.Module, weights: Mapping[str, Any]) -> bool:
    own = model.state_dict()
    return all(own[name].shape == weights[name].shape for name in own if name in weights)


def _why_not(model: nn.Module, plans: tuple[Plan, ...], done: tuple[Plan, ...]) -> str:
    kind = type(model).__name__
    if done[: len(plans)] == plans:
        return (
            f"`checkpoint` is loaded into a model that is not smaller than its own, but got a {kind} that was made "
            f"smaller {len(done)} times, and a checkpoint from when it had been {len(plans)} times: build a new "
            f"{kind}. SparseModelCheckpoint chooses a best checkpoint that is as small as the result."
        )
    first = next(i for i, (a, b) in enumerate(zip(plans, done, strict=False)) if a != b)
    return (
        f"`checkpoint` is loaded into a model that was pruned as its own was, but got a {kind} that was pruned "
        f"differently: {'; '.join(plans[first].differences(done[first])[:3])}. Build a new {kind}."
    )


def load_pruned(
    cls: type[M], path: str | Path, *, map_location: Any = "cpu", strict: bool | None = None, **kwargs: Any
) -> M:
    """Load a LightningModule from a checkpoint in which it is physically smaller than its class builds it.

    `Class.load_from_checkpoint` does the work, with `weights_only=True`: nothing is unpickled but tensors and plain
    data. Before it loads the weights, the checkpoint's record is replayed. Dense checkpoints load as ever. From a file
    of `export_weights`, which ends in ".safetensors", any module is built, with the hyperparameters that it holds.

    Args:
        cls: the LightningModule; for safetensors, the class of the module.
        path: of a checkpoint, or of a safetensors file.
        map_location: where the weights go, as for `torch.load`.
        strict: whether the names must agree, as for `load_from_checkpoint`.
        kwargs: arguments of `cls` that the checkpoint does not hold, or others than it holds.

    Raises:
        ValueError: the record is damaged, of a newer version or of another model, the file is no checkpoint, or `cls`
            is no LightningModule.

    Example:
        >>> load_pruned(LitModel, "pruned.ckpt")  # doctest: +SKIP
    """
    if str(path).endswith(".safetensors"):
        from lightning_prune.model.export.weights import build_from

        if strict is False:
            raise ValueError(
                "`strict` is True for safetensors, which hold all of a model or are refused, but got False."
            )
        return build_from(cls, path, **kwargs).to(map_location)
    if not (isinstance(cls, type) and hasattr(cls, "load_from_checkpoint")):
        raise ValueError(
            f"`cls` is a LightningModule, which builds itself from a checkpoint, but got {cls!r}."
        )
    check_whole(path)
    with _replaying(cls):
        load: Callable[..., M] = getattr(cls, "load_from_checkpoint")  # noqa: B009
        try:
            return load(path, map_location=map_location, strict=strict, weights_only=True, **kwargs)
        except KeyError as error:
            if error.args != ("pytorch-lightning_version",):
                raise
            raise ValueError(
                f"`path` is a checkpoint that a Trainer has saved, but got {str(path)!r}, which is none: weights alone "
                f"go into a model of their size by `load_state_dict`, those of `export_weights` end in .safetensors."
            ) from error


@contextmanager
def _replaying(cls: Any) -> Iterator[None]:
    """Let what is loaded by a class replay its record first; what other threads load meanwhile does so, too."""
    inner = getattr(cls, HOOK)

    def on_load_checkpoint(self: nn.Module, checkpoint: dict[str, Any]) -> None:
        shrink_to_(self, checkpoint)
        inner(self, checkpoint)

    with _PATCHING:
        is_own = HOOK in vars(cls)
        setattr(cls, HOOK, on_load_checkpoint)
        try:
            yield
        finally:
            setattr(cls, HOOK, inner) if is_own else delattr(cls, HOOK)


class ReplaysRecord:
    """A mixin for LightningModules whose pruned checkpoints `Class.load_from_checkpoint` is to load by itself.

    So do `trainer.fit`, `validate`, `test` and `predict` with `ckpt_path`, also where no pruning callback is there.

    Example:
        >>> class LitModel(ReplaysRecord, LightningModule): ...  # doctest: +SKIP
        >>> LitModel.load_from_checkpoint("pruned.ckpt")  # doctest: +SKIP
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the module as small as the checkpoint's, before its weights are loaded."""
        assert isinstance(self, nn.Module)
        with shrunk_to(self, checkpoint):
            super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
