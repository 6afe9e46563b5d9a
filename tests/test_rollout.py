"""rollout.py: what comes back is what was sampled, from the distribution it says, for the right prompt."""

import numpy as np
import pytest
import torch

import grpo
import rollout

COUNTS = [3, 0, 7, 1, 4]


def same_tokens(a, b):
    return [(r.prompt_ids, r.response_ids) for r in a] == [(r.prompt_ids, r.response_ids) for r in b]


def check_records(rollouts, prompts, counts, tokenizer, max_new_tokens):
    """Counts, pairing, lengths, end of sequence and text, for either engine."""
    assert [r.group for r in rollouts] == np.repeat(np.arange(len(prompts)), counts).tolist()
    for r in rollouts:
        assert r.prompt_ids == tuple(prompts[r.group])
        assert len(r.logprobs) == len(r.response_ids) <= max_new_tokens
        assert tokenizer.eos_token_id not in r.response_ids[:-1]
        assert r.finished == (r.response_ids[-1] == tokenizer.eos_token_id)
        assert r.finished or len(r.response_ids) == max_new_tokens
        assert r.text == tokenizer.decode(r.response_ids, skip_special_tokens=True)


def test_records(loaded, prompts):
    """Catches: a completion paired with another prompt, a lost end token, a wrong `finished`."""
    sampler = rollout.HFSampler(*loaded, max_new_tokens=6)  # short: some are cut
    rollouts = sampler.sample(prompts, COUNTS, seed=1)
    check_records(rollouts, prompts, COUNTS, loaded[1], 6)
    assert {r.finished for r in rollouts} == {True, False}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models(loaded, prompts, temperature):
    """Catches: log-probs before temperature, of the wrong column, or of another row after rows left."""
    sampler = rollout.HFSampler(*loaded, max_new_tokens=30, temperature=temperature)
    rollouts = sampler.sample(prompts, COUNTS, seed=2)
    with torch.no_grad():
        ours = grpo.token_logprobs(loaded[0], rollouts, temperature).numpy()
    assert np.abs(ours - np.concatenate([r.logprobs for r in rollouts])).max() < 1e-4


def test_samples_follow_the_distribution(loaded, prompts):
    """Catches: a biased inverse CDF. First tokens of 20000 rollouts against the softmax, chi-square."""
    n, temperature = 20_000, 1.5
    sampler = rollout.HFSampler(*loaded, max_new_tokens=1, temperature=temperature)
    first = [r.response_ids[0] for r in sampler.sample([prompts[2]], [n], seed=3)]
    with torch.no_grad():
        logits = loaded[0](torch.tensor([prompts[2]])).logits[0, -1]
    p = (logits / temperature).softmax(-1).double().numpy()
    seen = np.bincount(first, minlength=len(p))
    common = p * n >= 5
    chi2 = ((seen - n * p)[common] ** 2 / (n * p)[common]).sum()
    freedom = common.sum() - 1
    assert freedom >= 1 and chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_same_seed_same_rollouts_in_any_order(loaded, prompts):
    """Catches: randomness that depends on the batch around a prompt or on how memory cut it."""
    sampler = rollout.HFSampler(*loaded, max_new_tokens=20)
    once = sampler.sample(prompts, COUNTS, seed=4)
    assert same_tokens(once, sampler.sample(prompts, COUNTS, seed=4))
    assert not same_tokens(once, sampler.sample(prompts, COUNTS, seed=5))
    turned = sampler.sample(prompts[::-1], COUNTS[::-1], seed=4)
    back = sorted(turned, key=lambda r: -r.group)
    assert same_tokens(once, back)
    sampler.tokens_in_flight = 100  # two or three rows at a time
    assert same_tokens(once, sampler.sample(prompts, COUNTS, seed=4))


def test_the_same_prompt_twice_draws_anew(loaded, prompts):
    """Catches: two copies of a prompt in one batch that return identical groups."""
    sampler = rollout.HFSampler(*loaded, max_new_tokens=30)
    rollouts = sampler.sample([prompts[2], prompts[2]], [4, 4], seed=6)
    assert [r.response_ids for r in rollouts[:4]] != [r.response_ids for r in rollouts[4:]]


def test_memory_is_bounded_whatever_the_batch(loaded, prompts, monkeypatch):
    """2048 rows in groups of 128. Catches: a batch that grows with R, rows lost where it was cut."""
    sampler = rollout.HFSampler(*loaded, max_new_tokens=4, tokens_in_flight=6000)
    sizes, real = [], sampler._generate

    def spy(prompts, chunk, u):
        sizes.append(len(chunk) * (max(len(prompts[i]) for i, _ in chunk) + 4))
        return real(prompts, chunk, u)

    monkeypatch.setattr(sampler, "_generate", spy)
    many = [[*prompts[i % 5][:-1], 3 + i // 5, *prompts[i % 5][-1:]] for i in range(16)]
    rollouts = sampler.sample(many, [128] * 16, seed=0)
    check_records(rollouts, many, [128] * 16, loaded[1], 4)
    assert max(sizes) <= 6000 < sum(sizes)


@pytest.mark.parametrize("counts", [[1, 2], [1, -1, 1, 1, 1], [0.5] * 5])
def test_bad_counts_are_refused(loaded, prompts, counts):
    with pytest.raises(ValueError, match="counts must be 5 integers"):
        rollout.HFSampler(*loaded, max_new_tokens=3).sample(prompts, counts, seed=0)


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(ValueError, match="empty prompt"):
        rollout.HFSampler(*loaded, max_new_tokens=3).sample([[]], [1], seed=0)


def test_chat_needs_a_template(loaded):
    with pytest.raises(ValueError, match="no chat template"):
        rollout.encode_prompts(loaded[1], ["hi"], chat=True)


# ------------------------------------------------------- vLLM, as far as it goes without (see test_vllm.py)


@pytest.mark.parametrize(
    "build, gpu, wanted, engine",
    [
        (None, False, "auto", "hf"),
        (None, True, "auto", "hf"),
        ("cpu", False, "auto", "hf"),
        ("gpu", True, "auto", "vllm"),
        ("gpu", True, "hf", "hf"),
        ("cpu", False, "vllm", "vllm"),
        (None, True, "vllm", "vLLM is not installed"),
        ("gpu", False, "vllm", "needs a GPU and there is none"),
    ],
)
def test_the_choice_of_the_engine(monkeypatch, build, gpu, wanted, engine):
    monkeypatch.setattr(rollout, "vllm_build", lambda: build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if engine in ("hf", "vllm"):
        assert rollout.choose_engine(wanted)[0] == engine
    else:
        with pytest.raises(ValueError, match=engine):
            rollout.choose_engine(wanted)


def test_on_a_gpu_the_engine_wakes_in_order(loaded, prompts):
    """Catches: a cache that wakes before the weights are in, a sample while asleep. No engine: a recorder."""
    calls = []

    class Recorder:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, *args, *kwargs)) or True

    sampler = object.__new__(rollout.VLLMSampler)
    sampler.llm, sampler.gpu, sampler.asleep, sampler.model, sampler.version = (
        Recorder(),
        True,
        False,
        None,
        0,
    )
    sampler._read_back = lambda model, column: {}
    sampler.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        sampler.sample(prompts, COUNTS, seed=0)
    sampler.sync(loaded[0])
    assert calls == [
        ("sleep", "level"),
        ("wake_up", ["weights"]),
        ("collective_rpc", "reload_weights", "kwargs"),
        ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache",),
    ]
    assert not sampler.asleep
