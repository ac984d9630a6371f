"""Launchers and sweepers, which Hydra discovers in the namespace `hydra_plugins` only."""
