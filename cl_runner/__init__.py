"""Continual-learning experiments on pretrained backbones, configured by Hydra."""

import os
from pathlib import Path

# PyTorch reads this once, at its first product on a GPU, and a later run may have to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"  # as installed, or in a checkout
