"""Every method that learns by gradients, task by task, in any network: in each of its scenarios, on a model of which a
part is frozen."""

import pytest
import torch

from cl_runner.fisher.estimators import Exact, Probe
from cl_runner.listing import choices
from cl_runner.memory import Reservoir
from cl_runner.strategies import (
    ER,
    EWC,
    L1,
    L2,
    LFL,
    MAS,
    SI,
    SLCA,
    Combined,
    Cumulative,
    Dropout,
    Finetune,
    Frozen,
    Independent,
    LoRA,
    LwF,
    RWalk,
)
from cl_runner.streams.base import Scenario
from tests.strategies.midway import assert_resumes
from tests.strategies.test_rehearsal import METHODS as REHEARSAL
from tests.strategies.test_rehearsal import TAUGHT
from tests.toys import learn, toy_model, toy_stream

fisher = Probe(num_samples=None, batch_size=16)
METHODS = {
    **REHEARSAL,
    **TAUGHT,
    "finetune": Finetune,
    "frozen": Frozen,
    "cumulative": Cumulative,
    "independent": Independent,
    "dropout": lambda: Dropout(rate=0.3),
    "l1": lambda: L1(strength=0.01),
    "l2": lambda: L2(strength=0.01, towards="previous"),
    "ewc": lambda: EWC(fisher=fisher, strength=10.0),
    "ewc_kfac": lambda: EWC(fisher=Exact(representation="kfac"), strength=10.0),
    "ewc_average": lambda: EWC(fisher=fisher, strength=10.0, accumulation="average"),
    "online_ewc": lambda: EWC(fisher=fisher, strength=10.0, accumulation="sum", decay=0.95),
    "si": lambda: SI(strength=1.0),
    "mas": lambda: MAS(strength=1.0),
    "rwalk": lambda: RWalk(fisher=fisher, strength=10.0, interval=2),
    "lwf": LwF,
    "lfl": lambda: LFL(strength=1.0),
    "slca": lambda: SLCA(epochs=1),
    "lora": lambda: LoRA(rank=2),
    "lora_kept": lambda: LoRA(rank=2, merge=False),
    "combined": lambda: Combined(parts={"si": SI(strength=1.0), "er": ER(memory=Reservoir(size=30))}),
}


def scenarios(make):
    strategy = make()
    return [Scenario.TASK] if strategy.needs_task_id else sorted(strategy.scenarios)


ELSEWHERE = {
    "joint": "learns all tasks at once",
    **dict.fromkeys(("ncm", "simplecil", "slda", "ranpac", "fecam"), "closed form, on frozen features"),
    **dict.fromkeys(("l2p", "dualprompt", "coda_prompt", "ease"), "beside a vision transformer, which they freeze"),
}


def test_no_method_is_left_out():
    assert choices()["strategy"].keys() - ELSEWHERE.keys() <= METHODS.keys()


each_method_in_each_scenario = pytest.mark.parametrize(
    ("name", "scenario"), [(name, str(scenario)) for name, make in METHODS.items() for scenario in scenarios(make)]
)


@each_method_in_each_scenario
def test_what_is_frozen_stays_and_the_rest_learns(name, scenario):
    stream = toy_stream(scenario)
    model, strategy = toy_model(stream, norm=True, frozen=True), METHODS[name]()
    before = {key: value.clone() for key, value in model.named_parameters()}
    learn(strategy, stream, model, epochs=2)
    changed = {key for key, value in model.named_parameters() if key in before and not torch.equal(value, before[key])}
    assert not {key for key in changed if key.startswith("backbone.1.")}
    assert "head.weight" in changed
    assert ("backbone.2.weight" in changed) == (name not in ("frozen", "lora_kept"))
    scores = strategy.predict(stream.tasks[0].test.images, stream.tasks[0].test.task_ids)
    assert not scores.isnan().any()


@each_method_in_each_scenario
def test_it_resumes_in_the_middle_of_a_task_with_a_part_frozen(name, scenario):
    assert_resumes(METHODS[name], scenario, frozen=True)
