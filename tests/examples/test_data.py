from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_prune.examples.data import MNIST, Digits, FashionMNIST, TinyShakespeare, WikiText2
from lightning_prune.examples.files import IDX_FILES, read_idx


def small_mnist(num_train: int = 30, num_test: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (num_train, 28, 28), dtype=np.uint8),
        "y_train": rng.integers(0, 10, num_train, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (num_test, 28, 28), dtype=np.uint8),
        "y_test": rng.integers(0, 10, num_test, dtype=np.uint8),
    }


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = header + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_dataset(root: Path, form: str) -> None:
    arrays = small_mnist()
    if form == "npz":
        np.savez(root / "mnist.npz", **arrays)
        return
    folder = root / "MNIST" / "raw" if form.startswith("torchvision") else root
    for name, file in IDX_FILES.items():
        write_idx(folder / (file + (".gz" if form.endswith("gz") else "")), arrays[name])


def test_digits_have_three_parts_that_share_no_image():
    digits = Digits()
    digits.setup("fit")
    inputs = {name: part.inputs for name, part in digits.sets.items()}
    assert {name: len(part) for name, part in inputs.items()} == {"train": 1257, "val": 180, "test": 360}
    images = torch.cat(list(inputs.values()))
    assert len(images.flatten(1).unique(dim=0)) == 1797
    assert images.min() == 0 and images.max() == 1


def test_each_class_is_in_each_part_of_the_digits():
    digits = Digits()
    digits.setup("fit")
    for part in digits.sets.values():
        assert part.targets.bincount(minlength=10).min() >= 10


@pytest.mark.parametrize("form", ["npz", "torchvision", "torchvision gz", "flat", "flat gz"])
def test_mnist_is_read_in_every_form_it_comes_in(tmp_path, form):
    write_dataset(tmp_path, form)
    expected = small_mnist()
    mnist = MNIST(tmp_path, num_val=5)
    mnist.setup("fit")
    assert {name: len(part) for name, part in mnist.sets.items()} == {"train": 25, "test": 10, "val": 5}
    pixels = (mnist.sets["val"].inputs * mnist.std + mnist.mean) * 255
    np.testing.assert_allclose(pixels.squeeze(1).numpy(), expected["x_train"][25:], atol=1e-3)
    np.testing.assert_array_equal(mnist.sets["test"].targets.numpy(), expected["y_test"])


def test_without_validation_images_there_is_no_validation(tmp_path):
    write_dataset(tmp_path, "npz")
    mnist = MNIST(tmp_path, num_val=0)
    mnist.setup("fit")
    assert len(mnist.sets["train"]) == 30
    assert mnist.val_dataloader() == []


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (MNIST, ["mnist.npz", "train-images-idx3-ubyte", "MNIST/raw"]),
        (FashionMNIST, ["fashion_mnist.npz", "t10k-labels-idx1-ubyte", "FashionMNIST/raw"]),
        (TinyShakespeare, ["tinyshakespeare.txt"]),
        (WikiText2, ["wikitext2/valid.txt"]),
    ],
)
def test_a_missing_file_is_named_and_so_is_what_lies_there(tmp_path, module, names):
    (tmp_path / "something.else").touch()
    with pytest.raises(ValueError, match="`root` is a folder with .* which holds something.else") as caught:
        module(tmp_path).setup("fit")
    assert all(name in str(caught.value) for name in names)
    with pytest.raises(ValueError, match="which is not there"):
        module(tmp_path / "missing").setup("fit")


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    write_idx(tmp_path / "cut", np.zeros((3, 2, 2), dtype=np.uint8))
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"whole files, but got .*cut with 11 values for shape \[3, 2, 2\]"):
        read_idx(tmp_path / "cut")
    (tmp_path / "text").write_text("<html>")
    with pytest.raises(ValueError, match="IDX files of bytes, but got .*text that begins with"):
        read_idx(tmp_path / "text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is a whole number of at least 1, but got 0"),
        ({"num_workers": -1}, "`num_workers` is a whole number of at least 0, but got -1"),
        ({"seed": 0.5}, "`seed` is a whole number of at least 0, but got 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_too_many_validation_images_are_refused(tmp_path):
    write_dataset(tmp_path, "npz")
    with pytest.raises(ValueError, match="`num_val` is below the 30 training images, but got 30"):
        MNIST(tmp_path, num_val=30).setup("fit")


def test_shakespeare_is_split_without_overlap_and_shifted_by_one(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "tinyshakespeare.txt").write_text(text)
    data = TinyShakespeare(tmp_path, batch_size=4, block_size=10)
    data.setup("fit")
    assert data.characters == "abcdefghijklmnopqrstuvwxyz"
    assert {name: len(part) for name, part in data.sets.items()} == {"train": 89, "val": 4, "test": 4}
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (4, 10)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal((inputs + 1) % 26, targets)


@pytest.mark.parametrize("has_train", [True, False])
def test_wikitext_is_read_by_bytes_whether_its_train_part_is_there_or_not(tmp_path, has_train):
    (tmp_path / "wikitext2").mkdir()
    texts = {"train": "é" * 300, "valid": "ab" * 200, "test": "z" * 101}
    for name, text in texts.items():
        if name != "train" or has_train:
            (tmp_path / "wikitext2" / f"{name}.txt").write_text(text, encoding="utf-8")
    data = WikiText2(tmp_path, batch_size=4, block_size=10)
    data.setup("fit")
    parts = {
        name: "".join(map(chr, tokens.tolist())).encode("latin-1") for name, tokens in data.parts().items()
    }
    bytes_of = {name: text.encode() for name, text in texts.items()}
    train, val = (bytes_of["train"], bytes_of["valid"]) if has_train else (b"ab" * 180, b"ab" * 20)
    assert parts == {"train": train, "val": val, "test": bytes_of["test"]}
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == (4, 10) and torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.data
@pytest.mark.parametrize("module", [MNIST, FashionMNIST])
def test_the_published_images_are_normalized(data_root, module):
    data = module(data_root, num_val=0)
    data.setup("fit")
    assert len(data.sets["train"]) == 60000 and len(data.sets["test"]) == 10000
    assert abs(float(data.sets["train"].inputs.mean())) < 1e-3
    assert abs(float(data.sets["train"].inputs.std()) - 1) < 1e-3


@pytest.mark.data
def test_the_published_text_has_65_characters(data_root):
    data = TinyShakespeare(data_root)
    data.setup("fit")
    assert len(data.characters) == 65
    assert len(data.sets["train"]) == (1003854 - 1) // 128
