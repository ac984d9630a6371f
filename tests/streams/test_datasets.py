import gzip
import hashlib
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from cl_runner.errors import ConfigError
from cl_runner.streams.cache import locked
from cl_runner.streams.datasets import KNOWN, Digits, find
from tests.streams.data import write_folder, write_mnist

NOWHERE = "http://127.0.0.1:9/"  # a port where nothing answers


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_digits_come_in_a_training_set_and_a_fifth_for_testing() -> None:
    data = Digits().read()
    train, test = (torch.bincount(labels, minlength=10) for labels in (data.train_labels, data.test_labels))
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert ((test / (train + test) - 0.2).abs() < 0.003).all()
    assert data.train_images.min() == 0
    assert data.train_images.max() == 255


def test_digits_are_always_split_alike() -> None:
    assert torch.equal(Digits().read().test_images, Digits().read().test_images)


@pytest.mark.parametrize(
    ("name", "title"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_torchvisions_own_layout_is_read(tmp_path: Path, name: str, title: str) -> None:
    written = write_mnist(tmp_path, title)
    data = find(name, tmp_path, download=False).read()
    assert np.array_equal(data.train_images[:, 0].numpy(), written["train"][0])
    assert np.array_equal(data.test_labels.numpy(), written["t10k"][1])
    assert data.train_labels.dtype == torch.int64


def test_emnist_stands_upright(tmp_path: Path) -> None:
    parts = "emnist-balanced-train", "emnist-balanced-test"
    written = write_mnist(tmp_path, "EMNIST", size=47, parts=parts, num_classes=47)
    data = find("emnist", tmp_path, download=False).read()
    on_disk = written["emnist-balanced-train"][0]  # EMNIST's files are transposed
    assert np.array_equal(data.train_images[:, 0].numpy(), on_disk.transpose(0, 2, 1))


def test_cifar_is_read_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.RandomState(0)
    batches = {name: random.randint(0, 256, (2, 3072)).astype(np.uint8) for name in KNOWN["cifar10"].files[:-1]}
    for number, (name, pixels) in enumerate(batches.items()):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [number, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    own = {
        name: [[file, md5(folder / file)] for file, _ in getattr(datasets.CIFAR10, name)]
        for name in ("train_list", "test_list")
    }
    for name, checksums in own.items():
        monkeypatch.setattr(datasets.CIFAR10, name, checksums)
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", md5(folder / "batches.meta"))
    data = find("cifar10", tmp_path, download=False).read()
    assert data.train_images.shape == (10, 3, 32, 32)
    assert np.array_equal(data.train_images[2].flatten().numpy(), batches["data_batch_2"][0])
    assert data.train_labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]


def test_svhn_is_read_with_its_zeros_as_class_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": np.array([[1], [10], [3], [9]])})
        monkeypatch.setitem(datasets.SVHN.split_list, part, ["", path.name, md5(path)])
    data = find("svhn", tmp_path, download=False).read()
    assert data.train_labels.tolist() == [1, 0, 3, 9]
    assert np.array_equal(data.train_images[1].numpy(), pixels[..., 1].transpose(2, 0, 1))


def test_a_folder_of_images_serves_a_known_data_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "mnist", [str(number) for number in range(10)], size=(28, 28), mode="RGB")
    data = find("mnist", tmp_path, download=False).read()
    assert data.image_shape == (1, 28, 28)


def test_torchvisions_copy_comes_before_a_folder_of_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "mnist", [str(number) for number in range(10)], size=(28, 28), mode="L")
    write_mnist(tmp_path, size=30)
    assert len(find("mnist", tmp_path, download=False).read().train_images) == 30


@pytest.mark.parametrize(
    ("classes", "size", "complaint"),
    [
        (3, (28, 28), "expected the 10 classes of MNIST in .*mnist, got 3"),
        (10, (20, 28), "expected 28x28 images of MNIST in .*mnist, got 20x28"),
    ],
)
def test_a_folder_that_is_not_the_known_data_set_is_refused(
    tmp_path: Path, classes: int, size: tuple[int, int], complaint: str
) -> None:
    write_folder(tmp_path / "mnist", [str(number) for number in range(classes)], size=size)
    with pytest.raises(ConfigError, match=complaint):
        find("mnist", tmp_path, download=False).read()


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"MNIST/raw/{.*t10k-images-idx3-ubyte.*}, got .*; remove what is broken"):
        find("mnist", tmp_path, download=False).read()
    assert not (tmp_path / ".cl_runner").exists()


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "digits"])
def test_what_is_absent_is_named_with_its_place_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        find(name, tmp_path / "data", download=False)
    assert error.value.field == "data_root"
    assert "\n" not in str(error.value)
    for expected in (
        str(tmp_path / "data" / KNOWN[name].folder),
        *KNOWN[name].files,
        f"data/{name}/{{train,test}}/<class>/",
    ):
        assert expected in error.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_leaves_one_line_and_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [NOWHERE])
    with pytest.raises(ConfigError, match=r"the download failed: .*refused") as error:
        find("kmnist", tmp_path / "data")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_what_is_absent_is_downloaded_by_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    written = write_mnist(tmp_path / "server", "KMNIST")
    served = []
    for path in sorted((tmp_path / "server" / "KMNIST" / "raw").iterdir()):
        archive = tmp_path / "server" / f"{path.name}.gz"
        archive.write_bytes(gzip.compress(path.read_bytes()))
        served.append((archive.name, md5(archive)))
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=tmp_path / "server"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.KMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(datasets.KMNIST, "resources", served)
    data = find("kmnist", tmp_path / "data").read()
    server.shutdown()
    server.server_close()
    assert np.array_equal(data.train_images[:, 0].numpy(), written["train"][0])
    assert capfd.readouterr() == ("", "")


def test_files_that_another_process_is_downloading_are_waited_for(tmp_path: Path) -> None:
    (tmp_path / "KMNIST" / "raw").mkdir(parents=True)
    for path in KNOWN["kmnist"].paths(tmp_path):
        path.touch()
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / ".cl_runner" / "kmnist.lock"):
            found = pool.submit(lambda: find("kmnist", tmp_path).read())
            time.sleep(0.2)
            written = write_mnist(tmp_path, "KMNIST")
        assert np.array_equal(found.result().train_images[:, 0].numpy(), written["train"][0])


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"digits, mnist, .* or a folder of images .*/minst/{train,test}/") as error:
        find("minst", tmp_path)
    assert error.value.field == "stream.name"
