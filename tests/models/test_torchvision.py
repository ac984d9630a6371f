from pathlib import Path

import pytest
import torch
from torchvision import models

from cl_runner.errors import ConfigError
from cl_runner.models import TorchVision
from cl_runner.models.torchvision import AUXILIARY, take_apart
from tests.models.samples import GRAY, images, stream_of

FAMILIES = ["densenet121", "efficientnet_b0", "googlenet", "mobilenet_v3_small", "regnet_x_400mf", "swin_t"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder where torchvision finds weights that it would otherwise download; returns a function to add them."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def put(name: str, weights: str) -> dict:
        url = models.get_model_weights(name)[weights].url
        options = {"init_weights": False} if name in AUXILIARY else {}
        state = models.get_model(name, **options).state_dict()
        torch.save(state, tmp_path / "checkpoints" / Path(url).name)
        return state

    return put


@pytest.mark.parametrize("name", FAMILIES)
def test_a_net_taken_apart_says_what_the_whole_said(name):
    family = name.partition("_")[0]
    options = {"init_weights": False, "aux_logits": False} if family in AUXILIARY else {}
    whole = models.get_model(name, **options).eval()
    inputs = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        said = whole(inputs)
        net = take_apart(whole, AUXILIARY.get(family, ()))
        torch.testing.assert_close(net.head(net.backbone(inputs)), said)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
def test_odd_ones_give_flat_features_in_train_mode(name):
    model = TorchVision(name=name, pretrained=False).build(stream_of()).train()
    assert model(images()).features.dim() == 2


@pytest.mark.parametrize(("pretrained", "weights"), [(True, "DEFAULT"), ("IMAGENET1K_V1", "IMAGENET1K_V1")])
def test_published_weights_bring_their_head_mean_std_and_size(hub, pretrained, weights):
    state = hub("shufflenet_v2_x0_5", weights)
    recipe = TorchVision(name="shufflenet_v2_x0_5", pretrained=pretrained)
    recipe.check()
    model = recipe.build(stream_of(GRAY, mean=(0.9,), std=(0.9,))).eval()
    assert recipe.has_pretrained_head
    assert torch.equal(model.pretrained_head.weight, state["fc.weight"])
    assert torch.equal(model.backbone.conv1[0].weight, state["conv1.0.weight"])
    inputs = model(images(GRAY)).inputs
    assert inputs.shape == (4, 3, 224, 224)
    black = model.preprocess(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(black, -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))


def test_googlenets_weights_see_the_pixels_that_torchvision_would_show_them(hub):
    hub("googlenet", "DEFAULT")
    model = TorchVision(name="googlenet").build(stream_of()).eval()
    whole = models.googlenet(weights="DEFAULT").eval()
    raw = images((3, 224, 224), count=1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (raw / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        said = model.pretrained_head(model(raw).features)
        torch.testing.assert_close(said, whole(normalised), atol=1e-4, rtol=1e-3)


def test_a_net_whose_classifier_is_no_linear_layer_has_no_pretrained_head():
    assert not TorchVision(name="squeezenet1_1").has_pretrained_head


def test_a_file_of_torchvisions_is_normalised_as_torchvision_does(tmp_path):
    torch.save(models.shufflenet_v2_x0_5().state_dict(), tmp_path / "w.pth")
    recipe = TorchVision(name="shufflenet_v2_x0_5", pretrained=str(tmp_path / "w.pth"))
    recipe.check()
    model = recipe.build(stream_of(mean=(0.1,) * 3, std=(0.1,) * 3))
    assert model.preprocess.size == (224, 224)
    torch.testing.assert_close(model.preprocess.shift.flatten()[0], torch.tensor(-0.485 / 0.229))


def test_a_transformer_is_built_for_the_images_size():
    model = TorchVision(name="vit_b_32", pretrained=False, image_size=64).build(stream_of())
    assert model(images()).features.shape == (4, 768)


def test_a_transformers_weights_are_for_one_size():
    with pytest.raises(ConfigError, match=r"model\.image_size: expected \(224, 224\) or null for vit_b_16's weights"):
        TorchVision(name="vit_b_16", image_size=64).check()


def test_an_unknown_name_is_refused_with_names_that_are_near():
    with pytest.raises(ConfigError, match=r"model\.name: expected .* such as .*resnet18.*; got 'resnet_18'"):
        TorchVision(name="resnet_18").check()


def test_unknown_weights_are_refused_with_what_exists():
    message = r"model\.pretrained: expected one of IMAGENET1K_V1, IMAGENET1K_V2 .*, got 'IMAGENET1K_V3'"
    with pytest.raises(ConfigError, match=message):
        TorchVision(name="resnet50", pretrained="IMAGENET1K_V3").check()


def test_weights_without_a_usable_classifier_are_not_offered():
    with pytest.raises(ConfigError, match=r"expected one of IMAGENET1K_V1 \(torchvision's weights for vgg16\)"):
        TorchVision(name="vgg16", pretrained="IMAGENET1K_FEATURES").check()


@pytest.mark.parametrize("name", ["fcn_resnet50", "raft_large", "quantized_resnet18"])
def test_nets_for_other_tasks_are_refused(name):
    with pytest.raises(ConfigError, match=r"model\.name: expected a torchvision classifier"):
        TorchVision(name=name, pretrained=False).check()
