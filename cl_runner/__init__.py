"""Continual-learning experiments on pretrained backbones, configured by Hydra."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

# PyTorch reads this once, at its first product on a GPU, and a later run may have to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"  # as installed, or in a checkout

# For scripts. Imported when they are asked for: the command line must not wait for PyTorch.
_PUBLIC = {"compose_jobs": "compose", "check": "config", "carry_out": "job", "load": "learned"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
