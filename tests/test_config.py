import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from cl_runner import CONF, strategies
from cl_runner.command_line import in_order
from cl_runner.components import PROVIDED, build
from cl_runner.compose import compose_jobs, parse
from cl_runner.config import check, validated
from cl_runner.errors import ConfigError
from cl_runner.identity import digest, display_name, run_folder, weights_file
from cl_runner.listing import choices
from cl_runner.models import mlp
from cl_runner.strategies.base import _in_short
from cl_runner.targets import imported

MLP = ["model=mlp"]
COMPONENT_FILES = sorted(
    file for file in CONF.glob("[a-z]*/*.yaml") if "_target_" in (yaml.safe_load(file.read_text()) or {})
)


def checked(*overrides):
    (cfg,) = compose_jobs([*MLP, *overrides])
    return check(cfg)


def config(*overrides):
    (cfg,) = compose_jobs([*MLP, *overrides])
    return validated(cfg)


@pytest.mark.parametrize("file", COMPONENT_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_argument_of_every_component_stands_in_its_yaml(file):
    node = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    target = node.pop("_target_")
    parameters = inspect.signature(imported(target)).parameters
    drawn_in = {
        key.partition("@")[2].partition(".")[0]
        for entry in node.pop("defaults", [])
        if entry != "_self_"
        for key in entry
        if not key.startswith("override ")
    }
    known, listed = set(parameters) - PROVIDED.get(file.parent.name, set()), node.keys() | drawn_in
    # Of PyTorch's classes only what is worth setting: what else they take depends on the version.
    assert listed <= known if target.startswith("torch.") else listed == known


PRESETS = {"simplecil": "ncm"}  # another name for the same method


def test_what_a_refusal_says_of_a_method_is_a_whole_clause():
    kinds = [value for value in vars(strategies).values() if isinstance(value, type)]
    assert len(kinds) > 30
    for kind in kinds:
        said = _in_short(kind)
        assert said
        assert not set(said) & set("()"), said


@pytest.mark.parametrize("group", ["strategy", "model", "fisher", "memory", "optimizer"])
def test_a_component_goes_by_what_its_choice_is_called(group):
    for file in (file for file in COMPONENT_FILES if file.parent.name == group):
        node = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        node.pop("name", None)  # torchvision's and timm's models go by their own
        assert display_name(group, node) == PRESETS.get(file.stem, file.stem)


def test_slca_aligns_the_head_at_the_rate_that_trained_it():
    (cfg,) = compose_jobs(["strategy=slca", "optimizer.lr=0.03"])
    assert validated(cfg)["strategy"]["lr"] == 0.03


def test_methods_are_compared_at_one_size_of_memory():
    sizes = {word: compose_jobs([f"strategy={word}"])[0].memory.size for word in ("er", "icarl", "gdumb", "agem")}
    assert set(sizes.values()) == {500}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["strategy=er"], "Reservoir"),
        (["strategy=icarl"], "Herding"),
        (["strategy=gdumb"], "ClassBalanced"),
        (["strategy=gem"], "ClassBalanced"),
        (["strategy=agem"], "ClassBalanced"),
        (["memory=reservoir", "strategy=icarl"], "Reservoir"),
        (["strategy=combined", "strategy@strategy.parts.er=icarl"], "Herding"),
    ],
)
def test_a_method_brings_its_papers_memory_unless_another_is_asked_for(words, kind):
    (cfg,) = compose_jobs(words)
    assert cfg.memory._target_ == f"cl_runner.memory.{kind}"


@pytest.mark.parametrize("file", sorted(CONF.glob("[a-z]*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_choice_says_in_a_line_what_it_is(file):
    first = next(line for line in file.read_text().splitlines() if line.startswith("# ") and "@package" not in line)
    assert 10 < len(first) <= 120


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epohcs=3", "trainer.epohcs: unknown key; did you mean epochs?"),
        ("+trainer.epohcs=3", "trainer.epohcs: unknown key; did you mean epochs?"),
        ("++trainer.epohcs=3", "trainer.epohcs: unknown key; did you mean epochs?"),
        ("stratgey=ewc", "stratgey: unknown key; did you mean strategy?"),
        ("+colour=red", "colour: unknown key; known: "),
        ("strategy.temperature=1", "strategy.temperature: unknown key; bic, icarl, lwf, slca have it"),
        ("stream.angles=[1]", "stream.angles: unknown key; rotated_mnist has it"),
        ("fisher.budget=2", "fisher.budget: unknown key; hybrid has it"),
        ("optimizer.momentum=0.9", "optimizer.momentum: unknown key; sgd has it"),
        ("scheduler.final=0.1", "scheduler.final: unknown key; cosine has it"),
        ("strategy=combined strategy.parts.ewc.rank=3", "strategy.parts.ewc.rank: unknown key; lora has it"),
        ("fisher.numsamples=3", "fisher.numsamples: unknown key; did you mean num_samples?"),
        ("strategy.strength=abc", "strategy.strength: expected float, got 'abc'"),
        ("strategy.strength=-1", "strategy.strength: expected at least 0, got -1"),
        ("strategy.anchor=here", "strategy.anchor: expected 'auto', 'previous', 'pretrained' or 'both', got 'here'"),
        ("strategy.factor=2.0", "strategy.factor: expected 0.5 or 1.0, got 2.0"),
        ("strategy=ewk", "strategy: expected one of "),
        ("trainer.epochs=0", "trainer.epochs: expected at least 1, got 0"),
        ("trainer.epochs=1.5", "trainer.epochs: expected int"),
        ("trainer.epochs=true", "trainer.epochs: expected int, got True"),
        ("trainer.iterations=0", "trainer.iterations: expected at least 1"),
        ("trainer.precision=fp8", "trainer.precision: expected 'fp32', 'tf32' or 'bf16', got 'fp8'"),
        ("seed=-1", "seed: expected at least 0, got -1"),
        ("seed=abc", "seed: expected int, got 'abc'"),
        ("rerun=maybe", "rerun: expected bool, got 'maybe'"),
        ("device=tpu", "device: expected auto, cpu, mps, cuda or cuda:N, got 'tpu'"),
        ("device=cuda:99", "device: expected one of auto, cpu"),
        ("stream.num_tasks=3", "stream.num_tasks: expected "),
        ("stream.num_tasks=0", "stream.num_tasks: expected at least 1"),
        ("stream.scenario=online", "stream.scenario: expected 'task', 'domain' or 'class', got 'online'"),
        ("optimizer.lr=-1", "optimizer.lr: expected at least 0, got -1.0"),
        ("optimizer=sgd optimizer.momentum=-1", "optimizer.momentum: expected at least 0, got -1.0"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas: Invalid beta parameter at index 1: 1.5"),
        ("stream.class_order=[a]", "stream.class_order.0: expected int, got 'a'"),
        ("stream.class_order=abc", "stream.class_order: expected 'natural' or int or a list, got 'abc'"),
        ("model.widths=[]", "model.widths: expected at least 1 item, got []"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("scheduler=step scheduler.milestones=[2]", "scheduler.milestones.0: expected less than 1, got 2"),
        ("model._target_=os.system", "model._target_: expected a name in cl_runner, torch.optim, torchvision, timm"),
        ("model._target_=cl_runner.environment.version", "model._target_: expected a class or function of cl_runner"),
        ("model._target_=cl_runner.models.nothing.Here", "model._target_: expected something importable"),
        ("stream.scenario=class strategy=independent", "strategy: expected stream.scenario=task for Independent"),
        ("stream.scenario=domain strategy=lucir", "strategy: expected stream.scenario=class for LUCIR (classify by"),
        ("strategy.anchor=pretrained", "strategy.anchor: expected auto or previous"),
        ("stream.scenario=class stream.num_tasks=10 strategy=lwf", "trainer.active_logits: expected seen or all"),
        (
            "stream.scenario=class stream.first_task_classes=5 stream.num_tasks=6 strategy=lwf",
            "trainer.active_logits: expected seen or all where a task has a single class, got current (the default of",
        ),
        ("strategy=lwf strategy.teacher=both", "strategy.teacher: expected auto or previous"),
        ("strategy=l2 strategy.towards=pretrained", "strategy.towards: expected zero or previous"),
        ("stream.scenario=domain trainer.active_logits=current", "trainer.active_logits: expected all or null"),
        ("strategy=ewc,lwf", "strategy: a sweep over several values needs -m"),
        ("data_root=${nothing}", "data_root: "),
        ("stream=image_folder", "stream.name: expected a value, got nothing"),
        ("trainer.epochs", "command line: "),
        ("trainer=1", "trainer: expected one of default, got 1"),
        ("output_root=", "output_root: expected text of at least 1 character, got ''"),
        (
            "tracker.notes=a,b",
            "tracker.notes: a sweep over several values needs -m (--multirun); a comma within a value",
        ),
        ("optimizer=null", "optimizer: expected one of adam, adamw, sgd, got null"),
        ("~optimizer", "optimizer: expected one of adam, adamw, sgd; it cannot be removed"),
        ("~strategy", "strategy: expected one of agem, "),
        ("strategy=[ewc,l2]", "strategy: expected one of agem, "),
        (
            "fisher.representation=kronecker",
            "fisher.representation: expected 'diagonal', 'kfac', 'ekfac' or 'full', got 'kronecker'",
        ),
        ("fisher=null", "fisher: expected one of argmax, batched, "),
        ("strategy._target_=3", "strategy._target_: expected the name of a class or function, got 3"),
        (
            "strategy=finetune strategy._target_=cl_runner.models.MLP",
            "strategy._target_: expected a class derived",
        ),
        (
            "tracker._target_=cl_runner.folder.write_atomically",
            "tracker._target_: expected a class derived",
        ),
        ("strategy.fisher=3", "strategy.fisher: expected a component (a mapping with a _target_), got 3"),
        ("strategy.fisher.draws=0", "strategy.fisher.draws: set fisher.draws instead: strategy.fisher stands for the"),
        ("strategy=er strategy.memory.size=3", "strategy.memory.size: set memory.size instead"),
        ("strategy.fisher=null", "strategy.fisher: expected a component"),
        ("strategy.strength=inf", "strategy.strength: expected a finite number"),
        ("trainer.seed=-1", "trainer.seed: expected at least 0, got -1"),
        ("model.seed=99999999999999999999", "model.seed: expected less than 4294967296"),
        ("seed=10000000000", "seed: expected less than 4294967296"),
        ("optimizer.foreach=true", "optimizer: "),
        ("strategy=ncm strategy.batch_size=0", "strategy.batch_size: expected at least 1"),
        ("output_root=/dev/null/runs", "output_root: expected a folder that can be written"),
        ("hydra.run.dir=elsewhere", "hydra.run.dir: expected output_root"),
        ("_pair=x", "_pair: it cannot be chosen: it follows from stream and model"),
        ("protocol@fisher=x", "protocol: it cannot be chosen: it follows from experiment and strategy"),
        ("stream=split_mnist data_root=none stream.scenario=class strategy=independent", "strategy: expected stream.s"),
        ("optimizer.betas=3", "optimizer.betas: expected a list, got 3"),
        ("plugins=my_package", "plugins: expected a list, got 'my_package'; one is written as [my_package]"),
        ("trainer.first_task.epohcs=3", "trainer.first_task.epohcs: unknown key; did you mean epochs?"),
        ("trainer.first_task.epochs=0", "trainer.first_task.epochs: expected at least 1, got 0"),
        ("trainer.first_task.optimizer=3", "trainer.first_task.optimizer: expected a mapping, got 3"),
        ("stream.augment=[flip,rot]", "stream.augment.1: expected 'crop', 'flip' or 'brightness', got 'rot'"),
        ("tracker=wandb tracker.project=a/b", "tracker.project: expected text without any of / \\ # ? % :, got 'a/b'"),
        (
            f"tracker=wandb tracker.tags=[a,{65 * 'b'}]",
            "tracker.tags.1: expected text of at most 64 characters, got",
        ),
        ("tracker=wandb tracker.mode=disabled", "tracker.mode: expected 'auto', 'online' or 'offline' (tracker=local"),
        ("trainer.first_task.optimizer.epss=1", "trainer.first_task.optimizer.epss: unknown key; did you mean eps?"),
        ("trainer.first_task.optimizer.lr=-1", "trainer.first_task.optimizer.lr: expected at least 0"),
        ("trainer.first_task.scheduler.milestones=[0.5]", "trainer.first_task.scheduler.milestones: unknown key"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_that_names_the_field(override, message):
    with pytest.raises(ConfigError) as error:
        checked(*override.split(" "))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_values_of_the_first_task_are_held_to_their_types_and_hashed():
    own = "trainer.first_task={epochs: 2, optimizer: {weight_decay: 1}}"
    same = own.replace("1}", "1.0}")
    assert config(own)["trainer"]["first_task"]["optimizer"] == {"weight_decay": 1.0}
    assert digest(config(own)) == digest(config(same)) != digest(config())


def test_a_plugin_may_be_named_once_it_is_listed(tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text(
        "from cl_runner.strategies import Finetune\nclass Mine(Finetune):\n    '''Mine.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ["strategy=finetune", "strategy._target_=my_methods.Mine"]
    with pytest.raises(ConfigError, match=r"strategy\._target_"):
        checked(*overrides)
    assert type(checked(*overrides, "plugins=[my_methods]").strategy).__name__ == "Mine"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("\ndef x(:\n", "SyntaxError: invalid syntax, my_faults.py:2"),
        ("a = nowhere\n", "NameError: name 'nowhere' is not defined, my_faults.py:1"),
        ("import nothere_xyz\n", "ModuleNotFoundError: No module named 'nothere_xyz', my_faults.py:1"),
        ("import json\njson.loads('{')\n", "char 1), my_faults.py:2"),
        ("Mine = None\n", "got 'my_faults.Mine'"),
        ("assert False\n", "(AssertionError, my_faults.py:1)"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_said_with_its_line(code, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_faults.py").write_text(code)
    sys.modules.pop("my_faults", None)
    with pytest.raises(ConfigError, match=re.escape(why)) as error:
        checked("strategy=finetune", "strategy._target_=my_faults.Mine", "plugins=[my_faults]")
    assert error.value.field == "strategy._target_"


def test_a_hook_that_is_misspelt_is_warned_of_once_and_no_other_method_is(tmp_path, monkeypatch, caplog):
    (tmp_path / "my_typos.py").write_text(
        "from cl_runner.strategies import EWC\nclass Mine(EWC):\n    def before_taskk(self, task): ...\n"
        "    def importance_of(self, task): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for seed in (0, 1):
        checked("strategy=ewc", "strategy._target_=my_typos.Mine", "plugins=[my_typos]", f"seed={seed}")
    assert [record.getMessage() for record in caplog.records] == [
        "strategy: nothing calls Mine.before_taskk; did you mean before_task?"
    ]


def test_a_hook_that_does_not_take_what_it_is_called_with_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_hooks.py").write_text(
        "from cl_runner.strategies import Finetune\nclass Mine(Finetune):\n"
        "    def after_task(self, *anything): ...\n    def before_task(self): ...\n"
        "    @staticmethod\n    def before_batch(batch): ...\n"  # right, and before the other by name
    )
    says = re.escape("strategy: expected Mine.before_task(self, task), got (self) (my_hooks.py:4)")
    with pytest.raises(ConfigError, match=says):
        checked("strategy=finetune", "strategy._target_=my_hooks.Mine", "plugins=[my_hooks]")


def test_a_sweep_may_name_choices_by_a_pattern():
    jobs = compose_jobs(["-m", *MLP, "strategy=glob(l?)"])
    assert [job.strategy._target_.rpartition(".")[2] for job in jobs] == ["L1", "L2"]


def test_a_sweep_that_names_no_values_is_refused():
    with pytest.raises(ConfigError, match="trainer.epochs: expected values"):
        compose_jobs(["-m", *MLP, "trainer.epochs=interval(1,3)"])
    with pytest.raises(ConfigError, match=r"seed: expected values to take in turn, got none in seed=range\(3,0\)"):
        compose_jobs(["-m", *MLP, "seed=range(3,0)"])
    with pytest.raises(ConfigError, match="seed: .*must not be zero"):
        compose_jobs(["-m", *MLP, "seed=range(1,3,0)"])


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError, match=r"conf: expected YAML, got .*experiment/mine\.yaml"):
        compose_jobs(["--config-dir", str(tmp_path), "experiment=mine"])


def test_a_folder_may_be_named_from_home():
    assert in_order(["data_root=~/data", "x=a~/b"]) == [f"data_root={Path.home() / 'data'}", "x=a~/b"]


@pytest.mark.parametrize("words", [[], ["--config-dir", "mine"]])
def test_a_key_below_null_may_be_set(words, cl_runner, the_run, tmp_path):
    (tmp_path / "mine").mkdir()
    status, said = cl_runner(*words, "strategy=finetune", "stream.max_tasks=1", "trainer.first_task.epochs=1")
    assert status == 0, said
    assert yaml.safe_load((the_run() / "config.yaml").read_text())["trainer"]["first_task"]["epochs"] == 1


def test_a_config_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--config-dir: expected a folder"):
        in_order(["--config-dir", str(tmp_path / "nothing"), *MLP])


def test_a_multirun_is_the_product_of_its_sweeps():
    jobs = compose_jobs(["-m", *MLP, "strategy=finetune,lwf", "seed=range(1,4)", "optimizer.lr=0.1,0.2"])
    seen = [(job.strategy._target_.rpartition(".")[2], job.seed, job.optimizer.lr) for job in jobs]
    assert len(set(seen)) == 12
    assert seen[0] == ("Finetune", 1, 0.1)
    assert seen[-1] == ("LwF", 3, 0.2)


@pytest.mark.parametrize(
    "words",
    [
        ["strategy=ewc,l2", "strategy.strength=1,2e3,null", "strategy.accumulation=sum"],
        ["experiment=vandeven_split_cifar100", "strategy=lwf,si", "stream.class_order=[2,1],'${seed}'"],
        ["trainer.first_task={epochs:3},{iterations:7}", "trainer.first_task.epochs=2", "model.widths=[8],[8,8]"],
        [
            "strategy=finetune,ewc",
            "+trainer.first_task.epochs=2",
            "trainer.first_task.epochs=1,3",
            "~trainer.log_every",
        ],
        ["strategy=combined", "+strategy.parts.l2={strength:1}", "trainer.epoch=3,4", "seed='1',2"],
    ],
)
def test_a_job_of_a_sweep_is_what_its_words_alone_ask_for(words):
    jobs = parse(["-m", *MLP, *words]).jobs
    assert len(jobs) > 1
    for own, cfg in jobs:
        assert [OmegaConf.to_yaml(cfg)] == [OmegaConf.to_yaml(alone) for alone in compose_jobs(own)]


def test_an_experiment_and_its_protocol_can_be_overridden():
    (cfg,) = compose_jobs(["experiment=vandeven_fisher_mnist"])
    assert (cfg.strategy.accumulation, cfg.strategy.strength, cfg.trainer.iterations) == ("sum", 1e4, 2000)
    (cfg,) = compose_jobs(["experiment=vandeven_fisher_mnist", "strategy=finetune"])
    assert dict(cfg.strategy) == {"_target_": "cl_runner.strategies.Finetune"}
    (cfg,) = compose_jobs(["experiment=vandeven_fisher_mnist", "strategy.strength=7", "fisher=empirical"])
    assert cfg.strategy.strength == 7
    assert cfg.strategy.fisher._target_.endswith("Empirical")


def test_a_protocol_may_set_switches_of_one_estimator_that_others_do_not_have():
    paper = config("experiment=liu_split_cifar100", "model=resnet18")["fisher"]
    assert (paper["train_mode"], paper["augment"], paper["clip"], paper["logits"]) == (True, True, 1e-4, "seen")
    ours = config("experiment=liu_split_cifar100", "model=resnet18", "fisher=exact")["fisher"]
    assert ours.keys().isdisjoint({"train_mode", "augment", "clip"})
    assert ours["logits"] == "seen"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["strategy.strength=1"], ["strategy.strength=1.0"]),
        (["device=cpu"], ["device=auto"]),
        (["data_root=here"], ["data_root=there"]),
        (["tracker=local"], ["tracker=wandb"]),
        (["trainer.log_every=1"], ["trainer.log_every=7"]),
        (["rerun=true"], []),
        (["~trainer.epochs"], []),
        (["~strategy.accumulation"], []),
        (["strategy=lwf", "fisher=exact"], ["strategy=lwf", "fisher=probe"]),
        (["trainer.iterations=5", "trainer.epochs=1"], ["trainer.iterations=5", "trainer.epochs=2"]),
    ],
)
def test_the_hash_is_blind_to_what_does_not_change_the_work(one, other):
    assert digest(config(*one)) == digest(config(*other))


def test_the_hash_is_blind_to_arguments_that_a_later_torch_adds(monkeypatch):
    before, now = digest(config()), inspect.signature(torch.optim.Adam)
    new = inspect.Parameter("new", inspect.Parameter.KEYWORD_ONLY, default=False)
    later = now.replace(parameters=[*now.parameters.values(), new])
    monkeypatch.setattr(torch.optim.Adam, "__signature__", later, raising=False)
    assert digest(config()) == before != digest(config("+optimizer.new=true"))


def test_an_argument_of_an_optimizer_that_its_yaml_leaves_out_may_be_set():
    for word in ("optimizer.amsgrad=true", "+optimizer.amsgrad=true"):
        made = checked(word)
        assert made.config["optimizer"]["amsgrad"] is True
        assert made.hash != checked().hash


@pytest.mark.parametrize(
    "override", ["seed=1", "strategy.strength=2", "fisher=exact", "stream.scenario=class", "trainer.epochs=9"]
)
def test_the_hash_sees_what_does(override):
    assert digest(config(override)) != digest(config())


def test_the_hash_sees_the_order_of_parts_and_of_renamings():
    one, other = config("strategy=combined"), config("strategy=combined")
    other["strategy"]["parts"] = dict(reversed(other["strategy"]["parts"].items()))
    assert digest(one) != digest(other)
    one["model"]["key_map"], other["model"]["key_map"] = {"a": "b", "b": "c"}, {"b": "c", "a": "b"}
    other["strategy"] = one["strategy"]
    assert digest(one) != digest(other)


def test_a_file_of_weights_is_hashed_by_what_is_in_it(tmp_path):
    hashes = []
    for name, content in (("a.pt", b"one"), ("b.pt", b"one"), ("a.pt", b"other")):
        (tmp_path / name).write_bytes(content)
        hashes.append(digest(config(f"model.pretrained={tmp_path / name}")))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("pretrained", "is_file"),
    [(True, False), (False, False), ("a1_in1k", False), ("IMAGENET1K_V1", False), ("w.pt", True), ("a/b", True)],
)
def test_a_name_is_told_from_a_file(pretrained, is_file):
    assert (weights_file(pretrained) is not None) is is_file


def test_a_file_that_is_called_like_published_weights_changes_no_hash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model=resnet18", "stream=split_digits"]
    before = [digest(config(*words, f"model.pretrained={name}")) for name in ("true", "IMAGENET1K_V1")]
    for name in ("True", "IMAGENET1K_V1"):
        Path(name).write_text("a note")
    assert [digest(config(*words, f"model.pretrained={name}")) for name in ("true", "IMAGENET1K_V1")] == before


def test_a_run_keeps_its_hash_and_folder_when_its_file_of_weights_is_replaced(tmp_path, monkeypatch):
    for check_of_weights in ("check", "check_images"):
        monkeypatch.setattr(mlp.MLP, check_of_weights, lambda *_: None)
    weights = tmp_path / "a.pt"
    weights.write_bytes(b"one")
    experiment = checked(f"model.pretrained={weights}")
    before = experiment.hash, experiment.folder
    weights.unlink()
    assert (experiment.hash, experiment.folder) == before


def test_wandbs_own_variable_names_the_project_unless_a_key_does(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert config("tracker=wandb")["tracker"]["project"] == "theirs"
    assert config("tracker=wandb", "tracker.project=mine")["tracker"]["project"] == "mine"


def test_a_group_is_everything_but_the_seed():
    def group(*overrides):
        return checked(*overrides).group

    assert group("seed=1") == group("seed=2") != group("seed=1", "strategy.strength=2")
    assert group("seed=1", "stream.class_order=${seed}") == group("seed=2", "stream.class_order=${seed}")
    assert group("seed=1", "stream.seed=5") != group("seed=1")


def test_the_folders_name_can_be_read():
    folder = run_folder(config("seed=3", "output_root=here"))
    assert folder.parent == Path("here")
    assert folder.name.startswith("ewc-split_digits-mlp-s3-")


@pytest.mark.parametrize("strategy", choices()["strategy"])
def test_the_folders_name_begins_with_the_strategy(strategy):
    assert run_folder(config(f"strategy={strategy}")).name.startswith(f"{PRESETS.get(strategy, strategy)}-")


def test_build_builds_nodes_inside_nodes():
    strategy = build(config("fisher=exact")["strategy"])
    assert type(strategy.fisher).__name__ == "Exact"


def test_a_config_folder_of_the_users_own_is_searched(tmp_path):
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "mine.yaml").write_text("_target_: cl_runner.strategies.Finetune\n")
    (cfg,) = compose_jobs(["--config-dir", str(tmp_path), *MLP, "strategy=mine"])
    assert cfg.strategy._target_.endswith("Finetune")


def test_a_plugin_may_lie_where_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    (tmp_path / "lying_here.py").write_text(
        "from cl_runner.strategies import Finetune\nclass Mine(Finetune):\n    '''Mine.'''\n"
    )
    overrides = ["strategy=finetune", "strategy._target_=lying_here.Mine", "plugins=[lying_here]"]
    assert type(checked(*overrides).strategy).__name__ == "Mine"


def test_a_plugin_that_is_nowhere_is_refused():
    with pytest.raises(
        ConfigError, match="plugins: expected packages that are installed or in the working directory, got 'nowh"
    ):
        checked("plugins=[nowhere_]")


def test_a_sweep_tries_each_network_on_its_images_once(monkeypatch):
    shapes = []
    monkeypatch.setattr(mlp.MLP, "check_images", lambda model, shape: shapes.append((list(model.widths), shape)))
    tried = []
    for cfg in compose_jobs(["-m", *MLP, "stream=split_digits", "seed=0,1", "strategy=ewc,l2", "model.widths=[8],[9]"]):
        check(cfg, tried)
    assert shapes == [([8], (1, 8, 8)), ([9], (1, 8, 8))]
