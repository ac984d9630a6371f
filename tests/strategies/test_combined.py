import re
from itertools import permutations

import pytest
import torch
from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.fisher.estimators import Exact, Probe
from cl_runner.memory import ClassBalanced, Herding, Reservoir
from cl_runner.models.mlp import MLP
from cl_runner.models.model import PretrainedView
from cl_runner.models.timm import Timm
from cl_runner.strategies import (
    AGEM,
    DER,
    EASE,
    ER,
    EWC,
    L2,
    L2P,
    LFL,
    LUCIR,
    MAS,
    MIR,
    NCM,
    SI,
    SLCA,
    CODAPrompt,
    Combined,
    Cumulative,
    DualPrompt,
    Frozen,
    GDumb,
    ICaRL,
    Joint,
    LoRA,
    LwF,
    RWalk,
)
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.distillation import Distillation
from cl_runner.streams.split import Split
from tests.strategies import midway
from tests.strategies.midway import assert_resumes
from tests.toys import learn, toy_model, toy_stream, toy_training
from tests.vits import SIZE, toy_vit_model

PROMPTS = {
    "l2p": lambda: L2P(pool=6, length=2, top=3),
    "dualprompt": lambda: DualPrompt(general_blocks=[0], expert_blocks=[1, 2], general_length=2, expert_length=4),
    "coda_prompt": lambda: CODAPrompt(blocks=[0, 1, 2], components=4, length=4),
}
SCENARIOS = ["task", "domain", "class"]
PARTS = {
    "ewc": lambda: EWC(fisher=Probe(), strength=5.0),
    "er": lambda: ER(memory=Reservoir(size=12)),
    "der": lambda: DER(memory=Reservoir(size=12)),
    "si": lambda: SI(strength=5.0),
    "lwf": lambda: LwF(weighting="average"),
    "icarl": lambda: ICaRL(memory=Herding(size=4, per="class")),
}


def combined(*names):
    return Combined(parts={name: PARTS[name]() for name in names})


def digits(scenario="class"):
    return Split(name="digits", num_tasks=5, scenario=scenario)


@pytest.mark.parametrize("name", PARTS)
def test_of_one_part_it_is_that_part_bit_for_bit(name):
    found = []
    for make in (PARTS[name], lambda: combined(name)):
        stream = toy_stream("class")
        model = toy_model(stream)
        strategy = make()
        rows = learn(strategy, stream, model)
        images = stream.tasks[0].test
        model.eval()
        answers = strategy.predict(images.images, images.task_ids).detach()
        found.append(([row["loss"] for row in rows], model.state_dict(), answers, strategy.report().keys()))
    (losses, weights, answers, report), (same_losses, same_weights, same_answers, same_report) = found
    assert losses == same_losses
    assert all(torch.equal(value, same_weights[key]) for key, value in weights.items())
    assert torch.equal(answers, same_answers)
    assert report == same_report


def test_a_penalty_and_a_memory_are_both_there():
    stream = toy_stream("class")
    strategy = combined("ewc", "er")
    rows = learn(strategy, stream, toy_model(stream), tasks=2)
    assert all(row["loss"]["ewc"] > 0 for row in rows if row["task"] == 1)
    assert len(strategy.parts["er"].memory) == 12
    batch = strategy.before_batch(stream.tasks[2].train[:8])
    assert len(batch) == 16
    assert strategy.parts["er"].memory.examples.task_ids.unique().tolist() == [0, 1]


def test_penalties_add_up_and_keep_their_names_apart():
    stream = toy_stream("class")
    model = toy_model(stream)
    parts = {"weak": EWC(fisher=Probe(), strength=1.0), "strong": EWC(fisher=Probe(), strength=10.0)}
    strategy = Combined(parts=parts)
    learn(strategy, stream, model, tasks=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    terms = strategy.penalties(stream.tasks[0].train, None)
    assert list(terms) == ["ewc", "strong_ewc"]
    torch.testing.assert_close(terms["strong_ewc"], 10 * terms["ewc"])


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("names", [("ewc", "er"), ("si", "der"), ("lwf", "si", "er")])
def test_it_resumes_in_the_middle_of_a_task(names, scenario):
    assert_resumes(lambda: combined(*names), scenario, norm=True)


def test_what_only_one_part_can_say_is_said_by_the_first_that_has_it(caplog):
    strategy, stream = combined("si", "icarl", "lwf"), toy_stream("class")
    model = toy_model(stream)
    with caplog.at_level("WARNING", logger="cl_runner"):
        learn(strategy, stream, model, tasks=2)
    assert caplog.text.count("loss on the labels taken from icarl alone, not from lwf") == 1
    icarl = strategy.parts["icarl"]
    batch = stream.tasks[1].train
    output = model(batch.images)
    assert torch.equal(strategy.task_loss(batch, output), icarl.task_loss(batch, output))
    assert len(strategy.training_data(stream.tasks[2])) == 24 + 16
    answers = strategy.predict(batch.images, batch.task_ids)
    assert torch.equal(answers, icarl.predict(batch.images, batch.task_ids))


@pytest.mark.parametrize("names", [("lwf", "der"), ("der", "lwf")])
def test_replayed_rows_count_as_the_method_with_the_memory_has_it_wherever_it_stands(names):
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = combined(*names)
    learn(strategy, stream, model, tasks=2)
    batch = strategy.before_batch(stream.tasks[1].train[:8])
    output = model(batch.images)
    assert torch.equal(strategy.task_loss(batch, output), strategy.parts["der"].task_loss(batch, output))


def test_other_parts_see_a_batch_before_a_memory_joins_it():
    stream = toy_stream("domain")
    seen = []

    class Watching(Strategy):
        def before_batch(self, batch):
            seen.append(len(batch))
            return batch

    parts = {"er": ER(memory=Reservoir(size=12)), "watching": Watching()}
    learn(Combined(parts=parts), stream, toy_model(stream))
    assert set(seen) == {8}


@pytest.mark.parametrize("names", [*permutations(["lwf", "lfl", "lucir", "lora"], 2)], ids="+".join)
def test_a_teacher_is_a_copy_of_the_model_that_other_parts_have_made_whatever_their_order(names):
    made = {"lwf": LwF(), "lfl": LFL(), "lucir": LUCIR(memory=Herding(size=12)), "lora": LoRA()}
    stream = toy_stream("class")
    learn(Combined(parts={name: made[name] for name in names}), stream, toy_model(stream), tasks=2)


@pytest.mark.parametrize("names", [("slca", "der"), ("der", "slca"), ("er", "lwf"), ("ewc", "lwf"), ("si", "ewc")])
def test_which_outputs_are_active_is_said_by_the_part_that_replays_if_there_is_one(names):
    memory = Reservoir(size=12)
    made = {"slca": SLCA(), "der": DER(memory=memory), "er": ER(memory=memory), "lwf": LwF(), "si": SI()}
    made["ewc"] = EWC(fisher=Exact())
    strategy = Combined(parts={name: made[name] for name in names})
    expected = {"der": "all", "er": None, "lwf": "current", "si": None}  # None: the scenario's, all seen so far
    assert strategy.active_logits == expected[next(name for name in expected if name in names)]


@pytest.mark.parametrize(
    "path", [lambda: SI(strength=1.0), lambda: RWalk(fisher=Probe(), strength=1.0, interval=2)], ids=["si", "rwalk"]
)
@pytest.mark.parametrize(
    "other",
    [
        SLCA,
        LFL,
        lambda: LUCIR(memory=Herding(size=12)),
        lambda: AGEM(memory=ClassBalanced(size=12)),
        lambda: GDumb(memory=ClassBalanced(size=12)),
    ],
    ids=["slca", "lfl", "lucir", "agem", "gdumb"],
)
def test_a_path_is_that_of_the_steps_as_they_are_made_whichever_part_comes_first(path, other):
    found = []
    for names in (("path", "other"), ("other", "path")):
        stream = toy_stream("class")
        made = {"path": path(), "other": other()}
        learn(Combined(parts={name: made[name] for name in names}), stream, toy_model(stream), tasks=2)
        found.append(made["path"].importance.values)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("holding", [lambda: EWC(fisher=Exact(), strength=1.0), MAS, lambda: L2(towards="previous")])
def test_what_holds_earlier_weights_holds_the_head_that_slca_goes_on_from_whichever_comes_first(holding):
    found = []
    for names in (("slca", "holding"), ("holding", "slca")):
        stream = toy_stream("class")
        model, made = toy_model(stream), {"slca": SLCA(), "holding": holding()}
        strategy = Combined(parts={name: made[name] for name in names})
        learn(strategy, stream, model, tasks=2)
        strategy.before_task(stream.tasks[2])
        batch = stream.tasks[2].train[:8]
        pull = torch.stack(list(strategy.penalties(batch, model(batch.images)).values())).sum()
        found.append({**model.state_dict(), "pull": pull.detach()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("names", [*permutations(["slca", "holding"])], ids="+".join)
@pytest.mark.parametrize("holding", [LFL, lambda: LUCIR(memory=Herding(size=12))], ids=["lfl", "lucir"])
def test_old_rows_are_held_where_slca_goes_on_from_whichever_comes_first(holding, names):
    stream, made = toy_stream("class"), {"slca": SLCA(), "holding": holding()}
    model, strategy = toy_model(stream), Combined(parts={name: made[name] for name in names})
    learn(strategy, stream, model, tasks=2)
    strategy.before_task(stream.tasks[2])
    old = stream.classes_before(2)
    batch = stream.tasks[2].train[:8]
    strategy.after_step(batch, model(batch.images))
    assert torch.equal(model.head.weight[old], made["slca"].unaligned["weight"][old])


@pytest.mark.parametrize("names", [*permutations(["l2", "frozen"])], ids="+".join)
def test_the_pretrained_weights_are_held_beside_a_frozen_backbone_whichever_comes_first(names):
    made, stream = {"l2": L2(towards="pretrained"), "frozen": Frozen()}, toy_stream("class")
    learn(Combined(parts={name: made[name] for name in names}), stream, toy_model(stream), tasks=2)


def test_slca_slows_down_branches_too():
    stream = toy_stream("class")
    model, strategy = toy_model(stream), Combined(parts={"lora": LoRA(), "slca": SLCA(backbone_rate=0.0)})
    training, _ = toy_training(strategy, stream, model)
    task = stream.tasks[0]
    model.reveal(task)
    strategy.before_task(task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training.learn(task, task.train)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_without_the_head_prompts_are_held_all_the_same():
    stream = toy_stream("class")
    made = {"si": SI(head=False), "prompts": PROMPTS["l2p"]()}
    learn(Combined(parts=made), stream, toy_vit_model(stream), tasks=1)
    assert {name.partition(".")[0] for name in made["si"].importance.values} == {"prompts"}


@pytest.mark.parametrize("inside", [*PROMPTS, "ease"])
@pytest.mark.parametrize("names", [("lwf", "inside"), ("inside", "lwf"), ("lfl", "inside"), ("inside", "lfl")])
def test_a_teacher_answers_as_the_model_did_before_the_task_with_its_prompts_and_branches(names, inside):
    stream = toy_stream("class")
    model = toy_vit_model(stream)
    made = {"lwf": LwF, "lfl": LFL, "inside": (PROMPTS | {"ease": lambda: EASE(width=8)})[inside]}
    strategy = Combined(parts={name: made[name]() for name in names})
    learn(strategy, stream, model, tasks=1, epochs=10)
    inputs = model.eval()(stream.tasks[0].test.images).inputs
    before = model.encode(inputs).logits
    strategy.before_task(stream.tasks[1])
    teacher = next(part for part in strategy.parts.values() if isinstance(part, Distillation)).teacher
    torch.testing.assert_close(teacher.encode(inputs).logits, before)


def test_the_pretrained_teacher_has_no_prompts():
    stream = toy_stream("class")
    model = toy_vit_model(stream, pretrained_head=nn.Linear(SIZE, 5))
    inputs = model.eval()(stream.tasks[0].test.images).inputs
    before = PretrainedView(model).encode(inputs).logits
    strategy = Combined(parts={"lwf": LwF(), "prompts": PROMPTS["l2p"]()})
    learn(strategy, stream, model, tasks=2)
    assert torch.equal(strategy.parts["lwf"].pretrained.encode(inputs).logits, before)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_a_teacher_that_has_prompts_resumes_in_the_middle_of_a_task(prompts, monkeypatch):
    monkeypatch.setattr(midway, "toy_model", toy_vit_model)
    assert_resumes(lambda: Combined(parts={"lwf": LwF(), "prompts": PROMPTS[prompts]()}), "class")


@pytest.mark.parametrize("prompts", PROMPTS)
def test_prompts_learn_beside_what_puts_other_tensors_in_their_place(prompts):
    for part in (
        MIR(memory=Reservoir(size=12), replay_batch_size=4, candidates=9),
        MAS(),
        EWC(fisher=Exact()),
        RWalk(fisher=Probe()),
    ):
        stream = toy_stream("class")
        strategy = Combined(parts={"prompts": PROMPTS[prompts](), "part": part})
        learn(strategy, stream, toy_vit_model(stream), tasks=2, epochs=1)


def test_each_part_refuses_what_it_cannot_serve():
    combined("ewc", "er").check(digits("domain"), MLP(widths=[8]))
    with pytest.raises(ConfigError, match=r"strategy: expected stream\.scenario="):
        combined("ewc", "icarl").check(digits("domain"), MLP(widths=[8]))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"er": PARTS["er"](), "der": PARTS["der"]()}, "expected one method with a memory, got er (ER), der (DER)"),
        (
            {"er": PARTS["er"](), "prompts": DualPrompt()},
            "expected no replay beside prompts (DualPrompt), got er (ER)",
        ),
        (
            {"er": PARTS["er"](), "all": Combined(parts={"er": PARTS["er"]()})},
            "expected methods that are not combined themselves, got all (Combined)",
        ),
        (
            {"ewc": PARTS["ewc"](), "joint": Joint()},
            "expected methods that learn one model task by task, got joint (Joint)",
        ),
        (
            {"all": Cumulative(), "prompts": DualPrompt()},
            "expected no replay beside prompts (DualPrompt), got all (Cumulative)",
        ),
        (
            {"ewc": PARTS["ewc"](), "lora": LoRA(layers=["*qkv"])},
            "expected none that holds earlier weights beside lora (LoRA), which redraws its own in each task, "
            "got ewc (EWC)",
        ),
        (
            {"prompts": CODAPrompt(components=4), "si": PARTS["si"]()},
            "expected none that holds earlier weights beside prompts (CODAPrompt), which redraws its own in each task, "
            "got si (SI)",
        ),
        (
            {"l2": L2(towards="previous"), "prompts": DualPrompt()},
            "expected none that holds earlier weights beside prompts (DualPrompt), which redraws its own in each task, "
            "got l2 (L2)",
        ),
        (
            {"frozen": Frozen(), "prompts": L2P()},
            "expected no frozen backbone beside prompts (L2P), got frozen (Frozen)",
        ),
        (
            {"lora": LoRA(layers=["*qkv"]), "frozen": Frozen()},
            "expected no frozen backbone beside lora (LoRA), got frozen (Frozen)",
        ),
        (
            {"prompts": L2P(), "gdumb": GDumb(memory=ClassBalanced(size=12))},
            "expected none that starts afresh beside prompts (L2P), got gdumb (GDumb)",
        ),
        ({"ewc": PARTS["ewc"](), "ncm": NCM()}, "expected methods that learn by gradients, got ncm (NCM)"),
        (
            {"one": LoRA(layers=["*qkv"]), "two": LoRA(layers=["*proj"])},
            "expected one method with prompts or branches, got one (LoRA), two (LoRA)",
        ),
        (
            {"ease": EASE(), "prompts": L2P()},
            "expected one method with prompts or branches, got ease (EASE), prompts (L2P)",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts, reason):
    with pytest.raises(ConfigError, match=re.escape(f"strategy.parts: {reason}")):
        Combined(parts=parts).check(digits(), Timm(name="test_vit", pretrained=False))


@pytest.mark.parametrize(
    ("declared", "other", "reason"),
    [
        (["extends_backbone"], LoRA, "expected one method with prompts or branches, got own (Own), other"),
        (["carries_over"], lambda: GDumb(memory=ClassBalanced(size=12)), "expected none that starts afresh"),
        (["caches_features"], LoRA, "expected no frozen backbone beside other (LoRA), got own (Own)"),
        (["redraws"], MAS, "expected none that holds earlier weights beside own (Own)"),
        (["holds_earlier_weights"], LoRA, "expected none that holds earlier weights beside other (LoRA)"),
        (["excludes_replay"], Cumulative, "expected no replay beside own (Own), got other (Cumulative)"),
        (["keeps_all_data"], DualPrompt, "expected no replay beside other (DualPrompt), got own (Own)"),
        (["closed_form"], SI, "expected methods that learn by gradients, got own (Own)"),
    ],
)
def test_a_method_of_ones_own_is_held_to_what_it_declares(declared, other, reason):
    own = type("Own", (Strategy,), dict.fromkeys(declared, True))
    with pytest.raises(ConfigError, match=re.escape(f"strategy.parts: {reason}")):
        Combined(parts={"own": own(), "other": other()}).check(digits(), Timm(name="test_vit", pretrained=False))


@pytest.mark.parametrize(
    ("declared", "first", "last"),
    [
        ("rewires", ["setup"], []),
        ("has_teacher", ["before_task"], ["setup"]),
        ("realigns_head", ["before_task"], ["after_task"]),
        ("restarts", ["before_task"], []),
        ("measures_steps", ["after_backward"], ["after_step"]),
    ],
)
def test_a_method_of_ones_own_comes_when_what_it_declares_wants_it_to(declared, first, last):
    calls = []

    class Noting(Strategy):
        def setup(self, model, stream):
            calls.append(("setup", type(self)))
            super().setup(model, stream)

        def before_task(self, task):
            calls.append(("before_task", type(self)))

        def after_backward(self):
            calls.append(("after_backward", type(self)))

        def after_step(self, batch, output):
            calls.append(("after_step", type(self)))

        def after_task(self, task):
            calls.append(("after_task", type(self)))

    own = type("Own", (Noting,), {declared: True})
    for kinds in ((own, Noting), (Noting, own)):
        calls.clear()
        stream = toy_stream("class")
        learn(Combined(parts={kind.__name__: kind() for kind in kinds}), stream, toy_model(stream), tasks=1)
        for hook in first + last:
            first_called, *_, last_called = [kind for called, kind in calls if called == hook]
            assert (first_called if hook in first else last_called) is own


def test_earlier_weights_may_be_held_beside_a_pool_of_prompts_which_goes_on():
    for part in (PARTS["si"](), L2(towards="previous"), MAS()):
        parts = {"part": part, "prompts": L2P()}
        Combined(parts=parts).check(digits(), Timm(name="test_vit", pretrained=False))


def test_nothing_to_combine_is_refused():
    with pytest.raises(ConfigError, match=r"strategy\.parts: expected at least one method, got none"):
        Combined(parts={})
