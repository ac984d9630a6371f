"""Evaluations within tasks (trainer.eval_every)."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from cl_runner.identity import digest
from cl_runner.strategies import Finetune
from tests.test_resume import (
    OFTEN,
    STRATEGIES,
    PowerCutError,
    assert_equal_runs,
    carry_out,
    cut,
    experiment,
    overrides_for,
    without_timing,
)
from tests.toys import toy_model, toy_stream, toy_training

pytestmark = pytest.mark.usefixtures("no_picture")

FINETUNED = ["strategy=finetune", "stream.scenario=class", "trainer.iterations=4"]


def evaluations(path):
    return [row for row in without_timing(path) if row["kind"] == "eval"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_method_trains_as_if_it_had_not_been_looked_at(strategy, tmp_path):
    words = [*overrides_for(strategy, None), "stream.max_tasks=2"]
    plain, path = carry_out(experiment(tmp_path, *words), "plain")
    looked, other = carry_out(experiment(tmp_path, *words, "trainer.eval_every=3"), "looked")
    trained = any(row["kind"] == "step" for row in without_timing(path))
    assert bool(evaluations(other)) == trained
    for part in ("accuracy", "zero_shot"):
        assert looked[part] == plain[part]
    one, two = load_file(path / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_a_prediction_draws_does_not_move_the_training(tmp_path, monkeypatch):
    def drawing(self, images, task_ids):
        return self.model(images).logits + torch.rand(())

    monkeypatch.setattr(Finetune, "predict", drawing)
    weights = []
    for words in ([], ["trainer.eval_every=1"]):
        _, path = carry_out(experiment(tmp_path, *FINETUNED, "stream.max_tasks=1", *words), "-".join(["run", *words]))
        weights.append(load_file(path / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_half_way_a_run_is_where_one_of_half_the_budget_ends(tmp_path):
    _, path = carry_out(experiment(tmp_path, *FINETUNED, "trainer.eval_every=2"), "whole")
    half, _ = carry_out(experiment(tmp_path, *FINETUNED[:-1], "trainer.iterations=2"), "half")
    first = evaluations(path)[0]
    assert (first["task"], first["step"], first["task_step"]) == (0, 2, 2)
    assert first["accuracy"] == {name: rows[0] for name, rows in half["accuracy"].items()}


def test_rows_are_between_the_steps_and_the_end_of_a_task_is_measured_once(tmp_path):
    _, path = carry_out(experiment(tmp_path, *FINETUNED, "trainer.eval_every=2", "trainer.log_every=1"), "run")
    rows = without_timing(path)
    assert [row["seq"] for row in rows] == list(range(len(rows)))
    of_task_1 = [(row["kind"], row["step"]) for row in rows if row["task"] == 1]
    assert of_task_1 == [("step", 5), ("step", 6), ("eval", 6), ("step", 7), ("step", 8), ("task", 8)]


def test_the_lowest_accuracy_counts_from_when_a_task_was_learned(tmp_path):
    results, path = carry_out(experiment(tmp_path, *FINETUNED, "trainer.eval_every=1"), "run")
    rows = [row for row in without_timing(path) if row["kind"] != "step"]
    for scenario in ("class", "task"):
        later = [[row["accuracy"][scenario][task] for row in rows if row["task"] > task] for task in range(4)]
        lowest = [min(values) for values in later]
        assert results["metrics"][f"min_accuracy/{scenario}"] == pytest.approx(sum(lowest) / 4)
        last = results["accuracy"][scenario][-1][-1]
        assert results["metrics"][f"worst_case_accuracy/{scenario}"] == pytest.approx((sum(lowest) + last) / 5)


def test_joint_training_has_no_earlier_tasks_to_be_lowered(tmp_path):
    results, path = carry_out(experiment(tmp_path, "strategy=joint", "trainer.eval_every=5"), "run")
    assert evaluations(path)
    assert all(None not in row["accuracy"]["class"] for row in evaluations(path))
    assert results["metrics"]["min_accuracy"] is None


def test_a_stopped_run_looks_where_it_would_have_looked(tmp_path):
    make = partial(experiment, tmp_path, "strategy=er", "memory.size=40", "trainer.eval_every=2", *OFTEN)
    whole = carry_out(make(), "whole")
    assert evaluations(whole[1])
    for steps in (5, 8, 13):
        with pytest.raises(PowerCutError):
            carry_out(cut(make(), steps=steps), "stopped")
    assert_equal_runs(whole, carry_out(make(), "stopped"))


def test_where_tasks_share_their_outputs_those_to_come_are_not_evaluated_within_a_task(tmp_path):
    _, path = carry_out(experiment(tmp_path, *FINETUNED, "stream.scenario=domain", "trainer.eval_every=2"), "run")
    for row in evaluations(path):
        assert [value is None for value in row["accuracy"]["domain"]] == [task > row["task"] for task in range(5)]


def test_of_independent_models_the_one_that_is_learning_is_evaluated(tmp_path):
    words = ["strategy=independent", "trainer.iterations=20", "optimizer.lr=0.01", "trainer.eval_every=19"]
    results, path = carry_out(experiment(tmp_path, *words), "run")
    rows, ends = evaluations(path), results["accuracy"]["task"]
    assert [row["task"] for row in rows] == list(range(5))
    for task, row in enumerate(rows):
        assert row["accuracy"]["task"][task] == pytest.approx(ends[task][task], abs=0.1)
        assert row["accuracy"]["task"][task] > 0.8


@pytest.mark.parametrize("between", ["look", "pause"])
def test_what_evaluations_and_checkpoints_take_is_not_counted_in_the_speed(between, monkeypatch):
    stream, now = toy_stream(), [0.0]
    monkeypatch.setattr("cl_runner.losses.time.time", lambda: now[0])

    def taking_long(*step):
        now[0] += 1000

    settings = {"eval_every": 1} if between == "look" else {"checkpoint_every": 1}
    training, rows = toy_training(Finetune(), stream, model := toy_model(stream), log_every=2, **settings)
    model.reveal(stream.tasks[0])
    training.learn(stream.tasks[0], stream.tasks[0].train, **{between: taking_long})
    assert now[0] > 1000
    assert all(row["timing"]["images_per_second"] > 1e6 for row in rows)  # nothing else took any time


def test_where_no_task_is_long_enough_it_is_said_and_nothing_summed_up(tmp_path, caplog):
    results, path = carry_out(experiment(tmp_path, *FINETUNED, "stream.max_tasks=2", "trainer.eval_every=4"), "run")
    assert "trainer.eval_every: task 1 has 4 steps, and is evaluated only after them" in caplog.text
    assert not evaluations(path)
    assert "min_accuracy" not in results["metrics"]


def test_only_where_it_is_asked_for_it_makes_another_run(tmp_path):
    def hashed(*words):
        return digest(experiment(tmp_path, "strategy=finetune", *words).config)

    config = experiment(tmp_path, "strategy=finetune").config
    del config["trainer"]["eval_every"]  # as in runs from before there was such a setting
    assert digest(config) == hashed() == hashed("trainer.eval_every=null")
    assert hashed("trainer.eval_every=3") != hashed()
