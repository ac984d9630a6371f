from dataclasses import replace

import pytest
import torch
from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.models import CNN, MLP, Conv5, EfficientNetLite0, ResNet18, TorchVision
from cl_runner.models.architecture import norm_layers
from cl_runner.models.weights import Net
from cl_runner.streams.base import Shape
from tests.models.samples import GRAY, RGB, every_architecture, images, saved, stream_of


def norms(model) -> list[nn.Module]:
    return norm_layers(model.backbone, None)


def statistics(model) -> list[torch.Tensor]:
    return [value.clone() for name, value in model.backbone.named_buffers() if "running" in name]


def same(one, other) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@every_architecture
def test_what_a_run_leaves_can_be_given_back(make, tmp_path):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    run = make(pretrained=False, seed=3).build(stream_of(mean=mean, std=std))
    run(images(count=8))  # moves the statistics of normalisation layers
    file = saved(run.eval(), tmp_path / "model.safetensors")
    recipe = make(pretrained=file)
    recipe.check()
    assert recipe.has_pretrained_head
    given_back = recipe.build(stream_of()).eval()
    raw = images()
    with torch.no_grad():
        expected, output = run(raw), given_back(raw)
        torch.testing.assert_close(output.inputs, expected.inputs)
        torch.testing.assert_close(given_back.pretrained_head(output.features), expected.logits)


@every_architecture
def test_a_seed_gives_the_same_model_and_the_global_generator_is_left_alone(make):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(pretrained=False, seed=5).build(stream_of())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = make(pretrained=False, seed=5).build(stream_of())
    assert same(list(first.state_dict().values()), list(second.state_dict().values()))


@every_architecture
def test_every_weight_learns_in_a_fresh_net_with_images_as_they_come(make):
    model = make(pretrained=False).build(stream_of())
    model.reveal(stream_of().tasks[0])
    output = model(images())
    assert output.inputs.shape == (4, *RGB)
    output.logits.square().sum().backward()
    gradients = [parameter.grad for parameter in model.backbone.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].any()  # timm starts branches that a skip goes round at zero
    assert not make(pretrained=False).has_pretrained_head
    assert model.pretrained_head is None


def test_another_seed_gives_other_weights():
    first, second = (MLP(widths=[4], seed=seed).build(stream_of(GRAY)) for seed in (0, 1))
    assert not torch.equal(first.backbone.linear1.weight, second.backbone.linear1.weight)


@pytest.mark.parametrize("init", ["torch", "xavier", "truncated_normal"])
def test_the_heads_rows_are_not_the_first_layers_numbers_over_again(init):
    model = MLP(widths=[784], init=init, head_init=init, seed=1).build(stream_of(GRAY))
    model.reveal(stream_of(GRAY).tasks[0])
    first, rows = model.backbone.linear1.weight.flatten(), model.head.weight[model.revealed].flatten()
    assert torch.corrcoef(torch.stack([rows, first[: len(rows)]]))[0, 1].abs() < 0.2


@pytest.mark.parametrize("recipe", [MLP(widths=[4]), CNN(widths=[4]), Conv5(), ResNet18(width=4)])
def test_a_fresh_net_takes_the_streams_channels(recipe):
    assert recipe.build(stream_of(GRAY))(images(GRAY)).inputs.shape == (4, *GRAY)


def test_a_fresh_net_uses_the_streams_mean_and_std():
    model = CNN(widths=[4]).build(stream_of(GRAY, mean=(0.25,), std=(0.5,)))
    torch.testing.assert_close(model.eval()(images(GRAY)).inputs, (images(GRAY) / 255 - 0.25) / 0.5)


def test_images_can_be_left_between_zero_and_one_whatever_the_weights_say(tmp_path):
    file = saved(
        CNN(widths=[4]).build(stream_of(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))), tmp_path / "it.safetensors"
    )
    model = CNN(widths=[4], pretrained=file, normalize=False).build(stream_of())
    torch.testing.assert_close(model.eval()(images()).inputs, images() / 255)


def test_image_size_overrides_the_streams():
    model = CNN(widths=[4], image_size=12).build(stream_of(GRAY))
    assert model(images(GRAY)).inputs.shape == (4, 1, 12, 12)


def test_weights_bring_their_own_mean_std_size_and_channels(tmp_path):
    run = CNN(widths=[4]).build(stream_of(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)))
    file = saved(run, tmp_path / "model.safetensors")
    model = CNN(widths=[4], pretrained=file).build(stream_of(GRAY, mean=(0.9,), std=(0.9,)))
    assert model(images(GRAY)).inputs.shape == (4, 3, 32, 32)
    raw = images()
    torch.testing.assert_close(model.preprocess(raw), run.preprocess(raw))


def test_image_size_overrides_the_weights_own(tmp_path):
    file = saved(CNN(widths=[4]).build(stream_of()), tmp_path / "model.safetensors")
    model = CNN(widths=[4], pretrained=file, image_size=16).build(stream_of())
    assert model(images()).inputs.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("recipe", [CNN(widths=[4]), Conv5(), ResNet18(width=4)])
def test_gray_images_are_repeated_for_weights_that_do_not_say_what_they_take(recipe, tmp_path):
    torch.save(recipe.build(stream_of()).plain_state(), tmp_path / "weights.pt")
    given = replace(recipe, pretrained=str(tmp_path / "weights.pt"))
    assert given.build(stream_of((1, 32, 32)))(images((1, 32, 32))).inputs.shape == (4, 3, 32, 32)


def test_colour_images_are_refused_where_the_weights_are_for_gray_ones(tmp_path):
    file = saved(CNN(widths=[4]).build(stream_of(GRAY)), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.pretrained: expected weights for 3-channel images, got 1-channel"):
        CNN(widths=[4], pretrained=file).build(stream_of())


def test_images_that_the_net_cannot_take_are_refused():
    with pytest.raises(ConfigError, match=r"model\.image_size: expected a size that torchvision/alexnet can take"):
        TorchVision(name="alexnet", pretrained=False).build(stream_of(GRAY))


def test_the_streams_augmentation_is_the_models():
    model = CNN(widths=[4]).build(stream_of(augment=("crop", "flip")))
    assert model.preprocess.augment == ("crop", "flip")
    assert model.preprocess.crop_padding == 2


def test_active_logits_and_the_heads_draw_reach_the_model():
    model = MLP(widths=[4], head_init="truncated_normal").build(stream_of(GRAY), active_logits="all")
    model.reveal(stream_of().tasks[0])
    assert model.visible.all()
    assert model.head.weight.abs().max() <= 0.04


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_changes_the_layout_and_not_the_outputs(channels_last):
    plain = ResNet18(width=16, channels_last=False).build(stream_of()).eval()
    model = ResNet18(width=16, channels_last=channels_last).build(stream_of()).eval()
    assert model.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    torch.testing.assert_close(model(images()).logits, plain(images()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [3, 4, 8, 12, 16, 20])
def test_gradients_are_those_of_the_plain_layout_also_of_narrow_nets(width):
    def gradients(channels_last: bool) -> dict[str, torch.Tensor]:
        model = ResNet18(width=width, channels_last=channels_last, norm_stats="frozen").build(stream_of())
        in_nhwc = model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert in_nhwc is (channels_last and width >= 16)  # on CPUs too whose gradients would be right
        model.reveal(stream_of().tasks[0])
        model(images()).logits.square().sum().backward()
        return {name: value.grad for name, value in model.backbone.named_parameters()}

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-4, rtol=1e-4)


def trained_a_step(recipe, shape=RGB):
    """The model, and its weights and statistics before a step of SGD."""
    model = recipe.build(stream_of(shape)).train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images(shape, 8)).logits.square().sum().backward()
    optimizer.step()
    return {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, before[name])}


def test_frozen_parts_keep_their_weights_and_their_statistics():
    moved = trained_a_step(ResNet18(width=4, freeze=["conv1.*", "bn1.*", "layer[12].*"]))
    everything = ResNet18(width=4).build(stream_of()).backbone.state_dict()
    assert moved == {name for name in everything if name.startswith(("layer3", "layer4"))}


def test_a_star_freezes_the_whole_backbone():
    assert trained_a_step(ResNet18(width=4, freeze=["*"])) == set()


@pytest.mark.parametrize("name", ["bn1.running_*", "bn1.running_mean", "bn1.running_var"])
def test_statistics_can_be_frozen_by_their_own_name(name):
    moved = trained_a_step(CNN(widths=[4, 4], freeze=[name]))
    assert {name for name in moved if "running" in name} == {"bn2.running_mean", "bn2.running_var"}
    assert "bn1.weight" in moved


def test_a_layer_that_is_frozen_in_part_still_adapts():
    moved = trained_a_step(CNN(widths=[4], freeze=["*.weight"]))
    assert moved == {"bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"}


@pytest.mark.parametrize(
    ("pretrained", "norm_stats", "adapts"),
    [
        (False, None, True),
        (False, "frozen", False),
        (False, "adapt", True),
        (True, None, False),
        (True, "frozen", False),
        (True, "adapt", True),
    ],
)
def test_statistics_adapt_in_fresh_nets_and_stay_in_pretrained_ones_unless_told(pretrained, norm_stats, adapts):
    recipe = EfficientNetLite0(pretrained=pretrained, norm_stats=norm_stats, image_size=32)
    model = recipe.build(stream_of()).train()
    before = statistics(model)
    model(images())
    assert same(statistics(model), before) is not adapts
    assert {norm.training for norm in norms(model)} == {adapts}


def test_a_frozen_part_keeps_its_statistics_where_the_rest_adapts():
    moved = trained_a_step(CNN(widths=[4, 4], freeze=["bn1.*"], norm_stats="adapt"))
    assert {name for name in moved if "running" in name} == {"bn2.running_mean", "bn2.running_var"}


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_are_near():
    with pytest.raises(ConfigError, match=r"model\.freeze: expected .* such as .*conv1\.weight.*, got 'conv_1\.\*'"):
        ResNet18(freeze=["conv_1.*"]).check()


def test_patterns_that_match_pass_the_check():
    ResNet18(freeze=["conv1.*", "layer[1-3].*"]).check()


@pytest.mark.parametrize("recipe", [MLP, CNN, Conv5, ResNet18, EfficientNetLite0])
def test_weights_that_nobody_published_are_refused_with_what_exists(recipe):
    with pytest.raises(ConfigError, match=r"model\.pretrained: expected .*false or a file.*, got 'imagenet21k'"):
        recipe(pretrained="imagenet21k").check()


def test_a_network_that_computes_as_it_is_built_is_left_for_the_build_to_try() -> None:
    class Computing(MLP):
        def network(self, shape: Shape, published: bool) -> Net:
            torch.linspace(0, 1, 3)[1].item()  # as stochastic depth rates often are
            return super().network(shape, published)

    Computing(widths=[4]).check()
    Computing(widths=[4]).check_images((1, 4, 4))
