"""Whether more or less of a metric is better, by the words of its name; where these do not tell, one has to say."""

from __future__ import annotations

import re

from lightning_prune.core.checks import check_choice

MODES = ("max", "min")
OF_LESS = """
    loss perplexity ppl error errors err mse rmse mae mape smape msle nll wer cer eer bpc bpb bpd fid kid lpips entropy
    crossentropy bce ce l1 l2 kl divergence distance brier logloss hinge regret nonzeros params bytes macs flops latency
    ms seconds time memory cost
"""
OF_MORE = """
    acc accuracy auc auroc auprc ap map f1 fbeta precision recall dice iou miou jaccard bleu rouge meteor psnr ssim r2
    score top1 top5 kappa mcc matthews ndcg mrr hit hits correlation corrcoef pearson spearman snr sdr reward return
    likelihood specificity similarity explained quality dcg corr
"""
LESS, MORE = frozenset(OF_LESS.split()), frozenset(OF_MORE.split())
ENDINGS = ("perplexity", "accuracy", "error", "loss", "acc")
DECORATION = re.compile(r"/dataloader_idx_\d+$|_(step|epoch)$")
PARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words_of(metric: str) -> list[str]:
    """Return the words of a metric's name, without what Lightning adds to it.

    Example:
        >>> words_of("val/MeanSquaredError_epoch"), words_of("val_acc@1/dataloader_idx_0"), words_of("mIoU")
        (['val', 'mean', 'squared', 'error'], ['val', 'acc', '1'], ['miou'])
    """
    while (plain := DECORATION.sub("", metric)) != metric:
        metric = plain
    found: list[str] = []
    for piece in re.split(r"[^A-Za-z0-9]+", metric):
        known = piece.lower() in LESS | MORE
        found += [piece.lower()] if known else [part.lower() for part in PARTS.split(piece) if part]
    return found


def direction(metric: str) -> str | None:
    """Return "min" or "max", what is better of a metric by the last word of its name that is known, or None.

    Example:
        >>> [direction(name) for name in ("val_mse", "val/loss/dataloader_idx_1", "test/acc", "dice_loss", "elegance")]
        ['min', 'min', 'max', 'min', None]
    """
    words = words_of(metric)
    for word in reversed(words):
        for name in (word, word.rstrip("0123456789")):
            if name in LESS or name in MORE:
                return "min" if name in LESS else "max"
    ending = next((e for word in reversed(words) for e in ENDINGS if word.endswith(e)), None)
    return None if ending is None else "min" if ending in LESS else "max"


def checked_mode(metric: str, mode: str | None, name: str = "mode") -> str:
    """Return "min" or "max", as it is given or as the metric's name says.

    Args:
        metric: its name.
        mode: "min", "max" or None.
        name: of the setting, for errors.

    Raises:
        ValueError: something else, or None where the name does not tell.

    Example:
        >>> checked_mode("val/rmse", None), checked_mode("elegance", "max")
        ('min', 'max')
    """
    if mode is not None:
        return check_choice(name, mode, MODES)
    found = direction(metric)
    if found is None:
        raise ValueError(
            f"`{name}` is 'min' or 'max', what is better of {metric!r}, whose name does not tell, but got None."
        )
    return found
