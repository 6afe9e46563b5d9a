"""grpo.py against naive loops, plain forward passes and autograd; float64 where it must be exact."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import grpo
from rollout import Rollout

V = 23


@pytest.fixture(scope="module")
def model():
    """A real architecture (grouped-query attention, rotary positions), random, in float64."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = Qwen2ForCausalLM(config)
    for module in list(model.modules()):  # transformers' norm computes in float32 whatever comes in
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen2RMSNorm":
                setattr(module, name, torch.nn.RMSNorm(32, eps=config.rms_norm_eps))
    return model.double().eval()


def make_rollouts(seed=0, sizes=(3, 1, 6, 2, 5)):
    """Ragged groups: prompts of 1 to 9 tokens, responses of 1 to 7."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for group, n in enumerate(sizes):
        prompt = tuple(rng.integers(V, size=rng.integers(1, 10)).tolist())
        for _ in range(n):
            ids = tuple(rng.integers(V, size=rng.integers(1, 8)).tolist())
            logps = tuple((-3 + 0.3 * rng.standard_normal(len(ids))).tolist())
            rollouts.append(Rollout(group, prompt, ids, logps, ""))
    return [rollouts[i] for i in rng.permutation(len(rollouts))]


def naive_logprobs(model, rollout, temperature=1.0):
    """One row, one forward pass, nothing shared, nothing padded."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    logp = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
    return logp.gather(1, ids[0, 1:, None])[:, 0][len(rollout.prompt_ids) - 1 :]


# ---------------------------------------------------------------------------------- advantages


def naive_advantages(rewards, group, eps=1e-6, clip=5.0):
    out = []
    for r, g in zip(rewards, group, strict=True):
        own = [x for x, h in zip(rewards, group, strict=True) if h == g]
        if len(set(own)) == 1:
            out.append(0.0)
            continue
        mean = sum(own) / len(own)
        std = (sum((x - mean) ** 2 for x in own) / (len(own) - 1)) ** 0.5
        out.append(max(-clip, min(clip, (r - mean) / (std + eps))))
    return out


@pytest.mark.parametrize("kind", ["binary", "real"])
def test_group_advantages_against_a_loop(kind):
    """Catches: groups mixed up, biased std, a label order that matters, a clip that is not one."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        group = rng.integers(0, 6, size=60) * 7 - 3  # labels with gaps, negative, unsorted
        rewards = rng.integers(0, 2, size=60) * 1.0 if kind == "binary" else rng.normal(size=60)
        got = grpo.group_advantages(rewards, group)
        assert np.allclose(got, naive_advantages(rewards, group), atol=1e-12)


def test_equal_groups_give_trls_advantages():
    """Catches: another std, eps outside the denominator. TRL 1.16: rewards.view(-1, n), std of torch."""
    rewards = torch.rand(6, 8, dtype=torch.float64)
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    got = grpo.group_advantages(rewards.flatten().numpy(), np.repeat(np.arange(6), 8), eps=1e-4)
    assert np.allclose(got, want.flatten().numpy(), atol=1e-14)


def test_centred_and_leave_one_out_against_loops():
    """Catches: a division by the std that stayed, oneself among the others, group sizes mixed up."""
    rng = np.random.default_rng(2)
    group, rewards = rng.integers(0, 9, size=60), rng.normal(size=60)
    group[0] = 99  # alone: no others to compare with
    centred, others = np.zeros(60), np.zeros(60)
    for i in range(1, 60):
        own = [j for j in range(60) if group[j] == group[i]]
        centred[i] = rewards[i] - np.mean(rewards[own])
        others[i] = rewards[i] - np.mean([rewards[j] for j in own if j != i])
    assert np.allclose(grpo.group_advantages(rewards, group, kind="centred"), centred, atol=1e-14)
    assert np.allclose(grpo.group_advantages(rewards, group, kind="leave-one-out"), others, atol=1e-14)
    with pytest.raises(ValueError, match="must be scaled"):
        grpo.group_advantages(rewards, group, kind="centered")


@pytest.mark.parametrize("kind", ["scaled", "centred", "leave-one-out"])
def test_silent_and_single_groups_are_exactly_zero(kind):
    """Catches: rounding of the mean of 0.1, 0.1, 0.1 divided by eps, and 0/0 in a group of one."""
    rewards = np.array([0.1, 0.1, 0.1, 1.0, 0.0, 0.0, 0.7])
    group = np.array([0, 0, 0, 1, 2, 2, 3])
    assert (grpo.group_advantages(rewards, group, kind=kind) == 0).all()


def test_one_success_in_a_hundred_is_clipped():
    rewards = np.zeros(101)
    rewards[7] = 1
    advantages = grpo.group_advantages(rewards, np.zeros(101, int))
    assert advantages[7] == 5.0
    assert grpo.group_advantages(rewards, np.zeros(101, int), clip=100)[7] > 9


@pytest.mark.parametrize("rewards, group", [([1.0, np.nan], [0, 0]), ([1.0, 0.0], [0]), ([[1.0]], [[0]])])
def test_bad_advantage_input_is_refused(rewards, group):
    with pytest.raises(ValueError, match="must"):
        grpo.group_advantages(rewards, group)


# ------------------------------------------------------------------------------------ log-probs


@pytest.mark.parametrize("temperature, shared", [(1.0, True), (0.6, True), (0.6, False)])
def test_both_passes_give_the_plain_log_probs(model, temperature, shared):
    """Catches: off-by-one between logits and targets, wrong positions under left padding, a row that
    reads another group's prompt, padding that leaks."""
    rollouts = make_rollouts()
    with torch.no_grad():
        got = grpo.token_logprobs(model, rollouts, temperature, shared)
        want = torch.cat([naive_logprobs(model, r, temperature) for r in rollouts])
    assert got.shape == want.shape
    assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_flow_back_through_the_prompt(model, shared):
    """Catches: a detached cache, which would train the responses' half of attention only."""
    rollouts = make_rollouts(3)
    weights = torch.randn(sum(len(r.response_ids) for r in rollouts), dtype=torch.float64)
    names, params = zip(*model.named_parameters(), strict=True)
    logp = grpo.token_logprobs(model, rollouts, share_prompts=shared)
    got = torch.autograd.grad((logp * weights).sum(), params)
    plain = torch.cat([naive_logprobs(model, r) for r in rollouts])
    want = torch.autograd.grad((plain * weights).sum(), params)
    for name, a, b in zip(names, got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-10), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_of_the_vocabulary_change_nothing(temperature):
    """Catches: a chunk border that drops or doubles a token, a temperature that is in one pass only, a
    hand-written gradient that autograd does not confirm, of hidden states or head."""
    torch.manual_seed(0)
    hidden = torch.randn(50, 32, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (50,))
    head = torch.nn.Linear(32, V, bias=False, dtype=torch.float64)
    whole = grpo._logprobs_of(head, hidden, targets, temperature)
    cut = grpo._logprobs_of(head, hidden, targets, temperature, chunk_elements=7 * V)
    assert torch.allclose(whole, cut, atol=1e-13)
    weights = torch.randn(50, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad((x * weights).sum(), (hidden, head.weight)) for x in (whole, cut)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-13)
    single = copy.deepcopy(head).float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = grpo._logprobs_of(single, hidden.float(), targets, temperature, chunk_elements=7 * V)
    (gradient,) = torch.autograd.grad((rough * weights).sum(), single.weight)
    assert rough.dtype == gradient.dtype == torch.float32  # sums over chunks, whatever the products are
    assert torch.allclose(rough.double(), whole, atol=0.05) and not torch.allclose(rough.double(), whole)
    assert float((gradient.double() - b).norm() / b.norm()) < 0.02


def test_sharing_is_chosen_where_it_saves_tokens():
    """Catches: a shared pass for lone rollouts, or none where a long prompt is repeated."""

    def batch(n, P, T):
        return [Rollout(0, (1,) * P, (1,) * T, (0.0,) * T, "") for _ in range(n)]

    for n, P, T, wins in [(8, 45, 5, True), (1, 45, 5, False), (2, 10, 13, True), (8, 100, 1000, False)]:
        assert grpo.sharing_wins(batch(n, P, T), np.arange(n)) == wins


def test_bfloat16_products_over_float32_weights(model):
    """Catches: log-softmax in bfloat16 (two digits), gradients or weights that come out in bfloat16."""
    rollouts = make_rollouts(4)
    single = copy.deepcopy(model).float()
    params = list(single.parameters())
    for shared in (True, False):
        exact, rough = (grpo.token_logprobs(single, rollouts, 1.0, shared, b) for b in (False, True))
        assert rough.dtype == torch.float32
        assert 0 < float((exact - rough).detach().abs().max()) < 0.3
        flat = [
            torch.cat([g.flatten() for g in torch.autograd.grad(x.sum(), params)]) for x in (exact, rough)
        ]
        assert all(f.dtype == torch.float32 for f in flat)
        assert float(torch.cosine_similarity(*flat, dim=0)) > 0.995


def test_one_group_two_prompts_is_refused(model):
    a, b = Rollout(0, (1, 2), (3,), (0.0,), ""), Rollout(0, (1, 3), (3,), (0.0,), "")
    with pytest.raises(ValueError, match="share one prompt"):
        grpo.token_logprobs(model, [a, b])


# ----------------------------------------------------------------------------------------- loss


def naive_loss(logp, old, advantages, n_tokens, sampler, low, high, dual, max_is):
    total = 0.0
    for lp, o, a, s in zip(logp, old, advantages, sampler, strict=True):
        ratio = torch.exp(lp - o)
        clipped = min(max(ratio, ratio.new_tensor(1 - low)), ratio.new_tensor(1 + high))
        loss = max(-a * ratio, -a * clipped)
        if a < 0:
            loss = min(loss, -a * dual)
        total = total + min(float(torch.exp(o - s)), max_is) * loss
    return total / n_tokens


def test_clipped_loss_and_its_gradient_against_a_scalar_loop():
    """Catches: a clip on the wrong side, dual clip on positive advantages, an importance weight that
    is computed and never applied or that carries a gradient."""
    torch.manual_seed(0)
    n = 400
    logp = torch.randn(n, dtype=torch.float64, requires_grad=True)
    old = (logp + torch.randn(n) * 1.5).detach()
    sampler = old + torch.randn(n) * 0.7
    advantages = torch.randn(n, dtype=torch.float64) * 2
    loss, sums = grpo.clipped_loss(logp, old, advantages, 123.0, sampler, 0.2, 0.28, 3.0, 2.0)
    want = naive_loss(logp, old, advantages, 123.0, sampler, 0.2, 0.28, 3.0, 2.0)
    assert torch.allclose(loss, want, rtol=1e-12)
    got_grad, want_grad = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, want))
    assert torch.allclose(got_grad, want_grad, atol=1e-14)
    ratio = (logp - old).exp()
    assert sums["clipped_low"] == int(((advantages < 0) & (ratio < 0.8)).sum()) > 0
    assert sums["clipped_high"] == int(((advantages > 0) & (ratio > 1.28)).sum()) > 0


def test_kl_to_a_reference_against_a_scalar_loop():
    """Catches: the ratio upside down (k3 of the other direction), a KL cut off from the gradient, a KL
    that is weighted by the importance of the sampler."""
    torch.manual_seed(1)
    logp = torch.randn(50, dtype=torch.float64, requires_grad=True)
    old, sampler, reference = ((logp + torch.randn(50)).detach() for _ in range(3))
    advantages, weight = torch.randn(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    settings = dict(sampler_logp=sampler, token_weight=weight)
    plain, _ = grpo.clipped_loss(logp, old, advantages, 7.0, **settings)
    loss, sums = grpo.clipped_loss(
        logp, old, advantages, 7.0, **settings, reference_logp=reference, kl_coef=0.3
    )
    kl = 0.0
    for lp, ref, w in zip(logp, reference, weight, strict=True):  # Schulman's k3, GRPO's eq. 4
        kl = kl + w * (torch.exp(ref) / torch.exp(lp) - torch.log(torch.exp(ref) / torch.exp(lp)) - 1)
    want = plain + 0.3 * kl / 7.0
    assert torch.allclose(loss, want, rtol=1e-12)
    got_grad, want_grad = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, want))
    assert torch.allclose(got_grad, want_grad, atol=1e-13)
    assert sums["kl_reference"] >= 0


# --------------------------------------------------------------------------------------- update


def step_taken(model, rollouts, advantages, **settings):
    """What one call of `update` subtracts from the weights at lr 1 without clipping: the gradient."""
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD(copied.parameters(), lr=1.0)
    stats = grpo.update(copied, optimizer, rollouts, advantages, max_grad_norm=1e9, **settings)
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    return [(a - b).detach() for a, b in pairs], stats


def example(seed=5, **settings):
    rollouts = make_rollouts(seed, **settings)
    rewards = np.random.default_rng(seed).integers(0, 2, size=len(rollouts))
    group = np.array([r.group for r in rollouts])
    rewards[group == 2] = 1  # the largest group is silent
    return rollouts, grpo.group_advantages(rewards, group)


def test_update_is_the_plain_gradient_over_all_rollouts(model):
    """Catches: a denominator that forgets silent rollouts, or counts rows or microbatches, not tokens."""
    rollouts, advantages = example()
    total = sum(len(r.response_ids) for r in rollouts)
    loss = 0.0
    for r, a in zip(rollouts, advantages, strict=True):  # every rollout, the silent ones too
        logp = naive_logprobs(model, r)
        weight = (logp.detach() - torch.tensor(r.logprobs)).exp().clamp(max=2.0)
        loss = loss - (weight * a * (logp - logp.detach()).exp()).sum() / total
    want = torch.autograd.grad(loss, list(model.parameters()))
    got, stats = step_taken(model, rollouts, advantages)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-7)  # logprobs and advantages travel as float32
    assert stats["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    silent = sum(len(r.response_ids) for r, a in zip(rollouts, advantages, strict=True) if a == 0)
    assert stats["skipped_tokens"] == pytest.approx(silent / total) and silent > 0


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("precision, bound", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("normalizer", ["token", "sequence", 9])
def test_microbatches_change_nothing(model, minibatches, precision, bound, normalizer, monkeypatch):
    """Catches: a mean that depends on how the batch was cut: 1 row at a time, 8 or all."""
    rollouts, advantages = example(sizes=(9, 12, 6, 2, 5, 20))
    model = copy.deepcopy(model).to(precision)
    gradients = {}

    class Recorder(torch.optim.SGD):  # keeps the gradients and moves nothing
        def step(self):
            gradients[size].append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    for size in (len(rollouts), 8, 1):
        cut = lambda _, rows, *__: (rows[i : i + size].tolist() for i in range(0, len(rows), size))  # noqa: B023, E731
        monkeypatch.setattr(grpo, "microbatches", cut)
        gradients[size] = []
        settings = dict(minibatches=minibatches, normalizer=normalizer)
        grpo.update(model, Recorder(model.parameters()), rollouts, advantages, **settings)
    whole = torch.stack(gradients.pop(len(rollouts)))
    assert len(whole) == minibatches and float(whole.norm()) > 0.1
    assert 0 < float((whole - torch.stack(gradients[8])).abs().max())  # 8 is a cut, not all
    for cut in gradients.values():
        assert float((whole - torch.stack(cut)).abs().max()) < bound


@pytest.mark.parametrize("normalizer", ["sequence", 9])
def test_other_normalizers_against_their_formulas(model, normalizer):
    """Catches: a sequence mean over the wrong rows (silent ones count), a constant that is not one."""
    rollouts, advantages = example()
    loss = 0.0
    for r, a in zip(rollouts, advantages, strict=True):
        logp = naive_logprobs(model, r)
        weight = (logp.detach() - torch.tensor(r.logprobs)).exp().clamp(max=2.0)
        T = len(r.response_ids) if normalizer == "sequence" else 9
        loss = loss - (weight * a * (logp - logp.detach()).exp()).sum() / T / len(rollouts)
    want = torch.autograd.grad(loss, list(model.parameters()))
    got, stats = step_taken(model, rollouts, advantages, normalizer=normalizer)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert stats["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)


def test_with_a_reference_silent_rollouts_are_computed(model):
    """Catches: a KL over the mixed groups only, a reference that is trained or is the policy itself."""
    rollouts, advantages = example()
    torch.manual_seed(3)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.05 * torch.randn_like(p)
    total = sum(len(r.response_ids) for r in rollouts)
    want, _ = step_taken(model, rollouts, advantages)
    kl = 0.0
    for r in rollouts:
        log_r = naive_logprobs(reference, r).detach() - naive_logprobs(model, r)
        kl = kl + 0.5 * (log_r.exp() - 1 - log_r).sum() / total
    kl_gradient = torch.autograd.grad(kl, list(model.parameters()))
    got, stats = step_taken(model, rollouts, advantages, reference=reference, kl_coef=0.5)
    for a, b, c in zip(got, want, kl_gradient, strict=True):
        assert torch.allclose(a, b + c, atol=1e-6)
    assert stats["skipped_tokens"] == 0
    assert stats["kl_reference"] == pytest.approx(float(kl.detach()) / 0.5, rel=1e-5)
    with pytest.raises(ValueError, match="go together"):
        grpo.update(model, None, rollouts, advantages, reference=reference)


def test_checkpointing_computes_twice_and_changes_nothing(model):
    """Catches: a flag that does nothing, and one that leaves the model in training mode."""
    rollouts, advantages = example()
    plain, _ = step_taken(model, rollouts, advantages)
    copied, calls = copy.deepcopy(model), []
    copied.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(copied.parameters(), lr=1.0)
    grpo.update(copied, optimizer, rollouts, advantages, max_grad_norm=1e9, checkpointing=True)
    assert len(calls) == 2
    for a, b, c in zip(model.parameters(), copied.parameters(), plain, strict=True):
        assert torch.allclose(a - b, c, atol=1e-10)
    assert not any(m.training for m in copied.modules()) and not copied.is_gradient_checkpointing


def test_several_minibatches_are_steps_on_one_old_policy(model):
    """Catches: old log-probs recomputed after the first step, a denominator of the wrong size, a rollout
    lost or doubled where minibatches are cut. One naive loop over minibatches as `update` deals them."""
    rollouts, advantages = example(8)
    live = [i for i in range(len(rollouts)) if advantages[i] != 0]
    total = sum(len(r.response_ids) for r in rollouts)
    seen = []
    real = grpo.microbatches

    def spy(records, rows, *settings):
        for batch in real(records, rows, *settings):
            seen.append(batch)
            yield batch

    lr, k = 0.3, 2
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr)
    grpo.microbatches = spy
    try:
        stats = grpo.update(
            trained, optimizer, rollouts, advantages, minibatches=k, max_grad_norm=1e9, seed=1
        )
    finally:
        grpo.microbatches = real
    dealt = seen[-k:]  # the training passes; before them ran the old policy's
    assert sorted(i for batch in dealt for i in batch) == live
    assert stats["clip_low"] + stats["clip_high"] > 0  # the second minibatch is off the old policy

    naive = copy.deepcopy(model)
    old = {i: naive_logprobs(model, rollouts[i]).detach() for i in live}
    for batch in dealt:
        loss = 0.0
        for i in batch:
            sampler = torch.tensor(rollouts[i].logprobs)
            logp, a = naive_logprobs(naive, rollouts[i]), advantages[i]
            loss = loss + naive_loss(logp, old[i], [a] * len(logp), total / k, sampler, 0.2, 0.28, 10.0, 2.0)
        gradients = torch.autograd.grad(loss, list(naive.parameters()))
        with torch.no_grad():
            for p, g in zip(naive.parameters(), gradients, strict=True):
                p -= lr * g
    for a, b in zip(trained.parameters(), naive.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def tokens_run(rollouts, batch, shared):
    """Tokens a pass over these rows computes, padding included."""
    lengths = [len(rollouts[i].response_ids) for i in batch]
    P = [len(rollouts[i].prompt_ids) for i in batch]
    if not shared:
        return len(batch) * max(p + t for p, t in zip(P, lengths, strict=True))
    slices = list(grpo._slices(lengths))
    assert sorted(i for part in slices for i in part) == list(range(len(batch)))
    groups = {rollouts[i].group for i in batch}
    return len(groups) * max(P) + sum(len(part) * lengths[part[0]] for part in slices)


@pytest.mark.parametrize("shared", [True, False])
def test_microbatches_cover_every_row_once_within_the_limit(shared):
    """Catches: a row lost where a group is cut, a budget that counts too little and runs out of memory."""
    rollouts = make_rollouts(9, sizes=(40, 1, 3, 17))
    rows = np.arange(1, len(rollouts))
    cut = list(grpo.microbatches(rollouts, rows, 64, shared))
    assert sorted(i for batch in cut for i in batch) == rows.tolist()
    for batch in cut:
        P = max(len(rollouts[i].prompt_ids) for i in batch)
        tokens = len({rollouts[i].group for i in batch}) * P + sum(
            len(rollouts[i].response_ids) for i in batch
        )
        assert (tokens if shared else tokens_run(rollouts, batch, False)) <= 64


def drawn_lengths(rng):
    """Log-normal, as on MATH: prompts around 70 tokens, responses around 300, cut at 1024, a problem's own
    difficulty in all its responses; counts as a knapsack deals them, 2 to 64."""
    for n in 2 + (62 * rng.random(64) ** 4).astype(int):
        typical = 300 * rng.lognormal(0, 0.4)
        lengths = [int(np.clip(typical * rng.lognormal(0, 0.4), 1, 1024)) for _ in range(n)]
        yield int(70 * rng.lognormal(0, 0.6)), lengths


def recorded_lengths(rng):
    """SmolLM2's own on GSM8K (tutorial/scale_out/record_lengths.py): 48 prompts x 6, a limit of 512."""
    path = Path(__file__).parent.parent / "tutorial" / "scale_out" / "lengths_smollm2_gsm8k.json"
    for prompt in json.loads(path.read_text())["prompts"]:
        yield prompt["prompt_tokens"], prompt["lengths"]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lengths_of", [drawn_lengths, recorded_lengths])
def test_padding_stays_under_five_percent(shared, lengths_of):
    """Catches: a group's short rollouts padded to its longest; prompts of 40 and 400 tokens side by side."""
    rollouts = [
        Rollout(group, (1,) * P, (1,) * T, (), "")
        for group, (P, lengths) in enumerate(lengths_of(np.random.default_rng(0)))
        for T in lengths
    ]
    run = real = 0
    for batch in grpo.microbatches(rollouts, np.arange(len(rollouts)), 16384, shared):
        run += tokens_run(rollouts, batch, shared)
        prompts = [rollouts[i].prompt_ids for i in batch]
        if shared:
            prompts = {rollouts[i].group: rollouts[i].prompt_ids for i in batch}.values()
        real += sum(map(len, prompts)) + sum(len(rollouts[i].response_ids) for i in batch)
    print(f"{lengths_of.__name__}, {'shared' if shared else 'plain'}: padding {1 - real / run:.1%}")
    assert len(rollouts) > 250 and 0 < 1 - real / run < 0.05


def test_all_silent_takes_no_step(model):
    rollouts, advantages = example()
    moved, stats = step_taken(model, rollouts, np.zeros_like(advantages))
    assert all(bool((m == 0).all()) for m in moved)
    assert stats["loss"] is None and stats["skipped_tokens"] == 1


def test_not_finite_three_times_in_a_row_stops(model):
    """Catches: NaN written into the weights, a run that goes on with them, a count that starts again
    with every call or every resumed run."""
    rollouts, advantages = example()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    before = copy.deepcopy(broken.state_dict())
    optimizer = torch.optim.SGD(broken.parameters(), lr=1.0)
    stats = grpo.update(broken, optimizer, rollouts, advantages, minibatches=2)
    assert stats["steps_skipped"] == 2 and stats["loss"] is None
    resumed = torch.optim.SGD(broken.parameters(), lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match="three steps in a row"):
        grpo.update(broken, resumed, rollouts, advantages, minibatches=2)
    for name, value in broken.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_one_step_that_is_not_finite_is_left_out(model):
    """Catches: a skipped step in the means of the stats, a count that a good step does not end, an
    infinite gradient behind a finite loss that is clipped to NaN and applied."""
    rollouts, advantages = example()
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    huge = advantages.copy()
    huge[np.flatnonzero(advantages)[0]] = np.inf
    for _ in range(4):
        stats = grpo.update(trained, optimizer, rollouts, huge, minibatches=2)
        assert stats["steps_skipped"] == 1
        assert all(np.isfinite(v) for v in stats.values())
        grpo.update(trained, optimizer, rollouts, advantages)
    before = copy.deepcopy(trained.state_dict())
    trained.lm_head.weight.register_hook(lambda g: g * torch.inf)
    stats = grpo.update(trained, optimizer, rollouts, advantages)
    assert stats["steps_skipped"] == 1 and stats["grad_norm"] is None
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_bfloat16_weights_are_refused(model):
    """Catches: steps of 1e-6 that vanish when they are added to bfloat16 weights."""
    rollouts, advantages = example()
    with pytest.raises(ValueError, match="float32"):
        grpo.update(copy.deepcopy(model).bfloat16(), None, rollouts, advantages)


def test_update_raises_what_was_rewarded(model):
    """The whole of it on one two-armed prompt: the rewarded token's probability must grow."""
    good, bad = Rollout(0, (1, 2), (5,), (-2.0,), ""), Rollout(0, (1, 2), (6,), (-2.0,), "")
    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    before = naive_logprobs(trained, good).item()
    for _ in range(5):
        grpo.update(trained, optimizer, [good, bad], np.array([0.7, -0.7]))
    assert naive_logprobs(trained, good).item() > before + 0.1
