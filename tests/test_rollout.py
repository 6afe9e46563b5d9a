"""rollout.py: what comes back is what was sampled, from the distribution it says, for the right prompt."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

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


@torch.no_grad()
def naive(model, prompt, n, T, temperature, seed, end=1):
    """The oracle: row by row, token by token, a pass over the whole row and a draw in float64."""
    own_seed = rollout.request_seeds([prompt], seed)[0]
    for uniforms in np.random.default_rng(own_seed).random((n, T), dtype=np.float32):
        ids, logprobs = [], []
        for u in uniforms:
            logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1]
            logp = (logits.double() / temperature).log_softmax(-1)
            ids.append(int(np.searchsorted(logp.exp().cumsum(-1).numpy(), u, side="right")))
            logprobs.append(float(logp[ids[-1]]))
            if ids[-1] == end:
                break
        yield tuple(ids), logprobs


def check_against_naive(sampler, prompts, counts, seed):
    rollouts = sampler.sample(prompts, counts, seed)
    for i, (prompt, n) in enumerate(zip(prompts, counts, strict=True)):
        ours = [r for r in rollouts if r.group == i]
        want = naive(sampler.model, prompt, n, sampler.max_new_tokens, sampler.temperature, seed)
        for r, (ids, logprobs) in zip(ours, want, strict=True):
            assert r.response_ids == ids
            assert np.abs(np.array(r.logprobs) - logprobs).max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_and_logprobs_are_the_models(loaded, prompts, temperature):
    """Catches: log-probs before temperature, of the wrong column, or of another row after rows left; a
    cache or a position that went with the wrong row."""
    sampler = rollout.HFSampler(*loaded, max_new_tokens=12, temperature=temperature)
    assert sampler.cached
    check_against_naive(sampler, prompts, COUNTS, seed=2)


HEADS = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=48)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)
MAMBA = dict(mamba_n_heads=4, mamba_d_state=8, mamba_n_groups=1)
SLOW = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family, shape",
    [
        (
            "qwen3_5_text",
            HEADS | LINEAR | dict(layer_types=["linear_attention", "full_attention"]),
        ),
        ("lfm2", HEADS | dict(layer_types=["conv", "full_attention"])),
        ("mamba", dict(state_size=8)),
        ("minimax", HEADS | dict(num_local_experts=2)),
        ("falcon_h1", HEADS | MAMBA | dict(mamba_d_ssm=32, mamba_d_head=8)),
        ("bamba", HEADS | MAMBA | dict(attn_layer_indices=[1], mamba_d_head=16)),
    ],
)
def test_models_whose_cache_is_not_attention(loaded, family, shape):
    """Catches: a recurrent state that stays with another row, or that read the padding. Without a cache the
    sampler is exact for these models too."""
    common = dict(vocab_size=32, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common, **shape)).float().eval()
    with torch.no_grad():  # random weights say nothing; larger ones have preferences
        for p in model.parameters():
            p.mul_(2.5 if p.ndim > 1 else 1)
    with pytest.warns(UserWarning, match="exact and slow"):
        sampler = rollout.HFSampler(model, loaded[1], max_new_tokens=6, temperature=0.8)
    assert not sampler.cached
    check_against_naive(sampler, [[3, 4, 5], [6, 7, 8, 9, 10], [5, 4, 3], [2]], [5, 3, 0, 4], seed=0)


WINDOW = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])


@pytest.mark.parametrize(
    "family, more",
    [("qwen2", {}), ("qwen3", {"head_dim": 16}), ("mistral", {"sliding_window": 4}), ("gemma3_text", WINDOW)],
)
def test_the_cache_is_in_the_products_precision(loaded, family, more, monkeypatch):
    """Catches: float32 keys under autocast, which rotary embeddings make (half a GPU's cache); a window that
    is not the model's; in float32, another bit than with the cache that the model makes itself."""
    common = dict(vocab_size=32, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common, **HEADS, **more))
    model = model.float().eval()
    sampler = rollout.HFSampler(model, loaded[1], max_new_tokens=9)
    assert sampler.cached
    asked = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [2]], [5, 3, 4], 0
    check_against_naive(sampler, *asked)
    ours = sampler.sample(*asked)
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "new_cache", lambda: DynamicCache(config=model.config))
        assert ours == sampler.sample(*asked)
    # As on a GPU: autocast is on.
    caches, new, autocast = [], sampler.new_cache, torch.autocast
    monkeypatch.setattr(sampler, "new_cache", lambda: caches.append(new()) or caches[-1])
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: autocast(device, dtype))
    rolled = sampler.sample(*asked)
    assert {x.dtype for c in caches for layer in c.layers for x in (layer.keys, layer.values)} == {
        torch.bfloat16
    }
    monkeypatch.undo()
    with torch.no_grad():
        trainers = grpo.token_logprobs(model, rolled, bfloat16=True).numpy()
    assert np.abs(trainers - np.concatenate([r.logprobs for r in rolled])).mean() < 0.02


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


def test_a_model_in_training_mode(loaded, prompts):
    """Catches: dropout while sampling; a cache that transformers' checkpointing drops without a word."""
    want = rollout.HFSampler(*loaded, max_new_tokens=8).sample(prompts, COUNTS, seed=7)
    model = copy.deepcopy(loaded[0]).train()
    model.model.norm.eval()  # modes are kept module by module
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.gradient_checkpointing_enable()
    modes = [m.training for m in model.modules()]
    sampler = rollout.HFSampler(model, loaded[1], max_new_tokens=8)
    assert sampler.cached and sampler.sample(prompts, COUNTS, seed=7) == want
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("kind", [np.array, np.uint16, torch.tensor])
def test_prompts_in_arrays(loaded, prompts, kind):
    """Catches: seeds that follow from how numbers are printed; records that are no JSON."""
    sampler = rollout.HFSampler(*loaded, max_new_tokens=8)
    twice = [*prompts, prompts[2]]  # a copy draws anew
    rollouts = sampler.sample([kind(ids) for ids in twice], [*COUNTS, 7], seed=8)
    assert rollouts == sampler.sample(twice, [*COUNTS, 7], seed=8)
    json.dumps(rollouts[0].prompt_ids)


def test_no_prompts(loaded):
    assert rollout.HFSampler(*loaded, max_new_tokens=3).sample([], [], seed=0) == []


def test_memory_is_bounded_whatever_the_batch(loaded, prompts, monkeypatch):
    """2048 rows in groups of 128. Catches: a batch that grows with R, rows lost where it was cut."""
    sampler = rollout.HFSampler(*loaded, max_new_tokens=4)
    sampler.tokens_in_flight = 6000
    sizes, real = [], sampler._generate

    def spy(prompts, group, u):
        sizes.append(len(group) * (max(len(prompts[i]) for i in group) + 4))
        return real(prompts, group, u)

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
    with pytest.raises(ValueError, match="no prompt empty"):
        rollout.HFSampler(*loaded, max_new_tokens=3).sample([[]], [1], seed=0)


# ------------------------------------------------------------------------------------- texts and models


@pytest.fixture
def own_tokenizer(loaded):
    """The embedded model's tokenizer, to be changed at will."""
    return AutoTokenizer.from_pretrained(rollout.TINY)


def test_an_end_of_sequence_that_the_tokenizer_appends(own_tokenizer):
    """Catches: prompts that end in </s> (add_eos_token=True); an end of the template's own that is lost."""
    tokenizer, end = own_tokenizer, own_tokenizer.eos_token
    plain = rollout.encode_prompts(tokenizer, ["3+5=", "7="])
    around = TemplateProcessing(single=f"= $A {end}", special_tokens=[("=", plain[1][1]), (end, 1)])
    tokenizer.backend_tokenizer.post_processor = around
    assert tokenizer("7=")["input_ids"] == [plain[1][1], *plain[1], 1]
    assert rollout.encode_prompts(tokenizer, ["3+5=", "7="]) == [[plain[1][1], *ids] for ids in plain]
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ eos_token }}"
    assert rollout.encode_prompts(tokenizer, ["7="], chat=True) == [[*plain[1], 1]]


def test_what_a_template_is_told(own_tokenizer):
    """Catches: template_kwargs that do not arrive, or tasks that are encoded without them."""
    own_tokenizer.chat_template = "{{ messages[0]['content'] }}{{ '+' if thinking else '=' }}"
    task, off = SimpleNamespace(id="a", prompt="7"), {"thinking": False}
    plus, equals = (own_tokenizer(text)["input_ids"] for text in ("7+", "7="))
    assert rollout.encode_prompts(own_tokenizer, ["7"], True, {"thinking": True}) == [plus]
    assert rollout.encode_tasks(own_tokenizer, [task], "", True, off) == {"a": equals}


def test_an_instruction_stands_on_the_line_after_the_prompt():
    class Letters:
        eos_token_id = unk_token_id = chat_template = None

        def __call__(self, text, add_special_tokens=True):
            one = isinstance(text, str)
            return {"input_ids": [*map(ord, text)] if one else [[*map(ord, x)] for x in text]}

        def decode(self, ids):
            return "".join(map(chr, ids))

        def batch_decode(self, rows):
            return [*map(self.decode, rows)]

    asked = rollout.encode_tasks(Letters(), [SimpleNamespace(id="a", prompt="1+1=")], "In a box.")
    assert Letters().decode(asked["a"]) == "1+1=\nIn a box."


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("prompt", ["9-4=", "What is 9+4?", "π"])
def test_characters_that_a_vocabulary_lacks(own_tokenizer, prompt, unknown):
    """Catches: 9-4= and 9*4= both asked as 94=, or as 9<unk>4=, without a word. Spaces may go."""
    if unknown:
        vocabulary = WordLevel(own_tokenizer.get_vocab(), unk_token=own_tokenizer.unk_token)
        own_tokenizer.backend_tokenizer.model = vocabulary
    first = "9+4=" if unknown else "9 + 4="
    tasks = [SimpleNamespace(id="a", prompt=first), SimpleNamespace(id="b", prompt=prompt)]
    assert list(rollout.encode_tasks(own_tokenizer, tasks[:1])) == ["a"]
    with pytest.raises(ValueError, match=re.escape(f"the tokenizer reads {prompt!r} as")):
        rollout.encode_tasks(own_tokenizer, tasks)


@pytest.mark.parametrize(
    "template, chat, kwargs, words",
    [
        (None, True, None, "no chat template; drop the flag"),
        ("x", False, {"a": 1}, "--chat-template-kwargs needs --chat"),
        ("{{ raise_exception('no user turns') }}", True, None, "no user turns"),
        ("{% if %}", True, None, "TemplateSyntaxError"),
        ("{{ 1 + thinking }}", True, {"thinking": "yes"}, "TypeError"),
        ("{{ messages[9]['content'] }}", True, None, "UndefinedError"),
        # A multimodal model's wants a list of parts, and would ask '=' of everybody.
        ("{% for x in messages[0]['content'] %}{{ x['text'] }}{% endfor %}=", True, None, "makes '=' of '7'"),
    ],
)
def test_templates_that_fail_are_one_line(own_tokenizer, template, chat, kwargs, words):
    own_tokenizer.chat_template = template
    with pytest.raises(ValueError, match=words) as failure:
        rollout.encode_prompts(own_tokenizer, ["7"], chat, kwargs)
    assert "\n" not in str(failure.value)


def test_hints_about_chat(own_tokenizer):
    """Qwen's base models have a chat template too: it ends turns with <|im_end|>, they with another token."""
    end = own_tokenizer.eos_token
    for template, chat, words in [
        (None, False, None),
        ("{{ x }}" + end, False, "--chat"),
        ("{{ x + eos_token }}", False, "--chat"),
        ("{{ x }}" + end, True, None),
        ("{{ x }}<|im_end|>", False, None),
        ("{{ x }}<|im_end|>", True, "base model"),
        ("{{ x }}8", False, "--chat"),  # Gemma's: the config names a second end, <end_of_turn>
        ("{{ x }}8", True, None),
    ]:
        own_tokenizer.chat_template = template
        config = AutoConfig.for_model("qwen2", eos_token_id=[1, *own_tokenizer("8")["input_ids"]])
        hint = rollout.prompt_hint(own_tokenizer, config, chat)
        assert hint is None if words is None else words in hint


@pytest.mark.parametrize(
    "settings, ends",
    [
        ({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}, {1}),  # Llama 2's
        ({"top_k": 5, "pad_token_id": -1, "eos_token_id": [1, 2], "max_length": 5}, {1, 2}),
    ],
)
def test_a_loaded_model_can_be_saved(tmp_path, settings, ends):
    """Catches: a run that ends at its first checkpoint, because of settings it never used."""
    shutil.copytree(rollout.TINY, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = rollout.load_model(str(tmp_path / "model"))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = rollout.HFSampler(*rollout.load_model(str(tmp_path / "saved")), max_new_tokens=3)
    assert again.end_ids == rollout.HFSampler(model, tokenizer, max_new_tokens=3).end_ids == ends


# ------------------------------------------------------- vLLM, as far as it goes without (see test_vllm.py)


@pytest.mark.parametrize(
    "build, gpu, wanted, engine",
    [
        (None, False, "auto", "hf"),
        (None, True, "auto", "hf"),
        ("cpu", False, "auto", "hf"),
        ("cpu", True, "auto", "hf"),  # that build cannot use the GPU
        ("gpu", True, "auto", "vllm"),
        ("gpu", True, "hf", "hf"),
        ("cpu", False, "vllm", "vllm"),
        (None, True, "vllm", "pip install vllm"),
        ("gpu", False, "vllm", "gpu build does not run on this cpu"),
        ("cpu", True, "vllm", "cpu build does not run on this gpu"),
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
    sampler.llm, sampler.gpu, sampler.asleep, sampler.model = Recorder(), True, False, None
    sampler.make_room = lambda: calls.append(("make room",))
    sampler.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        sampler.sample(prompts, COUNTS, seed=0)
    sampler.sync(loaded[0])
    assert calls == [
        ("sleep", "level"),
        ("make room",),
        ("wake_up", ["weights"]),
        ("collective_rpc", "reload_weights", "kwargs"),
        ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache",),
    ]
    assert not sampler.asleep
