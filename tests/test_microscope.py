"""tutorial/microscope.py: each part against an oracle, and the recorded rows."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tutorial"))
import microscope

import grpo
import knapsack
import rollout


@pytest.mark.parametrize("budget", [512, 203])
def test_rules_spend_the_budget(budget):
    """Catches: a rollout too many; a problem chosen twice; a group larger than the answers that there are."""
    p = np.random.default_rng(0).beta(0.3, 0.8, 1024)
    for name, rule in (microscope.RULES | microscope.FEW).items():
        if rule:
            chosen, counts = rule(p, budget, np.random.default_rng(1))
            assert len(chosen) == len(set(chosen)) == len(counts), name
            assert counts.sum() == budget or (name.startswith("choice") and counts.sum() == budget - 1)
            assert counts.max() <= microscope.ANSWERS - microscope.TOLD


def test_a_choice_is_the_exact_knapsack():
    """Against dynamic programming over 0, 2, 3, ... rollouts. Catches: a first rollout bought alone; a weight
    that is not InfoGain's."""
    p = np.random.default_rng(2).beta(0.7, 0.7, 12)
    for weight in (knapsack.info_gain, np.ones_like):
        chosen, counts = microscope.choose(10**6, weight)(p, 30, np.random.default_rng(0))
        n = np.array([0, *range(2, 31)])
        values = weight(p)[:, None] * knapsack.prob_nonzero_gradient(n, p[:, None])
        best = knapsack.solve_dp(values, 30, np.broadcast_to(n, values.shape))
        total = sum(
            weight(p[i]) * knapsack.prob_nonzero_gradient(k, p[i])
            for i, k in zip(chosen, counts, strict=True)
        )
        assert total == pytest.approx(values[np.arange(12), best].sum(), rel=1e-2)
        if counts.sum() == 30:  # nothing is left over
            assert total == pytest.approx(values[np.arange(12), best].sum(), rel=1e-12)


def test_the_most_uncertain():
    """Catches: a sort the wrong way round; the same ones of many equals every time."""
    p = np.array([0.0, 0.5, 0.9, 0.45, 1.0])
    chosen, counts = microscope.uncertain(2)(p, 8, np.random.default_rng(0))
    assert set(chosen) == {1, 3} and list(counts) == [4, 4]
    picks = {tuple(microscope.uncertain(1)(np.ones(9), 4, np.random.default_rng(s))[0]) for s in range(20)}
    assert len(picks) > 4


def test_advantages_weigh_prompts_or_tokens():
    """Catches: a mean over prompts in which large groups still weigh more."""
    rewards, group = np.array([1.0, 0, 1, 0, 0, 0, 0, 1]), np.array([0, 0, 1, 1, 1, 1, 1, 1])
    for kind in ("scaled", "centred"):
        plain = microscope.advantages(rewards, group, kind, "tokens")
        assert np.array_equal(plain, grpo.group_advantages(rewards, group, kind=kind))
        each = microscope.advantages(rewards, group, kind, "each prompt")
        # A prompt's sum over its rollouts becomes its mean, times the mean size of a group.
        for g, n in ((0, 2), (1, 6)):
            assert np.allclose(each[group == g], plain[group == g] / n * 4)


def test_numbers_of_made_up_gradients():
    """Signal and noise known. Catches: noise taken for signal in the mean; an error off by a factor."""
    rng, found, mean = np.random.default_rng(0), [], np.zeros(50)
    mean[:2] = 0.8, 0.6  # at a cosine of .8 with the truth, which is the first axis
    for _ in range(200):
        grads = mean + rng.normal(0, 0.2, (40, 50))
        many = np.append(grads[:, 0], 0.8 + rng.normal(0, 0.2, 360))
        found.append(microscope.numbers(many, grads[:, 0], (grads**2).sum(1), grads.sum(0)))
    got = {k: np.mean([f[k] for f in found]) for k in found[0]}
    squared = 1 + 50 * 0.04
    assert got["cosine"] == pytest.approx(0.8 / squared**0.5, rel=0.02)
    assert got["direction"] == pytest.approx(0.8, rel=0.02) and got["signal"] == pytest.approx(0.5, rel=0.05)
    assert got["length"] == pytest.approx(squared**0.5, rel=0.02)
    assert got["se"] == pytest.approx(np.std([f["cosine"] for f in found]), rel=0.25)
    noise = rng.normal(0, 1, (40, 50))
    assert microscope.numbers(noise[:, 0], noise[:, 0], (noise**2).sum(1), noise.sum(0))["direction"] is None


def test_slopes_add_up_to_the_gradient():
    """Catches: weights that are not put back; a step so small that only rounding is left."""
    model, tokenizer = rollout.load_model(rollout.resolve_model("tiny"))
    prompts = rollout.encode_prompts(tokenizer, ["3+5=", "9+9+1="])
    drawn = rollout.HFSampler(model, tokenizer, 12).sample(prompts, [3, 2], seed=0)
    A, tokens = np.array([0.5, -1.0, 0.3, 2.0, -0.7]), sum(len(r.response_ids) for r in drawn)
    grad = microscope.gradient(model, drawn, A)
    before = [p.detach().clone() for p in model.parameters()]
    way = np.where(np.arange(len(grad)) % 3 == 0, 0, grad)
    found = A @ microscope.slopes(model, drawn, way) / tokens
    assert found == pytest.approx(grad @ way / np.linalg.norm(way), rel=1e-2)
    assert all(torch.allclose(p, old, atol=1e-6) for p, old in zip(model.parameters(), before, strict=True))


def test_gradients():
    """Against autograd on each rollout alone. Catches: silent rollouts in the gradient and not in the mean;
    a truth whose parts are sums and not parts of a mean."""
    model, tokenizer = rollout.load_model(rollout.resolve_model("tiny"))
    prompts = rollout.encode_prompts(tokenizer, ["3+5=", "9+9+1="])
    drawn = rollout.HFSampler(model, tokenizer, 12).sample(prompts, [3, 2], seed=0)
    A = np.array([0.5, -1.0, 0.0, 2.0, 0.0])
    model.zero_grad(set_to_none=True)
    tokens = sum(len(r.response_ids) for r in drawn)
    for r, a in zip(drawn, A, strict=True):
        (a * grpo.token_logprobs(model, [r]).sum() / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()
    assert np.allclose(microscope.gradient(model, drawn, A), expected, atol=1e-6)
    # The truth: of 40 problems with two answers each, one right.
    pool = [[replace(drawn[0], group=0), replace(drawn[1], group=0)] for _ in range(40)]
    right = np.tile([1.0, 0.0], (40, 1))
    (one,) = microscope.true_gradient(model, pool[:1], right[:1])
    assert np.allclose(sum(microscope.true_gradient(model, pool, right)), one, atol=1e-5)
    # Who holds it: all alike, or one problem alone.
    assert microscope.tail([0.3] * 200) == pytest.approx(0.01)
    assert microscope.tail([2.0, *[0.0] * 198, 6.0]) == 1 and microscope.tail([3, *[1] * 199]) == 4 / 202


def test_recorded_rows():
    """Catches: a model with rows missing; a table that leaves a rule out."""
    rows = microscope.load()
    assert rows
    for bed, budget, steps in {(r["bed"], r["budget"], r["steps"]) for r in rows}:
        own = [r for r in rows if (r["bed"], r["budget"], r["steps"]) == (bed, budget, steps)]
        keys = {(r["rule"], r["kind"], r["mean_of"]) for r in own}
        rules = {k for k, r in (microscope.RULES | (microscope.FEW if budget != 512 else {})).items() if r}
        losses = {(name, *loss) for name in ("uniform", "knapsack") for loss in microscope.LOSSES}
        assert keys == {(name, "scaled", "tokens") for name in rules} | losses and len(keys) == len(own)
        assert all(abs(r["cosine"]) <= 1 and 0 < r["se"] < 0.1 for r in own)
    lines = microscope.table().splitlines()
    assert all(sum(line.startswith(f"| {name} |") for line in lines) == 1 for name in microscope.RULES)
