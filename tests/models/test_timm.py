import pytest
import timm
import torch

from cl_runner.errors import ConfigError
from cl_runner.models import Timm
from cl_runner.models.timm import take_apart
from tests.models.samples import images, saved, stream_of

FAMILIES = ["resnet", "vit", "efficientnet", "byobnet", "convnext", "nfnet", "mambaout"]  # timm has a tiny one of each
MANY_HEADS = ["deit_tiny_distilled_patch16_224", "efficientformer_l1"]
NO_LINEAR_HEAD = ["resnetv2_18", "eva02_tiny_patch14_224"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_net_taken_apart_says_what_the_whole_said(family):
    whole = timm.create_model(f"test_{family}").eval()
    inputs = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        said = whole(inputs)
        net = take_apart(whole, whole.pretrained_cfg["classifier"])
        torch.testing.assert_close(net.head(net.backbone(inputs)), said)


@pytest.mark.parametrize("name", [*MANY_HEADS, *NO_LINEAR_HEAD])
def test_a_net_without_one_linear_classifier_has_no_pretrained_head(name):
    assert not Timm(name=name).has_pretrained_head
    model = Timm(name=name, pretrained=False, image_size=224).build(stream_of())
    assert model(images(count=2)).features.dim() == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder where timm finds weights that it would otherwise download from their own URL."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("pretrained", [True, "in1k"])
def test_published_weights_bring_their_head_mean_std_and_size(hub, pretrained):
    whole = timm.create_model("legacy_seresnet18")
    torch.save(whole.state_dict(), hub / whole.pretrained_cfg["url"].rpartition("/")[2])
    recipe = Timm(name="legacy_seresnet18", pretrained=pretrained)
    recipe.check()
    model = recipe.build(stream_of((1, 28, 28), mean=(0.9,), std=(0.9,))).eval()
    assert recipe.has_pretrained_head
    assert torch.equal(model.pretrained_head.weight, whole.last_linear.weight)
    assert torch.equal(model.backbone.layer0[0].weight, whole.layer0[0].weight)
    assert model(images((1, 28, 28))).inputs.shape == (4, 3, 224, 224)
    black = model.preprocess(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(black, -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))


def test_a_file_from_timm_is_normalised_as_the_names_weights_are(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pt")
    recipe = Timm(name="test_vit.r160_in1k", pretrained=str(tmp_path / "w.pt"))
    recipe.check()
    assert recipe.has_pretrained_head
    model = recipe.build(stream_of(mean=(0.1,) * 3, std=(0.1,) * 3))
    assert model.preprocess.size == (160, 160)
    torch.testing.assert_close(model.preprocess.shift.flatten(), torch.full((3,), -1.0))


def test_a_file_for_a_net_of_several_classifiers_loads_without_a_head(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pt")
    recipe = Timm(name=name, pretrained=str(tmp_path / "w.pt"))
    recipe.check()
    assert not recipe.has_pretrained_head
    assert recipe.build(stream_of()).pretrained_head is None


def test_a_transformer_is_built_for_the_images_size():
    model = Timm(name="test_vit", pretrained=False).build(stream_of((3, 64, 64)))
    assert model.backbone.patch_embed.img_size == (64, 64)


def test_a_transformers_file_at_another_size_is_refused_with_the_shapes(tmp_path):
    file = saved(Timm(name="test_vit", pretrained=False).build(stream_of((3, 64, 64))), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"model\.pretrained: .*1 wrong shape \(pos_embed "):
        Timm(name="test_vit", pretrained=file, image_size=32).build(stream_of())


def test_a_size_that_the_net_cannot_take_is_refused():
    with pytest.raises(ConfigError, match=r"model\.image_size: expected a size that timm/"):
        Timm(name="efficientformer_l1", pretrained=False, image_size=64).build(stream_of())


def test_a_fresh_net_takes_the_streams_channels():
    model = Timm(name="test_resnet", pretrained=False).build(stream_of((1, 32, 32)))
    assert model(images((1, 32, 32))).inputs.shape == (4, 1, 32, 32)


def test_an_unknown_name_is_refused_with_names_that_are_near():
    with pytest.raises(ConfigError, match=r"model\.name: expected .* such as .*resnet18.*; got 'resnet_18'"):
        Timm(name="resnet_18").check()


def test_an_unknown_tag_is_refused_with_what_exists():
    with pytest.raises(ConfigError, match=r"model\.pretrained: expected one of .*a1_in1k.*, got 'in99k'"):
        Timm(name="resnet18", pretrained="in99k").check()
    with pytest.raises(ConfigError, match=r"model\.name: expected one of .*a1_in1k.*, got 'resnet18\.in99k'"):
        Timm(name="resnet18.in99k").check()


def test_a_net_without_published_weights_is_refused_with_nets_that_have_some():
    name = next(name for name in timm.list_models() if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(ConfigError, match=rf"model\.pretrained: .*timm has no weights for {name}, but for \w+"):
        Timm(name=name).check()


def test_a_tag_may_stand_in_the_name_or_in_pretrained():
    Timm(name="resnet18.tv_in1k").check()
    Timm(name="resnet18.a1_in1k", pretrained="tv_in1k").check()
    assert Timm(name="resnet18.a1_in1k", pretrained="tv_in1k").full_name == "resnet18.tv_in1k"


def test_a_fresh_net_by_a_tagged_name_passes_the_check():
    Timm(name="test_vit.r160_in1k", pretrained=False).check()
