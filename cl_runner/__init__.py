"""Continual-learning experiments on pretrained backbones, configured by Hydra."""

from pathlib import Path

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"  # as installed, or in a checkout
