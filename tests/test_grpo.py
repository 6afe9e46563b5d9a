"""grpo.py against naive loops, plain forward passes and autograd; float64 where it must be exact."""

import copy
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
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
    for eps in (1e-6, 1e-4) * 25:
        group = rng.integers(0, 6, size=60) * 7 - 3  # labels with gaps, negative, unsorted
        rewards = rng.integers(0, 2, size=60) * 1.0 if kind == "binary" else rng.normal(size=60)
        got = grpo.group_advantages(rewards, group, eps=eps)
        assert np.allclose(got, naive_advantages(rewards, group, eps), atol=1e-12)


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


@pytest.mark.parametrize("sign", [1, -1])
def test_one_success_or_failure_in_a_hundred_is_clipped(sign):
    rewards = np.zeros(101)
    rewards[7] = sign
    advantages = grpo.group_advantages(rewards, np.zeros(101, int))
    assert advantages[7] == 5.0 * sign
    assert sign * grpo.group_advantages(rewards, np.zeros(101, int), clip=100)[7] > 9


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


def test_a_model_with_its_own_checkpointing_in_training_mode(model):
    """Catches: a cache that is not there. (The model has no dropout.)"""
    other = copy.deepcopy(model).train()
    other.gradient_checkpointing_enable()
    rollouts = make_rollouts()
    want = torch.cat([naive_logprobs(model, r) for r in rollouts])
    assert torch.allclose(grpo.token_logprobs(other, rollouts), want, atol=1e-12)


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
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [7 * V, 1000 * V])
def test_the_head_against_autograd(temperature, bias, chunk):
    """Catches: a chunk border that drops or doubles a token, a temperature that is in one pass only, a
    hand-written gradient that autograd does not confirm, of hidden states, head or bias (Phi-2, GPT-J)."""
    torch.manual_seed(0)
    hidden = torch.randn(50, 32, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(V, (50,)), torch.randn(50, dtype=torch.float64)
    head = torch.nn.Linear(32, V, bias=bias, dtype=torch.float64)
    inputs = [hidden, *head.parameters()]
    want = (head(hidden) / temperature).log_softmax(1)[torch.arange(50), targets]
    got = grpo._head(head, hidden, targets, temperature, chunk)
    assert torch.allclose(got, want, atol=1e-13)
    exact, ours = (torch.autograd.grad((x * weights).sum(), inputs) for x in (want, got))
    for a, b in zip(exact, ours, strict=True):
        assert torch.allclose(a, b, atol=1e-13)

    single = copy.deepcopy(head).float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = grpo._head(single, hidden.float(), targets, temperature, chunk)
    gradients = torch.autograd.grad((rough * weights).sum(), list(single.parameters()))
    assert rough.dtype == torch.float32  # sums over chunks, whatever the products are
    assert torch.allclose(rough.double(), want, atol=0.05) and not torch.allclose(rough.double(), want)
    for a, b in zip(gradients, exact[1:], strict=True):
        assert a.dtype == torch.float32 and float((a.double() - b).norm() / b.norm()) < 0.02


def test_sharing_is_chosen_where_it_saves_tokens():
    """Catches: a shared pass for lone rollouts, or none where a long prompt is repeated."""

    def batch(n, P, T):
        return [Rollout(0, (1,) * P, (1,) * T, (0.0,) * T, "") for _ in range(n)]

    for n, P, T, wins in [(8, 45, 5, True), (1, 45, 5, False), (2, 10, 13, True), (8, 100, 1000, False)]:
        assert grpo.sharing_wins(batch(n, P, T), np.arange(n)) == wins
        # A fifth of the tokens saved is too little for a GPU.
        assert grpo.sharing_wins(batch(n, P, T), np.arange(n), gpu=True) == (wins and n == 8)


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


def test_one_group_two_prompts(model):
    """Catches: a prompt looked up by its group, where the group's rollouts do not share one."""
    rollouts = [Rollout(0, (1, 2), (3, 4), (), ""), Rollout(0, (1, 3, 5), (3,), (), "")]
    want = torch.cat([naive_logprobs(model, r) for r in rollouts])
    assert torch.allclose(grpo.token_logprobs(model, rollouts), want, atol=1e-12)


# ------------------------------------------------------------------------------- model families

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)  # fmt: skip
OLD = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
           bos_token_id=1, eos_token_id=2)  # fmt: skip
ONE_STATE = dict(mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
TWO_LAYERS = dict(layer_types=["linear_attention", "full_attention"], head_dim=8, linear_num_key_heads=2,
                  linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)  # fmt: skip


def family(name, config=None, base=SMALL, **settings):
    """A tiny random model of that family."""
    torch.manual_seed(0)
    classes = [
        n for n in (f"{name}ForCausalLM", f"{name}ForConditionalGeneration") if hasattr(transformers, n)
    ]
    settings = getattr(transformers, config or f"{name}Config")(**base, **settings)
    return getattr(transformers, classes[0])(settings).eval()


@pytest.mark.parametrize(
    "name, settings",
    [
        ("Qwen2", {}),
        ("Qwen3", dict(head_dim=8)),
        ("Llama", {}),
        ("Phi3", {}),
        ("Mistral", dict(sliding_window=4)),  # shorter than the prompts
        ("Phi", {}),  # its head has a bias
        ("GPTJ", dict(base=OLD, rotary_dim=4)),
        ("CodeGen", dict(base=OLD, rotary_dim=4)),
        ("Bloom", dict(base=OLD)),  # takes its positions from the mask
    ],
)
def test_families_that_are_attention(name, settings):
    """Catches: a family whose prompts are shared wrongly or no longer."""
    other = family(name, **settings)
    assert grpo.check_logprobs(other, 0.7) < 1e-5 and grpo._CHECKED[other]
    rollouts = make_rollouts(2)
    want = torch.cat([naive_logprobs(other, r) for r in rollouts])
    assert torch.allclose(grpo.token_logprobs(other, rollouts), want, atol=2e-5)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("Qwen3_5", dict(config="Qwen3_5TextConfig", **TWO_LAYERS)),
        ("Lfm2", dict(layer_types=["conv", "full_attention"])),
        ("FalconH1", dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, **ONE_STATE)),
        ("Bamba", dict(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, **ONE_STATE)),
        ("Mamba", dict(state_size=8)),
    ],
)
def test_families_with_a_state(name, settings):
    """Catches: a convolution's or a recurrence's state taken for keys and values (AttributeError, or half a
    prompt), in log-probs and in a whole update: the plain pass is taken by itself, and is exact."""
    other = family(name, **settings)
    rollouts, advantages = example()
    with torch.no_grad():
        want = torch.cat([naive_logprobs(other, r) for r in rollouts])
        assert torch.allclose(grpo.token_logprobs(other, rollouts), want, atol=2e-5)
    assert not grpo._CHECKED[other]
    moved, _ = step_taken(other, rollouts, advantages)
    loss, total = 0.0, sum(len(r.response_ids) for r in rollouts)
    for r, a in zip(rollouts, advantages, strict=True):
        logp = naive_logprobs(other, r)
        weight = (logp.detach() - torch.tensor(r.logprobs)).exp().clamp(max=2.0)
        loss = loss - (weight * a * (logp - logp.detach()).exp()).sum() / total
    want = torch.autograd.grad(loss, list(other.parameters()), allow_unused=True)
    for a, b in zip(moved, want, strict=True):
        assert torch.allclose(a, torch.zeros(()) if b is None else b, atol=1e-4)


GEMMA4 = dict(layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=97,
              hidden_size_per_layer_input=8, head_dim=8, global_head_dim=8,
              final_logit_softcapping=3.0)  # fmt: skip
OPT = dict(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
           word_embed_proj_dim=32, init_std=0.3, dropout=0.5, attention_dropout=0.5)  # fmt: skip


@pytest.mark.parametrize(
    "name, settings, why",
    [
        ("Gemma2", dict(head_dim=8, final_logit_softcapping=3.0), "nats off"),
        ("Gemma4", dict(config="Gemma4TextConfig", **GEMMA4), "nats off"),
        ("Granite", dict(logits_scaling=4.0), "nats off"),
        ("Cohere", dict(logit_scale=0.25), "nats off"),
        ("FalconH1", dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, lm_head_multiplier=0.5,
                          **ONE_STATE), "nats off"),
        ("RecurrentGemma", dict(logits_soft_cap=3.0, lru_width=32), "nats off"),
        ("Llama4", dict(config="Llama4TextConfig", head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
                        num_experts_per_tok=1), "get_decoder"),
        ("ModernBertDecoder", {}, "get_decoder"),
    ],
)  # fmt: skip
def test_families_that_are_refused(name, settings, why):
    """Catches: logits capped or scaled behind the head (in a nested configuration too), under whatever name;
    a decoder that is not one; a refusal on the first call only."""
    other = family(name, **settings)
    rollouts, advantages = example()
    for _ in range(2):
        with pytest.raises(ValueError, match=why) as error:
            grpo.token_logprobs(other, rollouts)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=why):
        grpo.update(other, None, rollouts, advantages, temperature=20)


def test_the_check_leaves_no_trace(model, monkeypatch):
    """Catches: random numbers drawn, a gradient, a mode switched, a dropout awake in the comparison; a check
    that was interrupted and counts."""
    other = family("OPT", base=OPT)
    other.train()
    other.model.decoder.layers[0].eval()
    modes, state = [m.training for m in other.modules()], torch.get_rng_state()
    assert 0 < grpo.check_logprobs(other, 0.7) < 1e-5
    assert 0 < grpo.check_logprobs(other, 1e6) < 1e-5  # not measured in 1e6ths
    assert modes == [m.training for m in other.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in other.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "_shared_pass", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            grpo.check_logprobs(other)
    assert other not in grpo._CHECKED and modes == [m.training for m in other.modules()]
    broken = copy.deepcopy(model)
    broken.model.norm.register_forward_hook(lambda *_: _[2] + (_[1][0].shape[0] > 1))
    with pytest.raises(ValueError, match="nats off"):  # a batch is not what its rows are
        grpo.check_logprobs(broken)


# ----------------------------------------------------------------------------------------- loss


def naive_loss(logp, old, advantages, n_tokens, sampler, low, high, dual, max_is):
    total = 0.0
    for lp, o, a, s in zip(logp, old, advantages, sampler, strict=True):
        ratio = torch.exp(lp - o)
        clipped = min(max(ratio, ratio.new_tensor(1 - low)), ratio.new_tensor(1 + high))
        loss = max(-a * ratio, -a * clipped)
        if a < 0:
            loss = min(loss, -a * dual)
        total = total + min(float((o - s).detach().exp()), max_is) * loss
    return total / n_tokens


def test_clipped_loss_and_its_gradient_against_a_scalar_loop():
    """Catches: a clip on the wrong side, dual clip on positive advantages, an importance weight that
    is computed and never applied or that carries a gradient."""
    torch.manual_seed(0)
    n = 400
    logp = torch.randn(n, dtype=torch.float64, requires_grad=True)
    old = (logp + torch.randn(n) * 1.5).detach()
    sampler = old + torch.randn(n) * 0.7
    old.requires_grad_()  # as if its pass had kept its graph
    advantages = torch.randn(n, dtype=torch.float64) * 2
    loss, sums = grpo.clipped_loss(logp, old, advantages, 123.0, sampler, 0.2, 0.28, 3.0, 2.0)
    want = naive_loss(logp, old, advantages, 123.0, sampler, 0.2, 0.28, 3.0, 2.0)
    assert torch.allclose(loss, want, rtol=1e-12)
    got_grad, want_grad = (torch.autograd.grad(x, (logp, old), retain_graph=True) for x in (loss, want))
    for a, b in zip(got_grad, want_grad, strict=True):
        assert torch.allclose(a, b, atol=1e-14)
    ratio = (logp - old).exp()
    assert sums["clip_low"] == int(((advantages < 0) & (ratio < 0.8)).sum()) > 0
    assert sums["clip_high"] == int(((advantages > 0) & (ratio > 1.28)).sum()) > 0
    r = (logp - sampler).detach()
    assert sums["kl"] == pytest.approx(float((r.exp() - 1 - r).sum()))
    assert sums["entropy_live"] == pytest.approx(float(-logp.detach().sum()))


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


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_update_is_the_plain_gradient_over_all_rollouts(model, temperature, monkeypatch):
    """Catches: a denominator that forgets silent rollouts, or counts rows or microbatches, not tokens; a
    temperature that does not arrive."""
    rollouts, advantages = example()
    total = sum(len(r.response_ids) for r in rollouts)
    loss = 0.0
    for r, a in zip(rollouts, advantages, strict=True):  # every rollout, the silent ones too
        logp = naive_logprobs(model, r, temperature)
        weight = (logp.detach() - torch.tensor(r.logprobs)).exp().clamp(max=2.0)
        loss = loss - (weight * a * (logp - logp.detach()).exp()).sum() / total
    want = torch.autograd.grad(loss, list(model.parameters()))
    grpo.check_logprobs(model)
    passes = Mock(wraps=grpo._shared_pass)
    monkeypatch.setattr(grpo, "_shared_pass", passes)
    got, stats = step_taken(model, rollouts, advantages, temperature=temperature)
    grpo.token_logprobs(model, rollouts, share_prompts=False)
    assert passes.call_count == 2  # the copied model's check, and its update
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-7)  # logprobs and advantages travel as float32
    assert stats["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    live = [r for r, a in zip(rollouts, advantages, strict=True) if a]
    logp = torch.cat([naive_logprobs(model, r, temperature).detach() for r in live])
    off = logp - torch.tensor([x for r in live for x in r.logprobs])
    assert stats["entropy_live"] == pytest.approx(-float(logp.mean()), rel=1e-5)
    assert stats["kl"] == pytest.approx(float((off.exp() - 1 - off).mean()), rel=1e-4)
    silent = sum(len(r.response_ids) for r, a in zip(rollouts, advantages, strict=True) if a == 0)
    assert stats["skipped_tokens"] == pytest.approx(silent / total) and silent > 0


def test_a_long_gradient_is_shortened(model):
    rollouts, advantages = example()
    clipped = copy.deepcopy(model)
    optimizer = torch.optim.SGD(clipped.parameters(), lr=1.0)
    stats = grpo.update(clipped, optimizer, rollouts, advantages, max_grad_norm=0.1)
    moved = [(a - b).flatten() for a, b in zip(model.parameters(), clipped.parameters(), strict=True)]
    assert stats["grad_norm"] > 1  # as it was
    assert float(torch.cat(moved).detach().norm()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("precision, bound", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_microbatches_change_nothing(model, minibatches, precision, bound, monkeypatch):
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
        grpo.update(model, Recorder(model.parameters()), rollouts, advantages, minibatches)
    whole = torch.stack(gradients.pop(len(rollouts)))
    assert len(whole) == minibatches and float(whole.norm()) > 0.1
    assert 0 < float((whole - torch.stack(gradients[8])).abs().max())  # 8 is a cut, not all
    for cut in gradients.values():
        assert float((whole - torch.stack(cut)).abs().max()) < bound


def test_a_kl_is_an_advantage():
    """Chapter 5's recipe. Its mean gradient is that of KL(pi, pi_ref), to
    four standard errors, also in silent groups; k3 as a reward would point elsewhere."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(0)
    pi = logits.log_softmax(0)
    (want,) = torch.autograd.grad((pi.exp() * (pi - reference)).sum(), logits, retain_graph=True)
    group = np.repeat(np.arange(20000), 5)
    tokens = torch.multinomial(pi.detach().exp(), len(group), replacement=True)
    found = {}
    for name, k in {"k1": pi - reference, "k3": (reference - pi).exp() - 1 - (reference - pi)}.items():
        k = k.detach()[tokens].numpy()
        A = 0 - 0.3 * grpo.group_advantages(k, group, clip=np.inf, kind="leave-one-out")
        loss, _ = grpo.clipped_loss(pi[tokens], pi.detach()[tokens], torch.tensor(A), len(A))
        (found[name],) = torch.autograd.grad(loss, logits, retain_graph=True)
    error = 0.3 * float((pi - reference).detach().std()) / len(group) ** 0.5
    assert float((found["k1"] - 0.3 * want).abs().max()) < 4 * error
    assert float((found["k3"] - 0.3 * want).abs().max()) > 40 * error


def test_checkpointing_computes_twice_and_changes_nothing(model):
    """Catches: a flag that does nothing, and one that leaves its mark on the model."""
    rollouts, advantages = example()
    plain, _ = step_taken(model, rollouts, advantages)
    copied, calls = copy.deepcopy(model), []
    grpo.check_logprobs(copied)
    copied.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(copied.parameters(), lr=1.0)
    grpo.update(copied, optimizer, rollouts, advantages, max_grad_norm=1e9, checkpointing=True)
    assert len(calls) == 2
    for a, b, c in zip(model.parameters(), copied.parameters(), plain, strict=True):
        assert torch.allclose(a - b, c, atol=1e-10)
    assert not any("forward" in vars(m) for m in copied.modules())  # no layer stays wrapped


def test_checkpointing_wakes_no_dropout():
    """Catches: CheckpointError, and layers that drop out because checkpointing put them in training mode."""
    other = family("OPT", base=OPT)
    rollouts, advantages = example()
    plain, _ = step_taken(other, rollouts, advantages)
    twice, stats = step_taken(other, rollouts, advantages, checkpointing=True)
    assert stats["steps_skipped"] == 0
    for a, b in zip(plain, twice, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="does not support checkpointing"):
        bare = torch.nn.Linear(2, 2)
        with grpo._layers_recomputed(bare, True):
            pass


def test_several_minibatches_are_steps_on_one_old_policy(model, monkeypatch):
    """Catches: old log-probs recomputed after the first step, a denominator of the wrong size, a rollout
    lost or doubled where minibatches are cut. One naive loop over minibatches as `update` deals them."""
    rollouts, advantages = example(8)
    live = [i for i in range(len(rollouts)) if advantages[i] != 0]
    total = sum(len(r.response_ids) for r in rollouts)
    seen, real, k, lr = [], grpo.microbatches, 2, 0.3

    def spy(*settings):
        seen.extend(real(*settings))
        return iter(seen[-1:])  # the whole minibatch is one microbatch here

    monkeypatch.setattr(grpo, "microbatches", spy)
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr)
    stats = grpo.update(trained, optimizer, rollouts, advantages, minibatches=k, max_grad_norm=1e9, seed=1)
    assert len(seen) == k and sorted(i for batch in seen for i in batch) == live
    assert 0 < stats["clip_low"] + stats["clip_high"] < 1  # the second minibatch is off the old policy

    naive = copy.deepcopy(model)
    old, losses = {i: naive_logprobs(model, rollouts[i]).detach() for i in live}, []
    for batch in seen:
        loss = 0.0
        for i in batch:
            sampler = torch.tensor(rollouts[i].logprobs)
            logp, a = naive_logprobs(naive, rollouts[i]), advantages[i]
            loss = loss + naive_loss(logp, old[i], [a] * len(logp), total / k, sampler, 0.2, 0.28, 10.0, 2.0)
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(naive.parameters()))
        with torch.no_grad():
            for p, g in zip(naive.parameters(), gradients, strict=True):
                p -= lr * g
    assert stats["loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    for a, b in zip(trained.parameters(), naive.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_minibatches_are_groups_of_as_many_tokens(model, monkeypatch):
    """Catches: groups torn apart, minibatches of as many rollouts, always the same ones together."""
    rollouts, advantages = example(1, sizes=(4, 9, 2, 7, 3, 12, 5, 8, 6, 4))
    live, dealt = np.flatnonzero(advantages), []
    monkeypatch.setattr(grpo, "microbatches", lambda _, rows, *__: dealt.append(set(rows)) or [rows])
    for seed in (1, 2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        grpo.update(copy.deepcopy(model), optimizer, rollouts, advantages, minibatches=3, seed=seed)
    share = sum(len(rollouts[i].response_ids) for i in live) / 3
    for cut in (dealt[:3], dealt[3:]):
        assert set.union(*cut) == {*live} and sum(map(len, cut)) == len(live)
        assert all(abs(sum(len(rollouts[i].response_ids) for i in rows) - share) < 8 for rows in cut)
        groups = [{rollouts[i].group for i in rows} for rows in cut]
        assert sum(map(len, groups)) - len(set.union(*groups)) <= 2  # a cut parts one group at most
    assert not any(rows in dealt[:3] for rows in dealt[3:])


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


@pytest.mark.parametrize("shared, gpu", [(True, False), (False, False), (False, True)])
def test_microbatches_cover_every_row_once_within_the_limit(shared, gpu):
    """Catches: a row lost where a group is cut, a budget that counts too little and runs out of memory."""
    rollouts = make_rollouts(9, sizes=(40, 1, 3, 17))
    rows = np.arange(1, len(rollouts))
    cut = list(grpo.microbatches(rollouts, rows, 64, shared, gpu))
    assert sorted(i for batch in cut for i in batch) == rows.tolist()
    for batch in cut:
        P = max(len(rollouts[i].prompt_ids) for i in batch)
        tokens = len({rollouts[i].group for i in batch}) * P + sum(
            len(rollouts[i].response_ids) for i in batch
        )
        assert (tokens if shared else tokens_run(rollouts, batch, False)) <= 64


def test_many_rollouts_of_a_long_prompt_are_cut():
    """Catches: keys and values of a long prompt, repeated for 128 short answers, uncounted."""
    one = Rollout(0, (1,) * 2000, (1,) * 16, (0.0,) * 16, "")
    cut = list(grpo.microbatches([one] * 128, np.arange(128), 8192))
    assert max(map(len, cut)) * (16 + 2000 / 12) + 2000 <= 8192
    assert len(cut) == 4 and sum(map(len, cut)) == 128


def test_a_gpu_gets_fewer_passes():
    """Ragged responses: rather padding than another pass, but no more tokens in one."""
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(0, (1,) * 9, (1,) * int(T), (0.0,) * int(T), "") for T in rng.integers(50, 1000, size=200)
    ]
    few, many = (
        [
            tokens_run(rollouts, part, False)
            for part in grpo.microbatches(rollouts, range(200), 8192, False, gpu)
        ]
        for gpu in (True, False)
    )
    assert len(few) < 0.75 * len(many) and max(few) <= 8192 and sum(many) <= sum(few) < 1.1 * sum(many)


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


def test_steps_that_are_not_finite_are_not_taken(model):
    """Catches: NaN written into the weights, and a skip that nobody counts."""
    rollouts, advantages = example()
    broken = copy.deepcopy(model)
    grpo.check_logprobs(broken)  # it was sound once
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="nan nats off"):
        grpo.check_logprobs(copy.deepcopy(broken))
    before = copy.deepcopy(broken.state_dict())
    optimizer = torch.optim.SGD(broken.parameters(), lr=1.0)
    for _ in range(2):
        stats = grpo.update(broken, optimizer, rollouts, advantages, minibatches=2)
        assert stats["steps_skipped"] == 2 and stats["loss"] is None
    for name, value in broken.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_one_step_that_is_not_finite_is_left_out(model, monkeypatch):
    """Catches: a skipped step in the means of the stats, an infinite gradient behind a finite loss that is
    clipped to NaN and applied."""
    rollouts, advantages = example()
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    huge = advantages.copy()
    huge[np.flatnonzero(advantages)[0]] = np.inf
    losses, real = [], grpo.clipped_loss
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "clipped_loss", lambda *a: losses.append(real(*a)) or losses[-1])
        stats = grpo.update(trained, optimizer, rollouts, huge, minibatches=2)
    (loss,) = (float(x.detach()) for x, _ in losses if x.isfinite())
    assert stats["steps_skipped"] == 1 and stats["loss"] == loss
    assert all(np.isfinite(v) for v in stats.values())
    assert grpo.update(trained, optimizer, rollouts, advantages)["steps_skipped"] == 0
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


def test_gradients_of_weights_that_stay_do_not_pile_up(model):
    """Catches: an optimizer of some of the weights, beside which the others' gradients grow and grow."""
    rollouts, advantages = example()
    trained, norms = copy.deepcopy(model), []
    for part in (trained, trained.get_decoder().layers[-1]):
        optimizer = torch.optim.SGD(part.parameters(), lr=0.0)
        for _ in range(2):
            norms.append(grpo.update(trained, optimizer, rollouts, advantages, minibatches=2)["grad_norm"])
            assert all(p.grad is None for p in trained.parameters())
    assert norms[0] > 0 and norms == [norms[0]] * 4


@pytest.mark.parametrize("ids, logps", [((), ()), ((5, 6), (-2.0,))])
def test_what_is_no_rollout_is_refused(model, ids, logps):
    """Catches: log-probs of one rollout that are taken for another's."""
    rollouts = [Rollout(0, (1, 2), (5,), (-2.0,), ""), Rollout(0, (1, 2), ids, logps, "")]
    with pytest.raises(ValueError, match="a log-prob for each of its tokens"):
        grpo.update(model, None, rollouts, np.array([0.7, -0.7]))
    with pytest.raises(ValueError, match="pass one advantage a rollout"):
        grpo.update(model, None, rollouts[:1], np.array([0.7, -0.7]))
    with pytest.raises(ValueError, match="temperature 0: must be above 0"):
        grpo.check_logprobs(model, 0)
    with pytest.raises(ValueError, match="0 minibatches"):
        grpo.update(model, None, rollouts[:1], np.array([0.7]), minibatches=0)
