"""Compare the runner with a bare in-memory loop on the same work, on one thread.

    python benchmarks/stream.py [mlp] [resnet] [--rounds 3] [--peer PYTHON]

mlp: Permuted-MNIST-like images, MLP 784-256-256-10, batch 128, SGD. resnet: slim ResNet-18 (20 channels) on
CIFAR-like images, batch 32, SGD. Pixels are random: the work is the same, and nothing is downloaded. The runner is
`cl_runner.trainer.Trainer` as a run uses it, including the journal; the bare loop is what one would write by hand
(NCHW). Each round times both in turn; the ratio is that of the medians. `--peer` names a Python that has Avalanche
installed, and times its Naive strategy on the MLP work too (it needs no more than `pip install avalanche-lib` there).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cl_runner.models.mlp import MLP
from cl_runner.models.resnet import ResNet18
from cl_runner.schedulers import constant
from cl_runner.strategies import Finetune
from cl_runner.streams.base import Examples, Scenario, Shape, Stream, Task
from cl_runner.trackers.base import RunInfo
from cl_runner.trackers.journal import Journal
from cl_runner.trainer import Trainer, Training


def stream_of(shape: Shape, classes: int, size: int) -> Stream:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    examples = Examples(images, labels, torch.zeros(size, dtype=torch.int64))
    task = Task(0, tuple(range(classes)), lambda split: examples)
    return Stream(Scenario.DOMAIN, [task], classes, shape, None, None)


def runner_seconds(architecture, stream: Stream, batch_size: int, folder: Path) -> float:
    """One epoch as a run trains it."""
    model, strategy = architecture.build(stream), Finetune()
    strategy.setup(model, stream)
    journal = Journal()
    journal.start(RunInfo(folder, "bench", "bench", "bench", {}, 1, "domain", False, ""))
    trainer = Trainer(epochs=1, batch_size=batch_size)
    training = Training(trainer, model, strategy, partial(torch.optim.SGD, lr=0.01), constant, journal.step)
    (task,) = stream.tasks
    model.reveal(task)
    start = time.perf_counter()
    training.learn(task, task.train)
    seconds = time.perf_counter() - start
    journal.close()
    return seconds


def bare_seconds(architecture, stream: Stream, batch_size: int) -> float:
    """The same epoch as one would write it by hand for tensors in memory."""
    model = architecture.build(stream)
    network = nn.Sequential(model.backbone, model.head).to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    examples = stream.tasks[0].train
    images, labels = examples.images.float() / 255, examples.labels
    start = time.perf_counter()
    order = torch.randperm(len(labels))
    for begin in range(0, len(labels), batch_size):
        rows = order[begin : begin + batch_size]
        loss = F.cross_entropy(network(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


AVALANCHE = """
import json, time, torch
torch.set_num_threads(1)
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import transforms
from torchvision.datasets import FakeData
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import make_avalanche_dataset, TransformGroups
from avalanche.benchmarks.utils.data import AvalancheDataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.training.supervised import Naive
from PIL import Image
import numpy as np

size = {size}
pixels = np.random.RandomState(0).randint(256, size=(size, 28, 28)).astype(np.uint8)
labels = np.random.RandomState(1).randint(10, size=size).tolist()

class Set(torch.utils.data.Dataset):  # returns images as torchvision's MNIST does
    def __len__(self): return size
    def __getitem__(self, index): return Image.fromarray(pixels[index], mode="L"), labels[index]

to_tensor = TransformGroups({{"train": (transforms.ToTensor(), None), "eval": (transforms.ToTensor(), None)}})
data = make_avalanche_dataset(Set(), transform_groups=to_tensor, data_attributes=[
    DataAttribute(labels, name="targets", use_in_getitem=False),
    DataAttribute([0] * size, name="targets_task_labels", use_in_getitem=True)])
benchmark = benchmark_from_datasets(train=[data], test=[data])
net = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
strategy = Naive(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.01), criterion=nn.CrossEntropyLoss(),
                 train_mb_size=128, train_epochs=1, evaluator=None)
for experience in benchmark.train_stream:
    start = time.perf_counter()
    strategy.train(experience, num_workers=0)
    print(json.dumps(time.perf_counter() - start))
"""


def avalanche_seconds(python: str, size: int) -> float:
    """One epoch of Avalanche's Naive strategy over PIL images with ToTensor, as in its MNIST benchmarks."""
    done = subprocess.run([python, "-c", AVALANCHE.format(size=size)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


WORKS = {
    # name: architecture, image shape, classes, images, batch size, goal
    "mlp": (MLP(widths=[256, 256]), (1, 28, 28), 10, 60_000, 128, "<= 1.25"),
    "resnet": (ResNet18(width=20), (3, 32, 32), 100, 4_000, 32, "<= 0.80"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; none: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", help="a Python with Avalanche installed")
    arguments = parser.parse_args()
    if unknown := set(arguments.works) - set(WORKS):
        parser.error(f"expected some of {', '.join(WORKS)}; got {', '.join(unknown)}")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, median of {arguments.rounds} rounds", file=sys.stderr)
    print("| work | bare loop, s | runner, s | runner / bare | goal | Avalanche, s | Avalanche / runner |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.works or WORKS:
        architecture, shape, classes, size, batch_size, goal = WORKS[name]
        stream = stream_of(shape, classes, size)
        bare, runner, peer = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(arguments.rounds):
                bare.append(bare_seconds(architecture, stream, batch_size))
                runner.append(runner_seconds(architecture, stream, batch_size, Path(folder)))
                if arguments.peer and name == "mlp":
                    peer.append(avalanche_seconds(arguments.peer, size))
        ours, theirs = statistics.median(runner), statistics.median(bare)
        beside = "- | -"
        if peer:
            beside = f"{statistics.median(peer):.2f} | {statistics.median(peer) / ours:.2f}"
        print(f"| {name} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} | {goal} | {beside} |")


if __name__ == "__main__":
    main()
