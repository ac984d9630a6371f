"""Continual-learning experiments on pretrained backbones, configured by Hydra."""

__version__ = "0.1.0"
