from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl_runner.errors import ConfigError
from cl_runner.models.prompts import Components, Experts, Pool, Prefix, orthonormal, vision_transformer
from cl_runner.models.substitute import call_with
from tests.vits import SIZE, toy_vit

KINDS = {
    "pool": lambda vit: Pool(vit, size=6, length=2, top=3),
    "experts": lambda vit: Experts(vit, 3, [0], [1, 2], general_length=3, expert_length=4),
    "components": lambda vit: Components(vit, 3, [0, 2], components=4, length=6),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def pictures(count=5):
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def entered(make, vit=None):
    """Prompts in the middle of their first task, large enough to have an effect, and their transformer."""
    torch.manual_seed(0)
    vit = vit or toy_vit()
    prompts = make(vit)
    prompts.begin(0)
    prompts.enter(vit)
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter += torch.randn_like(parameter)
    return prompts, vit


@every_kind
@pytest.mark.parametrize("pooling", ["token", "avg", "map"])
def test_off_they_change_nothing_and_on_they_do(make, pooling):
    settings = {"global_pool": pooling, "class_token": pooling == "token", "no_embed_class": True}
    vit = toy_vit(**settings)
    before = vit(pictures())
    prompts, vit = entered(make, vit)
    assert torch.equal(vit(pictures()), before)
    prompts.on = True
    assert vit(pictures()).shape == before.shape
    assert not torch.allclose(vit(pictures()), before, rtol=1e-3, atol=1e-5)
    prompts.on = False
    assert torch.equal(vit(pictures()), before)


@every_kind
def test_the_query_is_what_the_transformer_says_without_prompts(make):
    prompts, vit = entered(make)
    plain = vit(pictures()).detach()
    queries = []
    choose = prompts.choose
    prompts.choose = lambda query: (queries.append(query), choose(query))
    prompts.on = True
    vit(pictures())
    (query,) = queries
    assert torch.equal(query, plain)
    assert not query.requires_grad


@every_kind
def test_all_that_learns_gets_a_gradient(make):
    prompts, vit = entered(make)
    prompts.on = True
    loss = vit(pictures()).square().sum()
    (loss if prompts.loss is None else loss + prompts.loss).backward()
    assert all(parameter.grad.any() for parameter in prompts.parameters())


@every_kind
def test_a_copy_has_prompts_of_its_own(make):
    prompts, vit = entered(make)
    prompts.on = True
    copy = deepcopy(nn.ModuleDict({"vit": vit, "prompts": prompts}))
    before = copy["vit"](pictures())
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter.mul_(2.0).add_(1.0)
    assert torch.equal(copy["vit"](pictures()), before)
    copy["prompts"].on = False
    assert torch.equal(copy["vit"](pictures()), toy_vit()(pictures()))


@every_kind
def test_a_call_with_other_prompts_is_that_of_prompts_that_have_these_values(make):
    prompts, vit = entered(make)
    prompts.on = True
    both = nn.Sequential(vit)
    both.add_module("prompts", prompts)
    both.forward = lambda images: vit(images)
    instead = {name: value.detach() + 0.5 for name, value in both.named_parameters() if name.startswith("prompts.")}
    found = call_with(both, instead, pictures())
    both.load_state_dict(instead, strict=False)
    assert torch.equal(found, vit(pictures()))


def test_a_pass_that_fails_leaves_the_transformer_as_it_was():
    prompts, vit = entered(KINDS["pool"])
    prompts.on = True
    with pytest.raises(AssertionError):
        vit(torch.randn(1, 1, 7, 7))
    prompts.on = False
    assert torch.equal(vit(pictures()), toy_vit()(pictures()))


def test_a_pool_gives_each_image_the_prompts_whose_keys_are_nearest():
    prompts, _ = entered(KINDS["pool"])
    query = torch.randn(7, SIZE)
    prompts.choose(query)
    distances = torch.stack([1 - F.cosine_similarity(query, key[None]) for key in prompts.keys], 1)  # [B, M]
    for row, tokens in zip(distances, prompts._tokens, strict=True):
        nearest = sorted(range(6), key=lambda index: row[index].item())[:3]
        assert torch.equal(tokens, torch.cat([prompts.prompts[index] for index in nearest]))
    torch.testing.assert_close(prompts.loss, distances.sort(1).values[:, :3].sum(1).mean())


def test_a_pools_features_are_the_mean_of_what_becomes_of_its_tokens():
    prompts, vit = entered(KINDS["pool"])
    query = vit(pictures()).detach()
    prompts.choose(query)
    tokens, prompts._tokens = prompts._tokens, None
    embedded = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pictures()))))
    hidden = torch.cat([tokens, embedded], 1)
    for block in vit.blocks:
        hidden = block(hidden)
    expected = vit.norm(hidden)[:, :6].mean(1)
    prompts.on = True
    torch.testing.assert_close(vit(pictures()), expected)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_prefix_is_further_keys_and_values(batch):
    torch.manual_seed(0)
    attention = toy_vit().blocks[0].attn
    tokens, pair = torch.randn(5, 7, SIZE), torch.randn(batch, 2, 3, SIZE)
    heads = 2

    def apart(values):
        return values.expand(5, -1, -1).unflatten(2, (heads, -1)).transpose(1, 2)

    queries, keys, values = attention.qkv(tokens).chunk(3, 2)
    keys = torch.cat([apart(pair[:, 0]), apart(keys)], 2)
    values = torch.cat([apart(pair[:, 1]), apart(values)], 2)
    weights = (apart(queries) @ keys.mT / (SIZE / heads) ** 0.5).softmax(-1)
    expected = attention.proj((weights @ values).transpose(1, 2).flatten(2))
    plain = attention(tokens)
    prefix = Prefix()
    prefix.enter(attention)
    prefix.pair = pair
    torch.testing.assert_close(attention(tokens), expected)
    assert torch.equal(attention(tokens), plain)  # for one pass only


def test_in_training_the_current_expert_is_used_and_else_the_nearest_learned_one():
    prompts, _ = entered(KINDS["experts"])
    query = torch.randn(9, SIZE)
    prompts.choose(query)
    assert torch.equal(prompts.expert_prefixes[2].pair, prompts.expert[None, 1])
    torch.testing.assert_close(prompts.loss, (1 - F.cosine_similarity(query, prompts.key[None])).mean())
    prompts.keep(0)
    prompts.begin(1)
    prompts.keep(1)
    prompts.begin(2)
    with torch.no_grad():
        prompts.past_keys[2] = query[0]  # the nearest of all, but of a task not learned yet
    prompts.eval()
    prompts.choose(query)
    similarity = torch.stack([F.cosine_similarity(query, key[None]) for key in prompts.past_keys[:2]], 1)
    assert set(similarity.argmax(1).tolist()) == {0, 1}
    assert torch.equal(prompts.expert_prefixes[1].pair, prompts.past_experts[similarity.argmax(1), 0])
    assert torch.equal(prompts.general_prefixes[0].pair, prompts.general[None, 0])


def test_a_mixed_prompt_is_the_sum_of_all_components_by_the_cosine_of_attended_query_and_key():
    prompts, _ = entered(KINDS["components"])
    prompts.keep(0)
    prompts.begin(1)
    query = torch.randn(5, SIZE)
    prompts.choose(query)
    for number, block in enumerate([0, 2]):
        expected = torch.zeros(5, 2, 3, SIZE)
        for past in (False, True):
            bank = [
                getattr(prompts, ("past_" if past else "") + name)[number] for name in ("prompts", "keys", "attention")
            ]
            for prompt, key, attention in zip(*bank, strict=True):
                weight = F.cosine_similarity(query * attention, key[None])
                expected += weight[:, None, None, None] * prompt
        torch.testing.assert_close(prompts.prefixes[block].pair, expected)


def test_keeping_components_does_not_change_what_they_say():
    prompts, vit = entered(KINDS["components"])
    prompts.on = True
    before = vit(pictures())
    prompts.keep(0)
    torch.testing.assert_close(vit(pictures()), before)


def test_new_components_begin_orthonormal_to_each_other_and_orthogonal_to_earlier_ones():
    prompts, _ = entered(KINDS["components"])  # moved since: the earlier ones are anything
    prompts.keep(0)
    prompts.begin(1)
    for current, past in prompts.banks:
        for live, known in zip(current.flatten(2), past.flatten(2), strict=True):
            torch.testing.assert_close(live @ live.T, torch.eye(4), rtol=0, atol=1e-5)
            torch.testing.assert_close(live @ known[:4].T, torch.zeros(4, 4), rtol=0, atol=1e-4)
            assert known[:4].any(1).all()
    assert prompts.dependence() < 1e-6


def test_the_dependence_has_the_gradient_of_all_rows_together():
    prompts, _ = entered(KINDS["components"])
    prompts.keep(0)
    prompts.begin(1)
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    prompts.dependence().backward()
    total = 0.0
    lives = []
    for current, past in prompts.banks:
        live = current.detach().clone().requires_grad_()
        rows = torch.cat([past[:, :4].flatten(2), live.flatten(2)], 1)
        total = total + (rows @ rows.mT - torch.eye(8)).square().sum()
        lives.append((current, live))
    total.backward()
    for current, live in lives:
        torch.testing.assert_close(current.grad, live.grad, rtol=1e-4, atol=1e-4)


def test_orthonormal_rows_are_drawn_afresh():
    torch.manual_seed(0)
    known = torch.randn(3, 8)
    one, other = orthonormal(4, known), orthonormal(4, known)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(one @ known.T, torch.zeros(4, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(one @ one.T, torch.eye(4), rtol=0, atol=1e-5)


REFUSED = {
    "block": (lambda vit: Components(vit, 3, [0, 3], 2, 4), r"strategy\.blocks: expected .*0 to 2, got 3"),
    "general": (lambda vit: Experts(vit, 3, [-1], [1], 1, 1), r"strategy\.general_blocks: expected .*0 to 2, got -1"),
    "expert": (lambda vit: Experts(vit, 3, [0], [5], 1, 1), r"strategy\.expert_blocks: expected .*0 to 2, got 5"),
    "both": (lambda vit: Experts(vit, 3, [0, 1], [1, 2], 1, 1), r"strategy\.expert_blocks: expected .*, got 1"),
    "components": (lambda vit: Components(vit, 3, [0], 11, 4), r"strategy\.components: expected at most 10 .*, got 11"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_the_transformer_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make(toy_vit())


def test_only_plain_vision_transformers_are_taken():
    vit = toy_vit()
    assert vision_transformer(vit, "L2P") is vit
    with pytest.raises(ConfigError, match=r"strategy: expected a plain vision transformer of timm .* for L2P, got Seq"):
        vision_transformer(nn.Sequential(nn.Linear(2, 2)), "L2P")
    vit.blocks[1].attn = nn.Identity()
    with pytest.raises(ConfigError, match="plain vision transformer"):
        vision_transformer(vit, "L2P")
