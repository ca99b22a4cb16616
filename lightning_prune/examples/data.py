"""Data modules: digits (embedded in scikit-learn), MNIST, Fashion-MNIST and tiny-shakespeare (from a folder).

All of it is small and kept in memory; batches are slices of tensors. The order of training examples depends on `seed`
and the epoch alone, so a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_prune.core.checks import check_count
from lightning_prune.examples.files import load_idx_or_npz, read_text
from lightning_prune.examples.loading import Batch, Pairs, ResumableLoader, Windows, as_sliced
from lightning_prune.examples.settings import Loading

if TYPE_CHECKING:
    from collections.abc import Mapping

SPLIT_SEED = 0  # which digits are for what; it never changes, so that runs can be compared


class InMemory(L.LightningDataModule):
    """Base of the data modules: three data sets and their loaders.

    Args:
        batch_size: at least 1, on each process.
        num_workers: processes that slice; 0 is fastest for data in memory.
        pin_memory: whether batches are put into pinned memory, for training on a GPU.
        seed: order of the training examples, at least 0.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(self, batch_size: int, num_workers: int, pin_memory: bool, seed: int) -> None:
        super().__init__()
        self.loading = Loading(batch_size, num_workers, pin_memory, seed)
        self.sets: dict[str, Dataset[Batch]] = {}
        self._train_loader: ResumableLoader | None = None
        self._resumed: dict[str, int] = {}

    def load(self) -> Mapping[str, Dataset[Batch]]:
        """Return the data sets "train", "val" and "test"; "val" may be missing."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        if not self.sets:
            self.sets = dict(self.load())

    def train_dataloader(self) -> ResumableLoader:
        num_processes = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        sampler: DistributedSampler[Batch] = DistributedSampler(
            self.sets["train"], num_replicas=num_processes, rank=rank, shuffle=True, seed=self.loading.seed
        )
        self._train_loader = self._loader("train", self.loading.batch_size, sampler)
        if self._resumed and self._is_fitting:
            self._train_loader.load_state_dict(self._resumed)
            self._resumed = {}
        return self._train_loader

    @property
    def _is_fitting(self) -> bool:
        """Whether the batches are trained on; a checkpoint that is calibrated on gives all of them."""
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def state_dict(self) -> dict[str, int]:
        """Return how far the training loader is.

        Lightning saves that too, but restores it too late where something asks for the length of the run before
        training starts, as a learning rate schedule does.
        """
        return self._train_loader.state_dict() if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there, with the next training loader."""
        self._resumed = state_dict

    def val_dataloader(self) -> list[ResumableLoader]:
        return [self._loader("val", 4 * self.loading.batch_size)] if "val" in self.sets else []

    def test_dataloader(self) -> ResumableLoader:
        return self._loader("test", 4 * self.loading.batch_size)

    def _loader(
        self, name: str, batch_size: int, sampler: DistributedSampler[Batch] | None = None
    ) -> ResumableLoader:
        return ResumableLoader(
            self.sets[name],
            batch_size,
            sampler=sampler,
            num_workers=self.loading.num_workers,
            pin_memory=self.loading.pin_memory,
            persistent_workers=self.loading.num_workers > 0,
            collate_fn=as_sliced,
        )


class Digits(InMemory):
    """1,797 handwritten digits of 8 x 8 pixels, real ones (UCI), which come with scikit-learn: nothing is downloaded.

    1,257 are for training, 180 for validation and 360 for the test; which, is fixed. Pixels are in [0, 1].

    Example:
        >>> digits = Digits(batch_size=32)
        >>> digits.setup("fit")
        >>> next(iter(digits.train_dataloader()))[0].shape
        torch.Size([32, 1, 8, 8])
    """

    def __init__(
        self, batch_size: int = 32, num_workers: int = 0, pin_memory: bool = False, seed: int = 0
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed)

    def load(self) -> dict[str, Dataset[Batch]]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "Digits come with scikit-learn: pip install 'lightning-prune[examples]'."
            ) from error
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        x = torch.from_numpy(images).float().view(-1, 1, 8, 8)[order] / 16
        y = torch.from_numpy(labels).long()[order]
        parts = {"train": slice(0, 1257), "val": slice(1257, 1437), "test": slice(1437, None)}
        return {name: Pairs(x[part], y[part]) for name, part in parts.items()}


class MNIST(InMemory):
    """MNIST, 60,000 handwritten digits of 28 x 28 pixels for training and 10,000 for the test (LeCun et al. 1998).

    Args:
        root: where the files lie: `mnist.npz`, or the published IDX files as they are or in `MNIST/raw`.
        batch_size: at least 1, on each process.
        num_val: how many of the training images, the last ones, are set aside for validation, in [0, 60000).
        num_workers: processes that slice; 0 is fastest for data in memory.
        pin_memory: whether batches are put into pinned memory, for training on a GPU.
        seed: order of the training examples, at least 0.

    Raises:
        ValueError: a value out of its range, or (when the data is set up) files that are not there.
    """

    folder, archive = "MNIST", "mnist.npz"
    mean, std = 0.1307, 0.3081

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 128,
        num_val: int = 5000,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed)
        self.root, self.num_val = root, check_count("num_val", num_val, minimum=0)

    def load(self) -> dict[str, Dataset[Batch]]:
        arrays = load_idx_or_npz(self.root, self.folder, self.archive)
        x_train, x_test = self._normalized(arrays["x_train"]), self._normalized(arrays["x_test"])
        y_train, y_test = arrays["y_train"].long(), arrays["y_test"].long()
        num_train = len(y_train) - self.num_val
        if num_train < 1:
            raise ValueError(
                f"`num_val` is below the {len(y_train)} training images, but got {self.num_val}."
            )
        sets: dict[str, Dataset[Batch]] = {
            "train": Pairs(x_train[:num_train], y_train[:num_train]),
            "test": Pairs(x_test, y_test),
        }
        return {**sets, "val": Pairs(x_train[num_train:], y_train[num_train:])} if self.num_val else sets

    def _normalized(self, images: Tensor) -> Tensor:
        """Scale (N, 28, 28) bytes to (N, 1, 28, 28) with mean 0 and standard deviation 1 over the training set."""
        return images.float().div_(255).sub_(self.mean).div_(self.std).unsqueeze(1)


class FashionMNIST(MNIST):
    """Fashion-MNIST, ten kinds of clothes in the format of MNIST (Xiao et al. 2017, arXiv:1708.07747)."""

    folder, archive = "FashionMNIST", "fashion_mnist.npz"
    mean, std = 0.2860, 0.3530


class Text(InMemory):
    """Stretches of a text, each token to be told from those before it.

    Args:
        root: folder that holds the files.
        batch_size: stretches in a batch, at least 1, on each process.
        block_size: tokens in a stretch, at least 1.
        num_workers: processes that slice; 0 is fastest for data in memory.
        pin_memory: whether batches are put into pinned memory, for training on a GPU.
        seed: order of the stretches, at least 0.

    Raises:
        ValueError: a value out of its range, or (when the data is set up) a file that is not there.
    """

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 32,
        block_size: int = 128,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed)
        self.root, self.block_size = root, check_count("block_size", block_size, minimum=1)

    def load(self) -> dict[str, Dataset[Batch]]:
        return {name: Windows(tokens, self.block_size) for name, tokens in self.parts().items()}

    def parts(self) -> dict[str, Tensor]:
        """Return the tokens, uint8, that are trained, validated and tested on."""
        raise NotImplementedError


class TinyShakespeare(Text):
    """A million characters of Shakespeare, by characters (Karpathy 2015): 90 % to train, 5 % to validate, 5 % to test.

    It takes what `Text` takes; `root` holds `tinyshakespeare.txt`.
    """

    file = "tinyshakespeare.txt"
    characters = ""

    def parts(self) -> dict[str, Tensor]:
        text = read_text(self.root, self.file)
        self.characters = "".join(sorted(set(text)))
        index = {character: i for i, character in enumerate(self.characters)}
        tokens = torch.tensor([index[character] for character in text], dtype=torch.uint8)
        train, val = int(0.9 * len(tokens)), int(0.95 * len(tokens))
        return {"train": tokens[:train], "val": tokens[train:val], "test": tokens[val:]}


class WikiText2(Text):
    """Articles of Wikipedia (Merity et al. 2016, arXiv:1609.07843), by bytes of UTF-8: 256 tokens.

    It takes what `Text` takes; `root` holds `wikitext2/train.txt`, `valid.txt` and `test.txt`. Without `train.txt`, the
    first 90 % of `valid.txt` are trained on, and the rest is validated on.
    """

    folder = "wikitext2"

    def parts(self) -> dict[str, Tensor]:
        valid, test = (self._bytes(f"{name}.txt") for name in ("valid", "test"))
        if (Path(self.root).expanduser() / self.folder / "train.txt").is_file():
            return {"train": self._bytes("train.txt"), "val": valid, "test": test}
        rank_zero_info(f"`root` has no {self.folder}/train.txt: the first 90 % of valid.txt are trained on.")
        end = int(0.9 * len(valid))
        return {"train": valid[:end], "val": valid[end:], "test": test}

    def _bytes(self, file: str) -> Tensor:
        text = read_text(self.root, f"{self.folder}/{file}")
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
