import json

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from cl_runner.errors import ConfigError
from cl_runner.models import CNN
from cl_runner.models.weights import Inputs, read, write
from tests.models.samples import stream_of


def recipe(pretrained=False, **settings) -> CNN:
    return CNN(widths=[4, 6], pretrained=pretrained if isinstance(pretrained, bool) else str(pretrained), **settings)


@pytest.fixture
def state():
    return recipe(seed=9).build(stream_of()).plain_state()


def backbone_of(state):
    return {name: value for name, value in state.items() if not name.startswith("head")}


def loaded(path, **settings):
    made = recipe(path, **settings)
    made.check()
    return made.build(stream_of())


def agrees(model, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("wrap", [(), ("state",), ("state_dict",), ("model",), ("model", "state_dict")])
def test_a_pytorch_file_is_read_however_it_is_wrapped(state, tmp_path, suffix, wrap):
    content = state
    for key in reversed(wrap):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / f"weights{suffix}")
    assert agrees(loaded(tmp_path / f"weights{suffix}"), state)


def test_a_safetensors_file_is_read(state, tmp_path):
    save_file(state, tmp_path / "weights.safetensors")
    assert agrees(loaded(tmp_path / "weights.safetensors"), state)


def test_half_precision_weights_are_read_as_floats(state, tmp_path):
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "w.pt")
    model = loaded(tmp_path / "w.pt")
    assert model.backbone.conv1.weight.dtype is torch.float32
    assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"].half().float())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_names_and_shapes_are_known_without_the_numbers(state, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    outline = read(path, None, "meta").state
    assert {name: value.shape for name, value in outline.items()} == {n: value.shape for n, value in state.items()}
    assert {value.device.type for value in outline.values()} == {"meta"}


def test_a_head_in_the_file_becomes_the_pretrained_head(state, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    model = loaded(tmp_path / "w.pt")
    assert recipe(tmp_path / "w.pt").has_pretrained_head
    assert torch.equal(model.pretrained_head.weight, state["head.weight"])
    assert torch.equal(model.pretrained_head.bias, state["head.bias"])


def test_a_head_without_a_bias_is_one_too(state, tmp_path):
    del state["head.bias"]
    torch.save(state, tmp_path / "w.pt")
    assert loaded(tmp_path / "w.pt").pretrained_head.bias is None


def test_a_file_without_a_head_leaves_the_model_without_a_pretrained_one(state, tmp_path):
    torch.save(backbone_of(state), tmp_path / "w.pt")
    assert not recipe(tmp_path / "w.pt").has_pretrained_head
    assert loaded(tmp_path / "w.pt").pretrained_head is None


def test_a_head_for_other_features_is_refused(state, tmp_path):
    torch.save({**state, "head.weight": torch.zeros(3, 7), "head.bias": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"features \[B, 7\]"):
        loaded(tmp_path / "w.pt")


def test_a_key_map_renames_in_order_and_leaves_out_what_becomes_empty(state, tmp_path):
    foreign = {f"module.{name}".replace("conv", "layer_"): value for name, value in state.items()}
    torch.save({**foreign, "module.queue": torch.zeros(3)}, tmp_path / "w.pt")
    key_map = {r"^module\.": "", r"layer_(\d)": r"conv\1", r"^queue$": ""}
    assert agrees(loaded(tmp_path / "w.pt", key_map=key_map), state)
    assert recipe(tmp_path / "w.pt", key_map=key_map).has_pretrained_head


def test_a_key_map_that_merges_keys_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"model\.key_map: .* got 'conv\.weight' twice"):
        loaded(tmp_path / "w.pt", key_map={r"conv\d": "conv"})


@pytest.mark.parametrize("key_map", [{"(": ""}, {"a": r"\1"}])
def test_a_key_map_that_is_no_regular_expression_is_refused(key_map):
    with pytest.raises(ConfigError, match=r"model\.key_map: expected regular expressions"):
        recipe("w.pt", key_map=key_map)


def test_a_key_map_without_a_file_is_refused():
    with pytest.raises(ConfigError, match=r"model\.key_map: expected null without a file"):
        recipe(False, key_map={"a": "b"})


def test_missing_and_unexpected_names_are_counted_and_listed_before_the_build(state, tmp_path):
    wrong = {name.replace("conv1", "first").replace("bn", "norm"): value for name, value in state.items()}
    torch.save(wrong, tmp_path / "w.pt")
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path / "w.pt").check()
    message = str(caught.value)
    assert message.startswith("model.pretrained: ")
    assert "\n" not in message
    assert "9 missing (conv1.weight, bn1.weight, bn1.bias, …)" in message
    assert "11 unexpected (first.weight, norm1.weight, norm1.bias, …)" in message


def test_wrong_shapes_are_listed_with_both(state, tmp_path):
    torch.save({**state, "conv2.weight": torch.zeros(6, 5, 3, 3)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"1 wrong shape \(conv2\.weight \[6, 5, 3, 3\] for \[6, 4, 3, 3\]\)"):
        recipe(tmp_path / "w.pt").build(stream_of())


def test_files_older_than_the_counter_of_batches_still_load(state, tmp_path):
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, tmp_path / "w.pt")
    assert torch.equal(loaded(tmp_path / "w.pt").backbone.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors", "some/folder"])
def test_a_file_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=rf"model\.pretrained: expected .*, got '{name}', which is not there"):
        recipe(name).check()


def test_a_folder_is_said_to_be_one(tmp_path):
    with pytest.raises(ConfigError, match=r"got the folder .*; a run's is model\.safetensors"):
        read(tmp_path, None)


@pytest.mark.parametrize("content", ["", "x: [1]\n", "root:x:0:0:root:/root:/bin/sh\n"])
def test_a_file_of_something_else_is_said_to_be_none_in_one_line(content, tmp_path):
    (tmp_path / "w.pt").write_text(content)
    with pytest.raises(ConfigError, match=r"w\.pt' \(it holds something else, or is damaged\)$"):
        read(tmp_path / "w.pt", None)


class Sneaky:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("content", [Sneaky(), {"a": Sneaky()}, [torch.zeros(1)], {"a": 1}])
def test_a_file_that_holds_anything_but_tensors_is_refused(content, tmp_path, capsys):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="holds tensors only"):
        recipe(tmp_path / "w.pt").check()
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_refused(suffix, tmp_path):
    (tmp_path / f"w{suffix}").write_bytes(b"not weights at all")
    with pytest.raises(ConfigError, match=r"model\.pretrained: expected a safetensors file"):
        recipe(tmp_path / f"w{suffix}").check()


def test_what_weights_expect_survives_a_files_header():
    inputs = Inputs(3, (32, 48), (0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    assert Inputs.of(json.loads(json.dumps(inputs.metadata()))) == inputs


def test_a_header_from_elsewhere_says_nothing():
    assert Inputs.of({"format": "pt"}) is None


def test_a_file_of_weights_is_the_same_for_the_same_contents(tmp_path):
    state = {"layer.weight": torch.randn(3, 5), "bias": torch.arange(3)}
    metadata = {key: f"é {key}" for key in "hgfedcba"}
    write(tmp_path / "one", state, metadata)
    write(tmp_path / "other", state, dict(reversed(metadata.items())))
    content = (tmp_path / "one").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    assert list(json.loads(content[8:start])["__metadata__"]) == sorted(metadata)
    loaded = safetensors.torch.load(content)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert content == (tmp_path / "other").read_bytes()
