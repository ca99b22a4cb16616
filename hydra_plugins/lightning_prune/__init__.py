"""Found by Hydra in every application: makes `pruning=...` available there. Imports no torch."""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from lightning_prune.config import register

register()


class LightningPruneSearchPath(SearchPathPlugin):
    """Puts the folder that holds `pruning/` on the search path: in a wheel or in a checkout."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder."""
        spec = find_spec("lightning_prune")
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        installed = package / "conf"
        folder = installed if installed.is_dir() else package.parent / "conf"
        search_path.append(provider="lightning_prune", path=f"file://{folder.as_posix()}")
