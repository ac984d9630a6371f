import pytest
import torch
from torchvision.models import resnet18

from cl_runner.errors import ConfigError
from cl_runner.models import ResNet18
from tests.models.samples import images, saved, stream_of


def backbone(**settings):
    return ResNet18(channels_last=False, **settings).build(stream_of()).backbone.eval()


def test_with_the_imagenet_stem_it_is_torchvisions_resnet18():
    theirs = resnet18().eval()
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc")}
    theirs.fc = torch.nn.Identity()
    ours = backbone(stem="imagenet")
    ours.load_state_dict(state)
    inputs = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(inputs), theirs(inputs))


def test_torchvisions_weights_fit_with_their_head(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    recipe = ResNet18(stem="imagenet", pretrained=str(tmp_path / "resnet18.pth"))
    recipe.check()
    assert recipe.build(stream_of()).pretrained_head.out_features == 1000


def test_the_head_goes_by_torchvisions_name():
    state = ResNet18(width=4).build(stream_of()).plain_state()
    assert {"fc.weight", "fc.bias"} <= set(state)


def test_the_cifar_stem_keeps_the_images_size_until_the_second_stage():
    net = backbone(width=20)
    maps, sizes = torch.zeros(1, 3, 32, 32), {}
    for name, module in net.named_children():
        maps = module(maps)
        if name.startswith(("conv", "layer")):
            sizes[name] = tuple(maps.shape[1:])
    assert sizes == {
        "conv1": (20, 32, 32),
        "layer1": (20, 32, 32),
        "layer2": (40, 16, 16),
        "layer3": (80, 8, 8),
        "layer4": (160, 4, 4),
    }


def test_strides_can_be_set():
    net = backbone(width=4, strides=[2, 1, 1, 1])
    assert [net.get_submodule(f"layer{i}")[0].conv1.stride[0] for i in (1, 2, 3, 4)] == [2, 1, 1, 1]


def test_without_the_last_relu_features_may_be_negative_and_nothing_else_changes():
    with_relu, without = backbone(width=4), backbone(width=4, last_relu=False)
    inputs = torch.randn(8, 3, 32, 32)
    assert (with_relu(inputs) >= 0).all()
    assert (without(inputs) < 0).any()
    before = without.layer4(without.layer3(without.layer2(without.layer1(torch.ones(1, 4, 8, 8)))))
    after = with_relu.layer4(with_relu.layer3(with_relu.layer2(with_relu.layer1(torch.ones(1, 4, 8, 8)))))
    torch.testing.assert_close(before.relu(), after)


@pytest.mark.parametrize(("width", "parameters"), [(64, 11_168_832), (20, 1_093_140)])
def test_sizes_are_those_of_the_literature(width, parameters):
    assert sum(parameter.numel() for parameter in backbone(width=width).parameters()) == parameters


def test_a_file_made_at_another_width_is_refused(tmp_path):
    file = saved(ResNet18(width=4).build(stream_of()), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"wrong shape \(conv1\.weight \[4, 3, 3, 3\] for \[8, 3, 3, 3\]"):
        ResNet18(width=8, pretrained=file).build(stream_of())


def test_images_pass_through_in_train_mode():
    assert ResNet18(width=4).build(stream_of())(images()).features.shape == (4, 32)
