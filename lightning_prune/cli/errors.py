"""How an application is run, and what is said of settings that are no good."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException

from lightning_prune.cli.answers import answer

FULL_ERROR = "HYDRA_FULL_ERROR"
OURS = ("joblib", "submitit_local", "submitit_slurm", "optuna")


class SettingsError(CompactHydraException, ValueError):
    """Settings that are no good, found before anything is run; Hydra shows the message without a traceback."""


def run(main: Callable[[], object]) -> None:
    """Call a Hydra application, and answer a misspelt setting with its neighbours.

    Args:
        main: decorated with `hydra.main`.
    """
    _let_the_folder_decide()
    if FULL_ERROR in os.environ:
        main()
        return
    os.environ[FULL_ERROR] = "1"  # Hydra raises what it would print
    try:
        main()
    except Exception as error:
        if (said := answer(error)) is None:
            raise
        sys.stderr.write(f"{said}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    finally:
        del os.environ[FULL_ERROR]


def _let_the_folder_decide() -> None:
    """Let `conf/hydra` say what joblib, submitit and optuna mean here, not the plugins of the same names.

    Hydra would take the plugins' settings as the schema of ours.
    """
    Plugins.instance()  # they have registered theirs when it is there
    for group in ("launcher", "sweeper"):
        registered = ConfigStore.instance().repo.get("hydra", {}).get(group, {})
        for name in OURS:
            registered.pop(f"{name}.yaml", None)
