"""The page: its content, and that it is self-contained."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cl_runner.report.command import main
from cl_runner.report.page import STEP, UNMEASURED, encode
from tests.report.samples import STAIRS, config, unfinished, write


class Page(HTMLParser):
    """Collects elements by name, with their attributes and direct text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.data = json.loads(next("".join(said) for _, given, said in self.elements if given.get("id") == "data"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_data(self, data):
        if self.elements:
            self.elements[-1][2].append(data)

    def named(self, tag):
        return [(given, "".join(said)) for name, given, said in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for seed, accuracy in enumerate((0.6, 0.8)):
        write(root, config("EWC", seed, strength=1e4), accuracy)
        write(root, config("Finetune", seed), accuracy - 0.1 * (1 + seed))
    unfinished(root, "lwf-s0-1", state="failed", error="</script><b>bold</b>")
    assert main([str(root), "--baseline", "finetune"]) == 0
    return root


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_it_holds_the_groups_with_their_numbers_and_their_runs(page, folder):
    ewc, finetune = page.data["groups"]
    assert (ewc["label"], ewc["n"], ewc["tasks"]) == ("ewc", 2, 3)
    n, mean, std, sem, low, high, difference = ewc["cells"][0]
    assert (n, mean, std, sem) == (2, pytest.approx(0.7), pytest.approx(0.141421), pytest.approx(0.1))
    assert (low, high) == (pytest.approx(0.7 - 1.27062), pytest.approx(0.7 + 1.27062))
    assert difference[:2] == [2, pytest.approx(0.15)]
    assert finetune["cells"][0][-1] is None
    assert finetune["baseline"]
    for folder_name, seed, (accuracy, *_) in ewc["runs"]:
        assert (folder / folder_name).is_dir()
        assert accuracy == (0.6, 0.8)[seed]


def test_its_matrices_are_those_of_the_runs(page):
    steps = np.frombuffer(base64.b64decode(page.data["groups"][0]["accuracy"]), "<i2").reshape(3, 3)
    expected = np.array(STAIRS, dtype=float)
    np.testing.assert_array_equal(steps == UNMEASURED, np.isnan(expected))
    np.testing.assert_allclose(np.where(steps == UNMEASURED, np.nan, steps * STEP), expected)


def test_a_matrix_is_rounded_to_its_steps_and_may_be_negative():
    steps = np.frombuffer(base64.b64decode(encode(np.array([[-0.25, 0.33336], [np.nan, 1.0]]))), "<i2")
    assert steps.tolist() == [-2500, 3334, UNMEASURED, 10000]


def test_it_asks_for_nothing_from_anywhere(text, page):
    assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text)
    assert not re.search(r"@import|url\(", text)
    assert not [given for tag, given, _ in page.elements if tag in ("img", "iframe", "object") or "src" in given]
    (policy,) = [given["content"] for given, _ in page.named("meta") if given.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_nothing_that_a_run_says_becomes_part_of_the_page(text, page):
    assert "<b>bold" not in text
    assert page.data["out"] == [["lwf-s0-1", "failed", "</script><b>bold</b>", True]]
    assert len(page.named("script")) == 2


def test_its_table_is_one_and_its_controls_have_names(page):
    ((_, caption),) = page.named("caption")
    assert "sort" in caption
    assert len(page.named("table")) == 1
    assert page.named("html")[0][0]["lang"] == "en"
    for tag in ("section", "aside", "form"):
        assert all(given.get("aria-label") or given.get("id") == "out" for given, _ in page.named(tag))


def test_files_that_it_links_are_beside_it(page, folder):
    assert {"table.csv", "table.md", "table.tex", "matrices.png", "accuracy.png", "forgetting.png"} <= set(
        page.data["files"]
    )
    assert all((folder / "report" / name).exists() for name in page.data["files"])


def test_a_stream_of_one_task_makes_a_page_too(tmp_path):
    write(tmp_path, config(), rows=[[0.5]], metrics={"average_forgetting": None})
    main([str(tmp_path)])
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert page.data["groups"][0]["over"]["accuracy"] == [[0.5], None]
    assert not (tmp_path / "report" / "forgetting.png").exists()
