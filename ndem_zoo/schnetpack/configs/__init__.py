"""Configuration files that `spktrain` finds through `hydra_plugins.ndem_zoo_searchpath`; no code."""
