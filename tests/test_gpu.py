"""What the GPU computes, against float64 on the CPU: log-probs, gradients, steps, samples, a run of train.py.

Every body is a function of the device; without a GPU only its CPU half runs and the other is skipped.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import grpo
import knapsack
import rollout
import train
from rollout import HFSampler, Rollout

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
gpu = pytest.param("cuda", marks=no_gpu)
on_each_device = pytest.mark.parametrize("device", ["cpu", gpu])
V = 211

# Largest and mean error of a log-prob, in nats; relative error (2-norm) of a gradient and of a step.
# float32 rounds at 6e-8 (TF32 is off in torch unless asked for): 2e-6 and 1e-5 on a CPU, and another order
# of summation is worth no factor of ten. bfloat16 rounds every factor at 2e-3; the logits here are of size 1
# to 5, so 1e-2 each: 0.04, 0.009 and 0.015 on a CPU. Twice that is allowed; a wrong mask or position costs 1.
BOUND = {
    False: dict(largest=1e-4, mean=1e-5, gradient=1e-4),
    True: dict(largest=0.1, mean=0.02, gradient=0.03),
}
precisions = pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])


@pytest.fixture(scope="module")
def model():
    """A real architecture, random, in float32 on the CPU."""
    torch.manual_seed(0)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = Qwen2Config(vocab_size=V, hidden_size=64, intermediate_size=96, tie_word_embeddings=True,
                         initializer_range=0.1, **heads)  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def rollouts():
    """Ragged groups: prompts of 1 to 30 tokens, responses of 1 to 40; the sampler's log-probs a bit off."""
    rng, made = np.random.default_rng(0), []
    for group, n in enumerate((3, 1, 9, 2, 5)):
        prompt = tuple(rng.integers(V, size=rng.integers(1, 31)).tolist())
        for _ in range(n):
            ids = tuple(rng.integers(V, size=rng.integers(1, 41)).tolist())
            made.append(Rollout(group, prompt, ids, (-5.0,) * len(ids), ""))
    return [made[i] for i in rng.permutation(len(made))]


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors])


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((got - want).norm() / want.norm())


def logprobs_and_gradient(model, rollouts, **how) -> tuple[torch.Tensor, torch.Tensor]:
    logp = grpo.token_logprobs(model, rollouts, 0.7, **how)  # (N,)
    signs = torch.ones_like(logp)
    signs[::3] = -1  # as advantages have
    return flat([logp]), flat(torch.autograd.grad((signs * logp).sum(), list(model.parameters())))


@on_each_device
@precisions
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_log_probs_and_gradient(model, rollouts, device, bfloat16, shared, chunked, monkeypatch):
    """Catches: a kernel picked on this device that masks, pads or accumulates otherwise; autocast that the
    chunked head forgets; float32 products that are not."""
    want = logprobs_and_gradient(copy.deepcopy(model).double(), rollouts, share_prompts=shared)
    if chunked:
        monkeypatch.setattr(grpo, "_head", partial(grpo._head, chunk=50 * V))
    here = copy.deepcopy(model).to(device)
    got = logprobs_and_gradient(here, rollouts, share_prompts=shared, bfloat16=bfloat16)
    error = (got[0] - want[0]).abs()
    assert error.max() < BOUND[bfloat16]["largest"]
    assert error.mean() < BOUND[bfloat16]["mean"]
    assert (error.mean() > 1e-4) == bfloat16  # the flag does what it says
    assert off(got[1], want[1]) < BOUND[bfloat16]["gradient"]


def stepped(model, rollouts, device, **how) -> tuple[torch.Tensor, dict]:
    """(how far two minibatches of `grpo.update` moved each weight, its stats)."""
    model = copy.deepcopy(model).to(device)
    before = flat(model.parameters())
    # eps above the rounding of small gradients, whose mere sign would otherwise decide the step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-2, weight_decay=0.0)
    advantages = grpo.group_advantages(np.arange(len(rollouts)) % 2, [r.group for r in rollouts])
    stats = grpo.update(
        model, optimizer, rollouts, advantages, minibatches=2, tokens_per_microbatch=300, **how
    )
    return flat(model.parameters()) - before, stats


@on_each_device
@precisions
def test_update(model, rollouts, device, bfloat16):
    """Catches: what only a whole update shows on this device: tensors left on the other one, the optimizer's
    own kernels, old log-probs in another precision than the new ones."""
    want, oracle = stepped(copy.deepcopy(model).double(), rollouts, "cpu", bfloat16=False)
    got, stats = stepped(model, rollouts, device, bfloat16=bfloat16)
    assert off(got, want) < BOUND[bfloat16]["gradient"]
    for name in ("loss", "grad_norm", "kl", "entropy_live"):
        assert stats[name] == pytest.approx(oracle[name], rel=0.02 if bfloat16 else 1e-4, abs=1e-6), name
    assert stats["steps_skipped"] == 0 and stats["skipped_tokens"] == oracle["skipped_tokens"] > 0


@on_each_device
def test_sampler(loaded, prompts, device):
    """Catches: a draw that is not from the distribution it reports, and log-probs that are not the
    trainer's, whose kernels and padding are others (the canary's gap; bfloat16 on a GPU)."""
    model = copy.deepcopy(loaded[0]).to(device)
    rolled = HFSampler(model, loaded[1], max_new_tokens=30).sample(prompts, [4, 0, 9, 1, 30], seed=0)
    with torch.no_grad():
        ours = grpo.token_logprobs(model, rolled).cpu().numpy()
    gap = np.abs(ours - np.concatenate([r.logprobs for r in rolled])).mean()
    assert gap < (1e-5 if device == "cpu" else train.CANARY_BOUND["cuda"] / 10)

    n = 4000
    rolled = HFSampler(model, loaded[1], max_new_tokens=1).sample(prompts[:1], [n], seed=1)
    with torch.no_grad():
        p = loaded[0](torch.tensor([prompts[0]])).logits[0, -1].softmax(-1).numpy()
    drawn = np.bincount([r.response_ids[0] for r in rolled], minlength=len(p)) / n
    assert np.abs(drawn - p).max() < 5 * np.sqrt(0.25 / n)  # five standard errors of the likeliest


@on_each_device
def test_solve_dp_torch(device):
    """Catches: a device whose maximum or index arithmetic differs. (Of equal choices it may take another.)"""
    rng = np.random.default_rng(0)
    values = knapsack.value(np.arange(2, 34), rng.beta(0.5, 0.5, size=(40, 1)))  # (M, K)
    values[::2] = rng.random((20, 32))  # not concave
    counts = knapsack.solve_dp_torch(torch.tensor(values, device=device), 300)
    assert counts.device.type == device
    got, want = counts.cpu().numpy(), knapsack.solve_dp(values, 300)
    rows = np.arange(40)
    assert got.sum() <= 300
    assert values[rows, got].sum() == pytest.approx(values[rows, want].sum(), rel=1e-12)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), gpu])
def test_train(main, tmp_path, monkeypatch, device):
    """Catches: a run, its checkpoint and its resumption that hold on a CPU only."""
    monkeypatch.setattr(rollout, "device", lambda: device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    out, sizes = tmp_path / "run", ["--prompts", 8, "--budget", 64, "--held-out", 8, "--eval-samples", 1]
    code, said = main("--engine", "hf", "--steps", 2, "--save-every", 1, *sizes, "--out", out)
    assert code == 0, said
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoint" / "step-000002")
    code, said = main("--resume", out)
    assert code == 0 and "resuming after step 1" in said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    if device == "cuda":
        assert rows[-1]["mem_peak_gib"] > 0.005  # 0.6M parameters x 16 bytes: it was trained there


@pytest.mark.slow
def test_everything_in_one_command(tmp_path):
    """Catches: a measurement that no longer runs on the day there is a GPU; a stage that stops the next one,
    or is done twice; a bench that forgets what it had. At toy shape, without the GPU."""
    settings = {"PYTHON": sys.executable, "STEPS": "2", "SEEDS": "0", "CUDA_VISIBLE_DEVICES": ""}

    def run() -> tuple[dict, str]:
        command = ["bash", str(Path(__file__).parent / "bench" / "gpu.sh"), str(tmp_path)]
        subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, timeout=600)
        return json.loads((tmp_path / "bench_gpu.json").read_text()), (tmp_path / "summary.txt").read_text()

    (tmp_path / "tests.done").touch()
    bench, summary = run()
    assert "\ntests: " not in summary and "\ntrain-vllm: " in summary
    done = ["learn-knapsack-0", "cpu-knapsack-0", "bench_gpu", "bench_gpu_train", "bench_gpu_learn"]
    assert [name for name in done if f"\n{name}: done in" not in summary] == [], summary
    assert len(bench["update"]) == 10 and bench["sample"]["logprob_gap"] < 1e-5
    for row in bench["update"]:
        assert row["seconds"] > 0 and row["utilisation"] > 0
        assert row["skipped_tokens"] == pytest.approx(row["silent"])

    large = json.loads((tmp_path / "bench_gpu_train.json").read_text())
    assert [row["effective_prompts"] for row in large["rows"][1:]] == [1, 1, 1]  # nothing was skipped
    assert all(row["response_tokens"] == large["response"] for row in large["rows"][1:])
    phases = ["allocate", "sample", "verify", "canary and sleep", "update", "wake and sync"]
    assert list(large["summary"]["seconds"]) == list(large["summary"]["peak_gib"]) == phases
    names = [f"time_{name}" for name in ("allocate", "sample", "verify", "sync", "update")]
    by_clock = np.mean([sum(row[name] for name in names) for row in large["rows"][2:]])
    assert large["summary"]["seconds_a_step"] == pytest.approx(by_clock, abs=2e-3)  # what was rounded

    # Here both runs are a CPU's, and a seed decides everything.
    learn = json.loads((tmp_path / "bench_gpu_learn.json").read_text())
    assert learn["apart_from_step"] is None
    assert [(row["step"], row["difference"]) for row in learn["held_out"]] == [(0, 0), (2, 0)]

    (tmp_path / "bench_gpu.done").unlink()  # as if its time had run out
    again, summary = run()
    assert again == bench
    assert summary.count("learn-knapsack-0: done in") == 1 and summary.count("bench_gpu: done in") == 2
