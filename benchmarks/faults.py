"""What becomes of runs that are killed, of disks that are full, and of damaged files: `python -m benchmarks.faults`.

A small network with something for every recipe of `conf/pruning` trains for some steps and saves a checkpoint after
each, over the last one. Each trial is a process of its own, forked from this one:

- killed: ended by SIGKILL after a random time, and resumed from what is on disk;
- killed in a write: ended by SIGKILL at a random write to a checkpoint, and resumed;
- disk full: no file may grow beyond a random size; what is on disk is whole, and the run is resumed with room;
- cut off, flipped bits: its checkpoint is damaged, and it is resumed from that.

Whatever is resumed has to end as the run without interruption, tensor for tensor, or be refused with a clear error
before its first step. A trial that does neither is printed with its seed. What was logged, and the state of the random
generator, count where a step was left to be made: Lightning does nothing of that kind any more where none was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.blocks import Block, Ledger, parser
from benchmarks.record import facts, table
from lightning_prune import AtomicCheckpointIO
from lightning_prune.callbacks import files
from lightning_prune.model import prices
from lightning_prune.model.calls import Call
from lightning_prune.model.whole import check_whole
from tests.callbacks.test_every_recipe_resumes import RECIPES, Module, build, everything
from tests.callbacks.toy import data, trainer

LAST = "last.ckpt"
DIGEST = "digest.json"
Outcome = str


def fit(recipe: str, folder: Path, seed: int = 7, during: Callable[[], None] = lambda: None) -> None:
    """Train, from the checkpoint in the folder if there is one, and write down what it has come to."""
    saving = ModelCheckpoint(
        folder, "last", every_n_train_steps=1, save_on_train_epoch_end=False, enable_version_counter=False
    )
    prices.latency_ratio = by_size
    callback = build(recipe)
    fitted = trainer(callback, saving, max_epochs=2, plugins=[AtomicCheckpointIO()])
    torch.manual_seed(0)
    module = Module()
    torch.manual_seed(seed)
    path = folder / LAST if (folder / LAST).exists() else None
    during()
    fitted.fit(module, data(shuffle=True), data(), ckpt_path=path, weights_only=True)
    found = everything(fitted, module, callback)
    digests = {name: digest(leaf) for name, leaf in found.items() if not is_metric_of_level(name)}
    (folder / DIGEST).write_text(json.dumps(digests))


def by_size(dense: Call, small: Call, precision: float) -> float:
    """Stands in for a clock, on which no two runs agree: a model takes as long as it has parameters."""
    sizes = [sum(p.numel() for p in call.module.parameters()) for call in (small, dense)]
    return sizes[0] / sizes[1]


def is_metric_of_level(name: str) -> bool:
    """Whether a leaf is a metric that was noted where a level ended: lost with a run that is killed right there."""
    return "'levels'" in name and "'level')" not in name and "'sparsity')" not in name


def is_result(name: str) -> bool:
    """Whether a leaf is what training has come to, rather than what it draws and logs on the way."""
    return "'metrics'" not in name and "'random'" not in name


def digest(leaf: Any) -> str:
    content = leaf.contiguous().view(-1).numpy().tobytes() if torch.is_tensor(leaf) else repr(leaf).encode()
    return hashlib.sha256(content).hexdigest()


def forked(run: Callable[[], None], error_to: Path) -> int:
    """Run in a process of its own; returns its id. What it raises is written down."""
    if (pid := os.fork()) != 0:
        return pid
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run()
    except BaseException as error:
        frames = "".join(traceback.format_exception(error)[-2:])
        error_to.write_text(f"{type(error).__name__}: {error}\n{frames}")
        os._exit(1)
    os._exit(0)


def finished(pid: int) -> int:
    """Wait for a process; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Trial:
    """A recipe, a folder and a random generator.

    Args:
        recipe: of `conf/pruning`.
        seed: of everything that is drawn.
        whole: the digests of the run without interruption, and how long it took.
    """

    def __init__(self, recipe: str, seed: int, whole: tuple[dict[str, str], float]) -> None:
        self.recipe, self.draw = recipe, Random(seed)
        self.expected, self.seconds = whole
        self.folder = Path(tempfile.mkdtemp(prefix="lightning_prune_faults_"))
        self.said = self.folder / "said.txt"

    def run(self, kind: str) -> tuple[Outcome, str]:
        """Returns "as the whole", "refused" or "broken", and why."""
        try:
            return getattr(self, kind.replace(" ", "_"))()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def killed(self) -> tuple[Outcome, str]:
        pid = forked(lambda: fit(self.recipe, self.folder), self.said)
        time.sleep(self.draw.uniform(0.1, 1.0) * self.seconds)
        os.kill(pid, signal.SIGKILL)
        finished(pid)
        return self.resumed()

    def killed_in_a_write(self) -> tuple[Outcome, str]:
        left = self.draw.randrange(1, 3000)

        def write_and_die(witness: Any, content: Any) -> int:
            nonlocal left
            left -= 1
            if left == 0:
                witness.file.write(content[: len(content) // 2])
                witness.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return int(witness.file.write(content))

        def during() -> None:
            files._Witness.write = write_and_die  # type: ignore[method-assign]

        finished(forked(lambda: fit(self.recipe, self.folder, during=during), self.said))
        return self.resumed()

    def disk_full(self) -> tuple[Outcome, str]:
        size = self.draw.choice([self.draw.randrange(1_000, 60_000), self.draw.randrange(60_000, 400_000)])

        def during() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        code = finished(forked(lambda: fit(self.recipe, self.folder, during=during), self.said))
        if code not in (0, 1):
            return "broken", f"it ended with {code}"
        if code == 1 and "File too large" not in self.said.read_text():
            return "broken", self.said.read_text()
        return self.resumed()

    def cut_off(self) -> tuple[Outcome, str]:
        content = self.saved()
        (self.folder / LAST).write_bytes(content[: self.draw.randrange(len(content))])
        return self.resumed()

    def flipped_bits(self) -> tuple[Outcome, str]:
        content = bytearray(self.saved())
        for _ in range(self.draw.choice([1, 1, 3])):
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        (self.folder / LAST).write_bytes(content)
        return self.resumed()

    def saved(self) -> bytes:
        """Return a checkpoint of a run that ends in the middle."""
        num = self.draw.randrange(2, 16)

        def stop(*_: Any) -> None:
            nonlocal num
            num -= 1
            if num == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def during() -> None:
            register_optimizer_step_post_hook(stop)

        while not (self.folder / LAST).exists():
            finished(forked(lambda: fit(self.recipe, self.folder, during=during), self.said))
        return (self.folder / LAST).read_bytes()

    def resumed(self) -> tuple[Outcome, str]:
        """Resume from what is there, and compare."""
        steps = self.folder / "steps"
        place = self.folder / LAST

        def during() -> None:
            register_optimizer_step_post_hook(lambda *_: steps.touch())

        (self.folder / DIGEST).unlink(missing_ok=True)
        self.said.unlink(missing_ok=True)
        seed = (
            8 if place.exists() else 7
        )  # a run that goes on has its own random state; one that starts, the seed's
        code = finished(forked(lambda: fit(self.recipe, self.folder, seed, during), self.said))
        if code == 1:
            said = self.said.read_text()
            is_clear = said.startswith("ValueError: `") and not steps.exists() and not is_whole(place)
            return ("refused" if is_clear else "broken"), said
        if code != 0:
            return "broken", f"it ended with {code}"
        found, expected = json.loads((self.folder / DIGEST).read_text()), self.expected
        if not steps.exists():  # it was killed behind its last step: nothing is drawn or logged any more
            found, expected = ({n: v for n, v in d.items() if is_result(n)} for d in (found, expected))
        other = [name for name, value in expected.items() if found.get(name) != value]
        same = not other and found.keys() == expected.keys()
        return ("as the whole", "") if same else ("broken", f"{len(other)} leaves differ: {other[:3]}")


def is_whole(path: Path) -> bool:
    try:
        check_whole(path)
    except (ValueError, FileNotFoundError):
        return False
    return True


TRIALS = {"killed": 3, "killed in a write": 2, "disk full": 1, "cut off": 1, "flipped bits": 1}
"""How many of each kind a recipe goes through."""
OUTCOMES = ("as the whole", "refused", "broken")


def whole_run(recipe: str) -> tuple[dict[str, str], float]:
    folder = Path(tempfile.mkdtemp(prefix="lightning_prune_faults_"))
    start = time.monotonic()
    code = finished(forked(lambda: fit(recipe, folder), folder / "said.txt"))
    seconds = time.monotonic() - start
    if code:
        raise SystemExit(f"{recipe} does not run: {(folder / 'said.txt').read_text()}")
    digests = json.loads((folder / DIGEST).read_text())
    shutil.rmtree(folder)
    return digests, seconds


def trials(recipe: str) -> Block:
    """Return what came of all trials of a recipe."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        fit(recipe, Path(folder))  # so that what is read and imported when it is needed is there in all forks
    whole = whole_run(recipe)
    counts: dict[str, Counter[Outcome]] = {kind: Counter() for kind in TRIALS}
    broken = []
    for kind, number in TRIALS.items():
        for seed in range(100 * RECIPES.index(recipe), 100 * RECIPES.index(recipe) + number):
            outcome, said = Trial(recipe, seed, whole).run(kind)
            counts[kind][outcome] += 1
            if outcome == "broken":
                broken.append({"recipe": recipe, "kind": kind, "seed": seed, "said": said})
    return {**counts, "failed": broken}


def summary(ledger: Ledger) -> str:
    """Return a table by kind, and one by recipe: how many trials ended as the whole run, or were refused."""
    kinds = {kind: ledger.counts(kind) for kind in TRIALS}
    everything = sum(kinds.values(), Counter())
    rows = [
        {"fault": kind, "trials": str(count.total())} | {o: str(count[o]) for o in OUTCOMES}
        for kind, count in (kinds | {"all": everything}).items()
    ]
    by_recipe = [
        {"recipe": f"`{recipe}`"} | {kind: cell(Counter(block[kind])) for kind in TRIALS}
        for recipe, block in ledger.blocks.items()
    ]
    seconds = sum(block["cpu_s"] for block in ledger.blocks.values())
    return f"{table(rows)}\n\n{seconds:.0f} CPU s\n\n{table(by_recipe)}"


def cell(count: Counter[Outcome]) -> str:
    """Return how many of the trials ended as the whole run, and how many were refused or broken.

    >>> cell(Counter({"as the whole": 4, "refused": 2}))
    '4 of 6, 2 refused'
    """
    others = [f"{count[outcome]} {outcome}" for outcome in OUTCOMES[1:] if count[outcome]]
    return ", ".join([f"{count[OUTCOMES[0]]} of {count.total()}", *others])


def main() -> None:
    options = parser("faults", __doc__)
    options.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    found = options.parse_args()
    ledger = Ledger(found.out, facts(0))
    ledger.run(found.recipes, trials, found)
    print(summary(ledger))


if __name__ == "__main__":
    main()
