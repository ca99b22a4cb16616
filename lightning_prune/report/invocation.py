"""How a run was started, for reports: its command line and configuration, as far as others may see them."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN = "***"
SECRET = re.compile(
    r"(^|[_.-])((api|access|private)[_-]?keys?|secrets?|passw(or)?ds?|pwd|passphrase|credentials?|auth)($|[_.-])"
    r"|(^|[_.-])token$",
    re.IGNORECASE,
)
"""Names of settings whose values are nobody's business: `wandb.api_key`, but not `num_tokens`."""
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
"""User and password in an address such as https://me:secret@host/path."""
INNER_NAME = re.compile(r"([\w.-]+)['\"]?\s*:")
PLAIN = re.compile(r"[\w./@+-]+", re.ASCII)


CKPT_PATH = "ckpt_path"


@dataclass(frozen=True)
class Invocation:
    """A command line of the form `python script.py name=value ...`, and what was composed of it.

    Args:
        words: the program and the script.
        overrides: the settings given on the command line, `name=value`.
        config: the composed configuration as text, without secrets.
        resumes: name of the setting that a checkpoint's path goes to; None where there is none.
    """

    words: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    config: str | None = None
    resumes: str | None = CKPT_PATH

    @property
    def command(self) -> str:
        """The command line as a shell takes it, with secrets hidden.

        Example:
            >>> Invocation(("python", "train.py"), ("pruning=erk", "logger.api_key=42")).command
            "python train.py pruning=erk 'logger.api_key=***'"
        """
        return shlex.join([*self.words, *map(redacted_setting, self.overrides)])

    def resumed(self, path: str) -> str | None:
        """Return the command line that goes on from a checkpoint; None where no setting takes one.

        Example:
            >>> print(Invocation(("python", "train.py"), ("seed=1", "ckpt_path=old.ckpt")).resumed("epoch=3.ckpt"))
            python train.py seed=1 'ckpt_path='"'"'epoch=3.ckpt'"'"''
        """
        if self.resumes is None:
            return None
        kept = [o for o in self.overrides if o.lstrip("+~").partition("=")[0] != self.resumes]
        value = path if PLAIN.fullmatch(path) else "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"
        return shlex.join([*self.words, *map(redacted_setting, kept), f"{self.resumes}={value}"])


_current: ContextVar[Invocation | None] = ContextVar("invocation", default=None)


@contextmanager
def invoked(invocation: Invocation) -> Iterator[None]:
    """Let reports that are written meanwhile know how the run was started."""
    token = _current.set(invocation)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Invocation | None:
    """Return how this run was started: as was said, or as Hydra has noted of any application of its own."""
    return _current.get() or _of_hydra()


def _of_hydra() -> Invocation | None:
    """Read what Hydra leaves in a run's folder, where an application runs that is not one of ours."""
    known = sys.modules.get("hydra.core.hydra_config")
    if known is None or not known.HydraConfig.initialized():
        return None
    hydra, omega = known.HydraConfig.get(), sys.modules["omegaconf"].OmegaConf
    file = Path(hydra.runtime.output_dir or "") / (hydra.output_subdir or "") / "config.yaml"
    if hydra.output_subdir is None or not file.is_file():
        return None
    config = omega.to_container(omega.load(file), resolve=False)
    resumes = CKPT_PATH if CKPT_PATH in config else None
    text = omega.to_yaml(omega.create(redacted(config)))
    return Invocation(("python", sys.argv[0]), tuple(hydra.overrides.task), text, resumes)


def redacted(value: Any, name: str = "") -> Any:
    """Return plain data, such as a configuration, with secrets hidden: by the names of settings, and in addresses.

    Interpolations stay as they are written, so that `${oc.env:KEY}` shows no value.

    Example:
        >>> redacted({"logger": {"api_key": "42", "url": "https://me:pw@host/x", "num_tokens": 7}})
        {'logger': {'api_key': '***', 'url': 'https://***@host/x', 'num_tokens': 7}}
    """
    if isinstance(value, Mapping):
        return {key: redacted(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(entry, name) for entry in value]
    if SECRET.search(name) and value is not None and not str(value).startswith("${"):
        return HIDDEN
    return IN_ADDRESS.sub(HIDDEN, value) if isinstance(value, str) else value


def redacted_setting(setting: str) -> str:
    """Return a `name=value` of a command line with its secret hidden; all of a value that holds one inside of braces.

    Example:
        >>> redacted_setting("logger={wandb: {api_key: 42}}"), redacted_setting("logger={csv: {name: 42}}")
        ('logger=***', 'logger={csv: {name: 42}}')
    """
    name, separator, value = setting.partition("=")
    names = [name, *INNER_NAME.findall(value)]
    if separator and not value.startswith("${") and any(map(SECRET.search, names)):
        return f"{name}={HIDDEN}"
    return f"{name}{separator}{IN_ADDRESS.sub(HIDDEN, value)}"
