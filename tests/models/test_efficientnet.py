import pytest
import torch
from sklearn.datasets import load_sample_image

from cl_runner.errors import ConfigError
from cl_runner.models import EfficientNetLite0
from tests.models.samples import GRAY, images, stream_of

PALACE, DAISY = 698, 985  # ImageNet's numbers


@pytest.fixture(scope="module")
def pretrained():
    return EfficientNetLite0().build(stream_of()).eval()


@pytest.mark.parametrize(("file", "label"), [("china.jpg", PALACE), ("flower.jpg", DAISY)])
def test_the_pretrained_net_says_what_is_in_a_photograph(pretrained, file, label):
    photograph = torch.tensor(load_sample_image(file)).permute(2, 0, 1)[None, :, :, 107:533]  # its middle square
    with torch.no_grad():
        assert pretrained.pretrained_head(pretrained(photograph).features).argmax() == label


def test_images_come_as_the_weights_were_made_at(pretrained):
    inputs = pretrained(images()).inputs
    assert inputs.shape == (4, 3, 224, 224)
    torch.testing.assert_close(pretrained.preprocess.shift.flatten(), torch.full((3,), -1.0))
    torch.testing.assert_close(pretrained.preprocess.scale.flatten(), torch.full((3,), 2 / 255))


def test_the_streams_own_mean_gives_way_to_the_weights():
    model = EfficientNetLite0(image_size=32).build(stream_of(mean=(0.1,) * 3, std=(0.1,) * 3))
    torch.testing.assert_close(model.eval()(images()).inputs, images() / 127.5 - 1)


def test_gray_images_and_another_size_are_taken():
    model = EfficientNetLite0(image_size=48).build(stream_of(GRAY))
    assert model(images(GRAY)).inputs.shape == (4, 3, 48, 48)


def test_the_pretrained_head_is_kept_beside_the_new_one(pretrained):
    assert EfficientNetLite0().has_pretrained_head
    assert pretrained.pretrained_head.out_features == 1000
    assert pretrained.head.out_features == 6


def test_a_fresh_net_has_no_pretrained_head_and_takes_the_streams_channels():
    recipe = EfficientNetLite0(pretrained=False)
    assert not recipe.has_pretrained_head
    assert recipe.build(stream_of((1, 32, 32))).backbone.conv_stem.in_channels == 1


def test_the_head_goes_by_timms_name(pretrained):
    assert {"classifier.weight", "classifier.bias"} <= set(pretrained.plain_state())


def test_other_names_of_weights_are_refused():
    with pytest.raises(ConfigError, match=r"expected true \(ImageNet\), false or a file, got 'imagenet'"):
        EfficientNetLite0(pretrained="imagenet").check()


def test_stages_can_be_frozen_by_timms_names():
    recipe = EfficientNetLite0(freeze=["conv_stem.*", "bn1.*", "blocks.[0-2].*"], image_size=32)
    recipe.check()
    model = recipe.build(stream_of())
    first = next(name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad)
    assert first == "blocks.3.0.conv_pw.weight"
