import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.memory import Herding
from cl_runner.models.cosine import CosineHead
from cl_runner.models.mlp import MLP
from cl_runner.models.model import Output
from cl_runner.models.weights import Net
from cl_runner.strategies import LUCIR, Finetune
from cl_runner.streams.split import Split
from tests.strategies.midway import assert_resumes
from tests.strategies.test_icarl import accuracy, at_task
from tests.toys import assert_same_with_gradients, learn, toy_model, toy_stream


def lucir(size=6, **settings):
    return LUCIR(memory=Herding(size=size, per="class"), **settings)


def test_its_head_is_a_linear_layer_that_says_the_same_of_features_of_length_one():
    head, linear = CosineHead(4, 3, scale=2.0), nn.Linear(4, 3)
    linear.load_state_dict(head.as_linear())
    features = F.normalize(torch.randn(5, 4))
    torch.testing.assert_close(linear(features), head(features))


def test_logits_are_scaled_cosines_whatever_the_lengths():
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = lucir(scale=7.0)
    strategy.setup(model, stream)
    images = stream.tasks[0].train.images
    model.eval()
    output = model(images)
    cosine = F.cosine_similarity(output.features[:, None], model.head.weight[None], dim=2)
    torch.testing.assert_close(output.logits, 7 * cosine)
    with torch.no_grad():
        model.head.weight *= torch.arange(1, 7)[:, None]
    torch.testing.assert_close(model(images).logits, output.logits)


def test_its_file_of_weights_holds_a_linear_classifier_that_names_the_same_classes():
    stream = toy_stream("class")
    model = toy_model(stream)
    lucir().setup(model, stream)
    with torch.no_grad():
        model.head.weight *= torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0])[:, None]
    head = Net(model.backbone).head_of(model.plain_state())
    features = 3 * torch.rand(60, 8, generator=torch.Generator().manual_seed(0))
    answers = model.head(features)
    assert torch.equal(head(features).argmax(1), answers.argmax(1))
    torch.testing.assert_close(head(F.normalize(features)), answers)


def test_the_scale_learns():
    stream = toy_stream("class")
    model = toy_model(stream)
    learn(lucir(), stream, model, tasks=1)
    assert model.head.scale.item() != 10.0


@pytest.mark.parametrize("negatives", [1, 2, 5])
def test_the_terms_are_the_features_angle_and_a_margin_to_the_hardest_new_classes(negatives):
    stream = toy_stream("class")
    model = toy_model(stream)
    strategy = lucir(strength=2.0, margin=0.8, margin_strength=3.0, negatives=negatives)
    at_task(strategy, stream, model, 2)
    batch = strategy.before_batch(stream.tasks[2].train[:3] + strategy.memory.examples[:4])
    model.eval()
    before = model(batch.images).features.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    output = model(batch.images)
    turned = sum(1 - F.cosine_similarity(f, g, dim=0) for f, g in zip(output.features, before, strict=True)) / 7
    ranking = 0.0
    for row in range(3, 7):
        cosines = F.cosine_similarity(output.features[row], model.head.weight, dim=1)
        hardest = sorted([cosines[4], cosines[5]], reverse=True)[:negatives]
        ranking += sum((0.8 - cosines[batch.labels[row]] + other).relu() for other in hardest) / 4
    terms = strategy.penalties(batch, output)
    assert ranking > 0
    assert_same_with_gradients(terms["lucir"], 2 * math.sqrt(4 / 2) * turned, model)
    assert_same_with_gradients(terms["lucir_margin"], 3 * ranking, model)


@pytest.mark.parametrize("hold", [True, False])
def test_old_embeddings_are_held(hold):
    stream = toy_stream("class")
    model = toy_model(stream)
    seen = []

    class Watched(LUCIR):
        def before_task(self, task):
            super().before_task(task)
            seen.append(self.model.head.weight.detach().clone())

    learn(Watched(memory=Herding(size=6, per="class"), hold_head=hold), stream, model, tasks=2)
    same = (model.head.weight == seen[1]).all(1)
    assert same[:2].all() == hold
    assert not same[2:4].any()


def test_it_forgets_less_than_fine_tuning():
    found = {}
    for kind in (Finetune, lambda: lucir(scale=4.0, margin=0.1)):
        stream = toy_stream("class")
        strategy = kind()
        learn(strategy, stream, toy_model(stream, norm=True), epochs=25)
        found[type(strategy)] = accuracy(strategy, stream)
    assert found[LUCIR] > found[Finetune] + 0.2


def test_it_resumes_in_the_middle_of_a_task():
    assert_resumes(lucir, "class", norm=True)


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_it_is_refused_where_no_old_class_stands_beside_a_new_one(scenario):
    with pytest.raises(ConfigError, match=r"strategy: expected stream\.scenario=class"):
        lucir().check(Split(name="digits", num_tasks=5, scenario=scenario), MLP(widths=[8]))


def test_a_small_turn_of_the_features_survives_bf16():
    stream = toy_stream("class")
    strategy = lucir()
    at_task(strategy, stream, toy_model(stream), 1)
    strategy.new = strategy.new[:0]  # no margin
    before = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    now = (before + 0.02 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))).bfloat16()
    strategy.teacher_output = lambda output: Output(before, before, before)
    found = strategy.penalties(strategy.before_batch(stream.tasks[1].train), Output(now, now, now))["lucir"]
    exact = 1 - F.cosine_similarity(now.double(), before.double())
    assert found == pytest.approx(5.0 * exact.mean().item(), rel=1e-2)
