"""Models: preprocess -> backbone -> head, and the architectures to build them from."""

from cl_runner.models.architecture import Architecture
from cl_runner.models.cnn import CNN
from cl_runner.models.conv5 import Conv5
from cl_runner.models.efficientnet import EfficientNetLite0
from cl_runner.models.mlp import MLP
from cl_runner.models.resnet import ResNet18
from cl_runner.models.timm import Timm
from cl_runner.models.torchvision import TorchVision

__all__ = ["CNN", "MLP", "Architecture", "Conv5", "EfficientNetLite0", "ResNet18", "Timm", "TorchVision"]
