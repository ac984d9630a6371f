"""Small vision transformers to try prompts and adapters on."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cl_runner.models.model import Model
from cl_runner.models.preprocess import Preprocess
from cl_runner.streams.base import Stream
from tests.toys import SHAPE

SIZE, DEPTH = 32, 3


def toy_vit(seed: int = 0, **settings) -> VisionTransformer:
    """A small transformer, its weights large enough for features to differ between images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"img_size": SHAPE[1:], "patch_size": 2, "in_chans": SHAPE[0], "num_classes": 0}
        vit = VisionTransformer(**{**shape, "embed_dim": SIZE, "depth": DEPTH, "num_heads": 2, **settings})
        for layer in vit.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, gain=2.0)
        return vit


def toy_vit_model(stream: Stream, *, seed: int = 0, **settings) -> Model:
    return Model(Preprocess(1), toy_vit(seed), SIZE, stream, seed=seed, **settings)
