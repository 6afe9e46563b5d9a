"""What tutorial/gpu_memory.py says a GPU must hold: against real tensors on a CPU, and the README's table."""

import json
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tutorial"))
import gpu_memory  # noqa: E402

import grpo  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from rollout import HFSampler, Rollout  # noqa: E402

SMALL = dict(vocab_size=600, hidden_size=128, intermediate_size=448, num_hidden_layers=4)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2)
QWEN = {  # Qwen2.5's config.json: hidden size, layers, heads, inner size
    "0.5B": (896, 24, 14, 4864),
    "1.5B": (1536, 28, 12, 8960),
    "3B": (2048, 36, 16, 11008),
}


def made(family: str, **shape):
    """(config, its model with random weights)"""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | shape)
    return config, AutoModelForCausalLM.from_config(config).float().eval()


def needs(c: train.Config, config, engine="hf", card=80e9):
    return gpu_memory.memory_needs(c, engine, config, gpu_memory.parameter_sizes(config), card)


def large(**changes) -> train.Config:
    return train.settings({"model": "Qwen/some"} | changes)


@pytest.mark.parametrize(
    "family, tied", [("qwen2", True), ("qwen2", False), ("llama", False), ("gpt2", True)]
)
def test_parameters_are_counted_without_weights(family, tied):
    """Catches: tied weights counted twice, a parameter that only a loaded model has."""
    config, model = made(family, tie_word_embeddings=tied)
    assert gpu_memory.parameter_sizes(config) == [p.numel() for p in model.parameters()]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_weights_gradients_and_moments(name):
    """To the byte, but for the counters of steps."""
    if name == "adamw8bit":
        pytest.importorskip("torchao", reason="pip install torchao==0.18.0 for --optimizer adamw8bit")
    config, model = made(
        "qwen2", hidden_size=96, vocab_size=333, tie_word_embeddings=True
    )  # odd sizes among them
    optimizer = train.make_optimizer(name, model, 1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    update = needs(large(optimizer=name), config)["update"]
    assert update["weights"] == sum(p.nbytes for p in model.parameters())
    assert update["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    state = [x for of in optimizer.state.values() for name, x in of.items() if name != "step"]
    parts = [[y for y in vars(x).values() if torch.is_tensor(y)] or [x] for x in state]
    assert update["moments"] == sum(x.nbytes for of in parts for x in of)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in here hold together, as max_memory_allocated on a GPU."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(made):
            if torch.is_tensor(x) and (key := x.untyped_storage()._cdata) not in self.alive:
                self.alive[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.freed, key)
                self.now += self.alive[key]
                self.most = max(self.most, self.now)
        return made

    def freed(self, key):
        self.now -= self.alive.pop(key)


class NoOptimizer:
    def step(self): ...


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [{}, {"vocab_size": 8192}, {"num_hidden_layers": 8}])
def test_the_peak_of_an_update(checkpointing, shape, monkeypatch):
    """Two microbatches of a whole grpo.update in bfloat16: what is said is neither a tenth less than what
    lives at once nor half as much again. Catches: a part that was forgotten or counted twice."""
    config, model = made("qwen2", tie_word_embeddings=True, **shape)
    rng, V, T = np.random.default_rng(0), config.vocab_size, 56
    ids = [tuple(rng.integers(V, size=n).tolist()) for _ in range(16) for n in (8, T)]
    batch = [Rollout(i // 8, ids[2 * i], ids[2 * i + 1], (-5.0,) * T, "") for i in range(16)]
    monkeypatch.setattr(grpo, "sharing_wins", lambda *_: False)
    grpo.check_logprobs(model)
    how = dict(tokens_per_microbatch=512, checkpointing=checkpointing, bfloat16=True)
    with Peak() as peak:
        grpo.update(model, NoOptimizer(), batch, np.tile([1.0, -1.0], 8), **how)
    said = needs(large(max_new_tokens=T, max_prompt_tokens=8, **{k: how[k] for k in list(how)[:2]}), config)
    said = sum(said["update"].values()) - said["update"]["weights"] - said["update"]["moments"]
    assert 0.9 < said / peak.most < 1.5, said / peak.most


def test_what_a_repeated_prompt_keeps():
    """In the proportions of Qwen2.5-1.5B, by the peaks of four shared passes: a further rollout of P prompt
    and T response tokens. Catches: a mask or a copy of the keys that grpo.microbatches does not count."""
    wide = dict(hidden_size=192, intermediate_size=1120, num_attention_heads=12, num_hidden_layers=8)
    _, model = made("qwen2", tie_word_embeddings=True, **wide)
    grpo.check_logprobs(model)
    P, few, many, peaks = 400, 4, 36, {}
    for rows in (16, 32):
        for T in (few, many):
            batch = [Rollout(0, (1,) * P, (1,) * T, (0.0,) * T, "") for _ in range(rows)]
            with Peak() as peak:
                grpo.token_logprobs(model, batch, bfloat16=True).sum().backward()
            peaks[rows, T] = peak.most
            model.zero_grad(set_to_none=True)
    short, long = ((peaks[32, T] - peaks[16, T]) / 16 for T in (few, many))
    a_token = (long - short) / (many - few)
    repeated = (short - few * a_token) / P
    assert 12 < a_token / repeated < 16


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 256}, {"intermediate_size": 1024}])
def test_what_autograd_keeps_of_a_layer(shape):
    """The difference of eight layers and four, in saved tensors without the weights: within 3%."""
    saved = []
    for layers in (4, 8):
        config, model = made("qwen2", **shape | {"num_hidden_layers": layers})
        sizes, alive = {}, []
        shapes = {s for p in model.parameters() for s in (p.shape, p.T.shape if p.ndim == 2 else p.shape)}

        def keep(x, sizes=sizes, alive=alive, shapes=shapes):
            if x.shape not in shapes:  # neither a weight nor its bfloat16 copy
                alive.append(x)
                sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        ids = torch.arange(5 * 50).reshape(5, 50)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16):
                model.get_decoder()(input_ids=ids, use_cache=False)
        saved.append(sum(sizes.values()))
    c = large(tokens_per_microbatch=250, max_new_tokens=50, max_prompt_tokens=10)
    said = needs(c, config)["update"]["activations"] / (8 + 1)  # one layer is counted twice: its gradients
    assert said == pytest.approx((saved[1] - saved[0]) / 4, rel=0.03)


def test_the_cache(loaded):
    """To the byte: keys and values of a row in bfloat16, as HFSampler stores them on a GPU."""
    config, model = made("qwen2")
    cache = HFSampler(model, loaded[1], 4).new_cache()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.ones(3, 7, dtype=torch.long), past_key_values=cache)
    held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    said = needs(large(), config)["sampling"]["keys and values"]
    assert held == 3 * 7 * said / HFSampler.tokens_in_flight


def test_short_answers_are_no_more_rows_than_are_asked_for():
    """Catches: 26,214 rows of 5 tokens, where a step has 256, so that nothing fits."""
    config, _ = made("qwen2")
    c = large(max_new_tokens=5, max_prompt_tokens=64, budget=256, held_out=64)
    said, whole = needs(c, config)["sampling"], needs(large(), config)["sampling"]
    assert said["logits"] == 20 * config.vocab_size * 256
    share = said["keys and values"] / whole["keys and values"]
    assert share == pytest.approx(256 * 69 / HFSampler.tokens_in_flight)


def test_any_config_will_do():
    """Catches: an attribute that recurrent or old models lack."""
    for family in ("mamba", "gpt2", "falcon", "mixtral"):
        assert sum(needs(large(), AutoConfig.for_model(family))["update"].values()) > 0


def qwen(name: str) -> Qwen2Config:
    H, layers, heads, inner = QWEN[name]
    shape = dict(hidden_size=H, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner)
    return Qwen2Config(vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=True, **shape)


def test_the_readme():
    """The table, the command for 24 GB and the sums around them."""
    readme = (ROOT / "README.md").read_text()
    for name in QWEN:
        config, c, cells = qwen(name), large(), [name]
        sizes = gpu_memory.parameter_sizes(config)
        for card in (80e9, 48e9, 24e9, 16e9):
            fit = gpu_memory.settings_that_fit(c, "vllm", config, sizes, card, card)
            flags = "does not fit" if fit is None else gpu_memory.other_flags(c, fit)
            cells.append(flags if fit is None or not flags else f"`{flags}`")
            if (name, card) == ("1.5B", 24e9):
                assert fit is None
                other = gpu_memory.settings_that_fit(c, "hf", config, sizes, card, card)
                small = gpu_memory.memory_needs(other, "hf", config, sizes, card)
                words = f"--engine hf {gpu_memory.other_flags(c, other)}"
                assert f"python train.py --model Qwen2.5-Math-1.5B {words}\n" in readme
        line = "| " + " | ".join(cell or "as it is" for cell in cells) + " |"
        assert line in readme, line
    totals = [f"{sum(parts.values()) / 1e9:.1f}" for parts in small.values()]
    moments = f"{small['update']['moments'] / 1e9:.1f}"
    page = " ".join((ROOT / "tutorial" / "one_gpu.md").read_text().split())
    said = f"has {moments} GB of them; it holds {totals[0]} GB while it samples and {totals[1]} in the update"
    assert said in page, said


def test_what_a_card_showed():
    """The sums against the peaks of an H100. Catches: arithmetic that leaves something out."""
    recorded = json.loads((ROOT / "tutorial/results/bench_gpu.json").read_text())
    config, seen = qwen("1.5B"), []
    assert recorded["parameters"] == sum(gpu_memory.parameter_sizes(config))
    for row in recorded["update"]:
        c = large(**{name: row[name] for name in ("checkpointing", "tokens_per_microbatch")})
        said, peak = sum(needs(c, config)["update"].values()), row["peak_gib"] * 2**30
        if row.get("out_of_memory"):
            assert said > 85e9  # the card's
        else:
            # Long responses do not fill a microbatch to the brim.
            assert peak <= said < (1.06 if row["response"] == 1024 else 1.12) * peak, row
        seen.append(row.get("out_of_memory", False))
    assert len(seen) == 9 and sum(seen) == 1

    # On the whole card, beside a sleeping vLLM: prompts of 4 to 20 tokens, so 7 rows a microbatch.
    recorded = json.loads((ROOT / "tutorial/results/bench_gpu_train.json").read_text())
    tokens = 7 * (recorded["response"] + 20)
    assert round(tokens, -2) == 7300 and 8192 // (recorded["response"] + 4) == 7
    said = sum(needs(large(tokens_per_microbatch=tokens), config)["update"].values())
    beside = recorded["summary"]["peak_gib"]["update"] * 2**30 - said
    assert 2.5e9 < beside < needs(large(), config, "vllm")["update"]["beside them"] == 3e9


def test_what_is_printed(capsys, loaded):
    """Catches: a warning whose flags are no flags, or do not help."""
    c, path = large(model=str(rollout.TINY), tasks="arithmetic", gpu_memory=0.375), str(rollout.TINY)
    gpu_memory.report(c, "hf", path, 80e9, 80e9)
    said = capsys.readouterr().out
    assert "80.0 free of 80.0" in said and "update" in said and "warning" not in said
    gpu_memory.report(c, "hf", path, 1.2e9, 80e9)
    said = capsys.readouterr().out
    flags = said.split("what would: ")[1].split()
    again = train.settings(train.parse_args(["--model", path, "--tasks", "arithmetic", *flags])[0])
    gpu_memory.report(again, "hf", path, 1.2e9, 80e9)
    assert flags and "warning" not in capsys.readouterr().out
    gpu_memory.report(c, "hf", path, 1e9, 80e9)
    assert "does not fit this GPU" in capsys.readouterr().out


def test_the_command(monkeypatch, capsys):
    """Catches: flags of train.py's that it does not take; a card that is not asked for; a traceback."""
    words = "gpu_memory.py --model tiny --max-new-tokens 99 --card 0.5 --optimizer adamw8bit"
    monkeypatch.setattr(sys, "argv", words.split())
    gpu_memory.main()
    assert "the GPU has 0.5 free of 0.5" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", "gpu_memory.py --model no-such-model".split())
    with pytest.raises(SystemExit, match="error: --model no-such-model: not tiny"):
        gpu_memory.main()


def test_train_prints_it(monkeypatch, capsys, tmp_path):
    """Where there is a GPU and before weights are loaded. Catches: a training run that does not find it."""
    monkeypatch.setattr(rollout, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1e9, 2e9))

    def no_weights(*_):
        raise ValueError("so far, so good")

    monkeypatch.setattr(rollout, "load_model", no_weights)
    words = ["--model", str(rollout.TINY), "--tasks", "arithmetic", "--limit", "64", "--engine", "hf"]
    with pytest.raises(SystemExit, match="so far, so good"):
        train.main([*words, "--out", str(tmp_path / "run")])
    assert "the GPU has 1.0 free of 2.0" in capsys.readouterr().out
