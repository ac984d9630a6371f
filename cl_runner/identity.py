"""What identifies a run: the hash of what it computes, its folder, and its name."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

# How a run is executed and tracked, which does not change what it computes.
EXECUTION = ("device", "data_root", "output_root", "rerun", "tracker", "trainer.log_every", "trainer.checkpoint_every")
EXECUTION += ("trainer.checkpoint_seconds", "trainer.keep_checkpoint", "stream.download", "stream.max_device_gb")
NOT_HASHED = (*EXECUTION, "fisher", "memory")  # these two are hashed as parts of the strategy that takes them
ORDERED = (("strategy", "parts"), ("model", "key_map"))  # mappings whose order matters
PICKLES = (".pt", ".pth", ".bin", ".ckpt")  # files of weights, beside .safetensors
ANY_SEED = 2**31 - 1  # takes the seed's place in the hash of a group, whose runs differ in nothing else

# Classes whose choice in conf/ is not their name in lower case.
CHOICES = {
    "ClassBalanced": "class_balanced",
    "CODAPrompt": "coda_prompt",
    "EfficientNetLite0": "efficientnet_lite0",
    "ERACE": "er_ace",
}


def run_folder(config: dict[str, Any]) -> Path:
    """The folder of a validated configuration's run: the same for the same work."""
    return Path(config["output_root"]) / f"{label(config)}-s{config['seed']}-{digest(config)}"


def label(config: dict[str, Any]) -> str:
    """Strategy, stream and model, as the folder's readable prefix."""
    return "-".join(parts(config))


def parts(config: dict[str, Any]) -> tuple[str, str, str]:
    """Strategy, stream and model, e.g. ("ewc", "split_cifar100", "resnet18")."""
    strategy, stream, model = (display_name(key, config[key]) for key in ("strategy", "stream", "model"))
    return strategy, stream, model


def display_name(key: str, component: dict[str, Any]) -> str:
    """A component's `name`, or else the choice in conf/ of its class; a stream has both."""
    kind, name = choice(component["_target_"].rpartition(".")[2]), str(component.get("name") or "")
    if kind == "ewc" and component.get("accumulation") == "sum" and component.get("decay", 1.0) < 1:
        return "online_ewc"  # a method by name in the literature, though of the same class
    if key == "stream":
        return f"{kind}_{name}" if name else kind
    return name or kind


def choice(class_name: str) -> str:
    return CHOICES.get(class_name) or class_name.lower()


def digest(config: dict[str, Any]) -> str:
    """Eight hex digits of what a run computes."""
    plain = hashed_part(config)
    for parent, key in ORDERED:
        if isinstance(plain[parent].get(key), dict):
            plain[parent][key] = [*plain[parent][key].items()]
    weights = weights_file(plain["model"].get("pretrained"))
    if weights and weights.is_file():  # the file's content counts, not its path
        plain["model"]["pretrained"] = _file_digest(weights, weights.stat().st_mtime_ns)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def weights_file(pretrained: bool | str | None) -> Path | None:
    """The file that `model.pretrained` refers to; None for the name of published weights."""
    if not isinstance(pretrained, str):
        return None
    path = Path(pretrained).expanduser()
    return path if path.suffix in (".safetensors", *PICKLES) or "/" in pretrained else None


def hashed_part(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of the part of a configuration that changes the numbers; the configuration need not be complete."""
    plain = json.loads(json.dumps(config))
    for path in (*NOT_HASHED, "trainer.epochs" if plain.get("trainer", {}).get("iterations") else "trainer.iterations"):
        parent, _, key = path.rpartition(".")
        (plain.get(parent, {}) if parent else plain).pop(key, None)
    if plain.get("trainer", {}).get("eval_every") is None:  # it came later, and runs without it are the same as before
        plain.get("trainer", {}).pop("eval_every", None)
    return plain


@lru_cache
def _file_digest(path: Path, changed: int) -> str:
    """`changed`, the time of change, makes the cache miss when the file was replaced."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
