"""An example that does not fit its data is told so, with the setting to change."""

import pytest

from lightning_prune.cli.rehearsal import rehearse
from lightning_prune.examples.data import WikiText2
from lightning_prune.examples.tasks import LanguageModel


@pytest.fixture
def data(tmp_path):
    (tmp_path / "wikitext2").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "wikitext2" / f"{name}.txt").write_text("wxyz" * 40, encoding="utf-8")
    return WikiText2(tmp_path, block_size=16)


@pytest.mark.parametrize("vocab_size", [65, ord("z")])
def test_a_vocabulary_that_lacks_tokens_is_named(data, vocab_size):
    model = LanguageModel("GPT", vocab_size=vocab_size, block_size=16, num_layers=1, num_heads=1, width=8)
    with pytest.raises(
        ValueError, match=f"`model.vocab_size` is above each token, 122 here, but got {vocab_size}."
    ):
        rehearse(model, data)


def test_one_that_has_them_is_not(data):
    model = LanguageModel("GPT", vocab_size=ord("z") + 1, block_size=16, num_layers=1, num_heads=1, width=8)
    assert "train/loss" in rehearse(model, data)
