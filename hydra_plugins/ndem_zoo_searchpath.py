"""Tells Hydra where the configurations of `ndem_zoo.schnetpack` are, so that ``spktrain experiment=ndem_md17`` works.

Hydra imports every module of the namespace package `hydra_plugins`, which therefore has no ``__init__.py``; this one imports
Hydra only.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class NDeMZooSearchPath(SearchPathPlugin):
    """Appends our configurations, behind those of the application."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra once, when it starts."""
        search_path.append(provider="ndem_zoo", path="pkg://ndem_zoo.schnetpack.configs")
