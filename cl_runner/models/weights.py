"""Files of weights: their contents, the images they expect, and whether they fit a network."""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cl_runner.errors import ConfigError
from cl_runner.folder import replacing
from cl_runner.streams.base import Shape

FIELD = "model.pretrained"
WRAPPERS = ("state_dict", "state", "model", "model_state_dict", "model_state")
SHOWN = 3  # names of each kind listed in an error, at most; more are counted


@dataclass(frozen=True)
class Inputs:
    """The images that a backbone expects; None: as the stream has them."""

    channels: int | None = None
    size: tuple[int, int] | None = None  # H, W in pixels
    mean: tuple[float, ...] | None = None  # per channel, of images in [0, 1]
    std: tuple[float, ...] | None = None

    @property
    def shape(self) -> Shape:
        if self.channels is None or self.size is None:
            raise ValueError(f"the stream has to settle {self} first")
        return (self.channels, *self.size)

    def metadata(self) -> dict[str, str]:
        """As strings, for the header of a safetensors file."""
        return {key: json.dumps(value) for key, value in vars(self).items() if value is not None}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "Inputs | None":
        """From the header of a finished run's weights; None for other files."""
        if not metadata.keys() >= {"channels", "size", "mean", "std"}:
            return None
        height, width = json.loads(metadata["size"])
        mean, std = tuple(json.loads(metadata["mean"])), tuple(json.loads(metadata["std"]))
        return cls(json.loads(metadata["channels"]), (height, width), mean, std)


@dataclass(frozen=True)
class Net:
    """A network split into the backbone and its own classifier, if that is one linear layer."""

    backbone: nn.Module  # [B, C, H, W] float -> [B, D]
    head: nn.Linear | None = None  # [B, D] -> its own outputs
    classifiers: tuple[str, ...] = ("head",)  # names of the classifier and any auxiliary ones in files of weights
    optional: str | None = None  # prefix of a part that is freshly initialised if a file lacks all of it

    def own_share(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` without classifiers."""
        prefixes = tuple(f"{name}." for name in self.classifiers)
        own = self.backbone.state_dict().keys()
        return {key: value for key, value in state.items() if key in own or not key.startswith(prefixes)}

    def starts_fresh(self, state: Mapping[str, Tensor]) -> bool:
        """Whether `state` lacks the optional part."""
        return self.optional is not None and not any(key.startswith(self.optional) for key in state)

    def head_of(self, state: Mapping[str, Tensor]) -> nn.Linear | None:
        """The classifier in `state`; None unless there is exactly one, which is linear and takes these features."""
        found = [name for name in self.classifiers if f"{name}.weight" in state]
        if len(found) != 1 or state[f"{found[0]}.weight"].dim() != 2 or self.starts_fresh(state):
            return None
        weight, bias = state[f"{found[0]}.weight"], state.get(f"{found[0]}.bias")
        outputs, features = weight.shape
        head = nn.Linear(features, outputs, bias=bias is not None, device=weight.device)
        head.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        return head


@dataclass(frozen=True)
class WeightsFile:
    path: Path
    state: dict[str, Tensor]
    inputs: Inputs | None  # None: unknown


def read(path: Path, key_map: Mapping[str, str] | None, device: Literal["cpu", "meta"] = "cpu") -> WeightsFile:
    """The tensors of a safetensors file, or of a PyTorch file that holds tensors only.

    `key_map`: regular expressions and their replacements, applied to every key in order; a key that becomes empty is
    dropped. On "meta", only names and shapes are read. Raises ConfigError.
    """
    if path.is_dir():
        raise ConfigError(
            FIELD, f"expected a file of weights, got the folder {str(path)!r}; a run's is model.safetensors"
        )
    if not path.is_file():
        raise ConfigError(FIELD, f"expected a file of weights, got {str(path)!r}, which is not there")
    try:
        state, metadata = _safetensors(path, device) if path.suffix == ".safetensors" else (_pickled(path, device), {})
        inputs = Inputs.of(metadata)
    except Exception as error:  # PyTorch raises anything on a damaged file
        expected = "a safetensors file, or a PyTorch one that holds tensors only"
        own = isinstance(error, (safetensors.SafetensorError, ValueError)) and str(error).partition("\n")[0]
        reason = own or "it holds something else, or is damaged"  # PyTorch would advise to allow code
        raise ConfigError(FIELD, f"expected {expected}, got {str(path)!r} ({reason})") from error
    return WeightsFile(path, _renamed(state, key_map or {}), inputs)


def compare(net: Net, file: WeightsFile, shapes: bool) -> None:
    """Check that the file's names, and its `shapes`, are the backbone's.

    Raises ConfigError that lists what differs.
    """
    expected, given = net.backbone.state_dict(), net.own_share(file.state)
    skipped = net.optional if net.optional and net.starts_fresh(file.state) else None
    wanted = [key for key in expected if skipped is None or not key.startswith(skipped)]
    # PyTorch itself allows this counter to be absent, as it is in older files.
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in expected]
    wrong = [
        f"{key} {list(given[key].shape)} for {list(expected[key].shape)}"
        for key in wanted
        if shapes and key in given and given[key].shape != expected[key].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    if found:
        advice = "; model.key_map renames keys" if missing or unexpected else ""
        raise ConfigError(FIELD, f"{str(file.path)!r} does not fit: {', '.join(found)}{advice}")


def load(net: Net, file: WeightsFile) -> Net:
    """The net with the file's weights and, if the file has one, its classifier.

    Raises ConfigError if they do not fit.
    """
    compare(net, file, shapes=True)
    net.backbone.load_state_dict({**net.backbone.state_dict(), **net.own_share(file.state)})
    return Net(net.backbone, net.head_of(file.state), net.classifiers, net.optional)


def nearest(name: str, names: Collection[str]) -> str:
    """A few known names similar to `name`, for error messages."""
    return ", ".join(get_close_matches(name, names, n=5, cutoff=0.4) or sorted(names)[:5])


def matching(names: Collection[str], patterns: Iterable[str], field: str, what: str) -> set[str]:
    """The names that some pattern matches; `what`: the names, as an error calls them.

    Raises ConfigError for a pattern that matches none, with similar names.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            expected = f"expected patterns of {what}, such as {nearest(pattern, names)}"
            raise ConfigError(field, f"{expected}, got {pattern!r}")
        found |= matched
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _safetensors(path: Path, device: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        if device == "meta":
            state = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in list(file.keys())}
        else:
            state = {key: file.get_tensor(key) for key in list(file.keys())}
        return state, file.metadata() or {}


def _pickled(path: Path, device: str) -> dict[str, Tensor]:
    content = torch.load(path, map_location=device, weights_only=True)
    while isinstance(content, dict) and (wrapped := [key for key in WRAPPERS if isinstance(content.get(key), dict)]):
        content = content[wrapped[0]]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("no tensors by name in it")
    return content


def _renamed(state: dict[str, Tensor], key_map: Mapping[str, str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        new = key
        for pattern, replacement in key_map.items():
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ConfigError("model.key_map", f"expected a name of its own for every key, got {new!r} twice")
        if new:
            renamed[new] = value
    return renamed


def write(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, the same for the same contents: the library puts the metadata in a random order.

    Raises CannotWriteError, and then leaves the file as it was.
    """
    content = safetensors.torch.save(state, metadata)
    start = 8 + int.from_bytes(content[:8], "little")  # of the tensors, after the header and its length
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(math.ceil(len(text) / 8) * 8)  # tensors are aligned
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(content)[start:])
