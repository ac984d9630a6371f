import pytest
import torch
from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.models import Conv5
from tests.models.samples import images, stream_of


@pytest.fixture
def published(tmp_path):
    """A file as the authors publish theirs: wrapped in `state`, convolutions only."""
    shapes = [(16, 3), (32, 16), (64, 32), (128, 64), (256, 128)]
    state = {}
    for index, (out, channels) in enumerate(shapes, start=1):
        state[f"convLayer{index}.conv.weight"] = torch.randn(out, channels, 3, 3)
        state[f"convLayer{index}.conv.bias"] = torch.randn(out)
        if index < 5:
            for name in ("weight", "bias", "running_mean"):
                state[f"convLayer{index}.bn.{name}"] = torch.randn(out)
            state[f"convLayer{index}.bn.running_var"] = torch.rand(out) + 0.5
            state[f"convLayer{index}.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save({"state": state}, tmp_path / "conv5.pt")
    return str(tmp_path / "conv5.pt")


def test_it_gives_1024_features_of_a_small_image():
    backbone = Conv5().build(stream_of()).backbone
    convolutions = [layer.conv for layer in list(backbone)[:5]]
    assert [(layer.out_channels, layer.stride[0]) for layer in convolutions] == [
        (16, 1),
        (32, 2),
        (64, 2),
        (128, 2),
        (256, 2),
    ]
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 1024)


def test_the_last_convolution_has_neither_normalisation_nor_relu():
    backbone = Conv5().build(stream_of()).backbone
    assert [len(layer) for layer in list(backbone)[:5]] == [3, 3, 3, 3, 1]
    assert (backbone(torch.randn(2, 3, 32, 32)) < 0).any()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)])
def test_the_fully_connected_layers_fit_any_image(shape):
    assert Conv5(widths=[12, 7]).build(stream_of(shape))(images(shape)).features.shape == (4, 7)


def test_published_weights_load_by_their_own_names(published):
    recipe = Conv5(pretrained=published)
    recipe.check()
    model = recipe.build(stream_of())
    state = torch.load(published, weights_only=True)["state"]
    assert all(torch.equal(value, state[name]) for name, value in model.backbone.state_dict().items())
    assert not recipe.has_pretrained_head


def test_fully_connected_layers_start_fresh_on_published_convolutions(published):
    recipe = Conv5(pretrained=published, widths=[20, 10], freeze=["convLayer*"])
    recipe.check()
    model = recipe.build(stream_of())
    fresh = Conv5(widths=[20, 10]).build(stream_of())
    assert torch.equal(model.backbone.mlp.linear1.weight, fresh.backbone.mlp.linear1.weight)
    assert not torch.equal(model.backbone.convLayer1.conv.weight, fresh.backbone.convLayer1.conv.weight)
    trainable = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert trainable == {f"mlp.linear{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}


def test_a_head_for_the_convolutions_features_is_not_one_for_fresh_layers(tmp_path):
    torch.save(Conv5().build(stream_of()).plain_state(), tmp_path / "w.pt")
    recipe = Conv5(pretrained=str(tmp_path / "w.pt"), widths=[10])
    recipe.check()
    assert not recipe.has_pretrained_head
    assert recipe.build(stream_of()).pretrained_head is None


def test_fully_connected_layers_that_are_there_in_part_are_refused(tmp_path):
    state = Conv5(widths=[20, 10]).build(stream_of()).plain_state()
    torch.save({name: value for name, value in state.items() if "linear2" not in name}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"2 missing \(mlp\.linear2\.weight, mlp\.linear2\.bias\)"):
        Conv5(pretrained=str(tmp_path / "w.pt"), widths=[20, 10]).check()


def test_the_convolutions_are_held_to_the_file_strictly(tmp_path):
    state = Conv5().build(stream_of()).plain_state()
    del state["convLayer3.bn.running_var"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"1 missing \(convLayer3\.bn\.running_var\)"):
        Conv5(pretrained=str(tmp_path / "w.pt"), widths=[20]).check()


def test_layers_are_padded_strided_and_normalised_as_written_down():
    backbone = Conv5().build(stream_of()).backbone.eval()
    expected = torch.randn(2, 3, 32, 32)
    inputs = expected
    for index, layer in enumerate(list(backbone)[:5]):
        expected = nn.functional.conv2d(expected, layer.conv.weight, layer.conv.bias, 1 if index == 0 else 2, padding=1)
        if index < 4:
            expected = layer.bn(expected).relu()
    torch.testing.assert_close(backbone(inputs), expected.flatten(1))
