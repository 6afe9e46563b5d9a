"""rollout.VLLMSampler on the real engine: vLLM's CPU build, the embedded model. How to run: README."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from test_rollout import COUNTS, check_records, same_tokens

import grpo
import rollout
import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
ROOT = Path(__file__).parent.parent


LONG = "+".join("123456789" * 3) + "="  # 54 tokens: more than one block of vLLM's prefix cache


@pytest.fixture(scope="module")
def engine(loaded):
    sampler = rollout.VLLMSampler(str(TINY), loaded[1], max_new_tokens=30, max_prompt_tokens=64)
    yield sampler
    sampler.close()


@pytest.fixture
def changed(loaded):
    """Other weights: the shipped ones and noise."""
    model = copy.deepcopy(loaded[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def gap(model, rollouts, temperature=1.0):
    """|trainer's - sampler's log-prob| of every token."""
    with torch.no_grad():
        ours = grpo.token_logprobs(model, rollouts, temperature).numpy()
    return np.abs(ours - np.concatenate([r.logprobs for r in rollouts]))


# The layers that Llama's, Qwen's and their like have in vLLM, and the trainer's that each is made of.
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}


def read_back(engine, model, column: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer: (the engine's, the trainer's)}: one column of every matrix and of the head, and every norm.

    vLLM fuses matrices, and its CPU build keeps them in a packed form that cannot be read. So a unit
    vector goes through the layer: what comes out is the column, exactly, in whatever form it is kept.
    """
    state = {**model.state_dict(), "lm_head.weight": model.get_output_embeddings().weight}
    matrices = {"lm_head": ["lm_head"]}  # the engine's layer: the trainer's
    for i in range(model.config.num_hidden_layers):
        for fused, parts in FUSED.items():
            module, _, _ = fused.partition(".")
            matrices[f"model.layers.{i}.{fused}"] = [f"model.layers.{i}.{module}.{p}" for p in parts]

    def read(inner) -> dict[str, torch.Tensor]:
        parameters = dict(inner.named_parameters())
        like = next(p for p in parameters.values() if p.numel())
        found = {n: parameters[n].detach().cpu() for n in parameters if n.endswith("norm.weight")}
        for name, parts in matrices.items():
            layer, width = inner.get_submodule(name), state[parts[0] + ".weight"].shape[1]
            unit = torch.zeros(1, width, dtype=like.dtype, device=like.device)
            unit[0, column % width] = 1
            found[name] = layer.quant_method.apply(layer, unit, bias=None)[0].detach().cpu()
        return found

    pairs = {}
    for name, got in engine.llm.apply_model(read)[0].items():
        if name in matrices:
            weights = [state[part + ".weight"] for part in matrices[name]]
            want = torch.cat([w[:, column % w.shape[1]] for w in weights])
            got = got[: len(want)]  # the vocabulary is padded
        else:
            want = state[name]
        pairs[name] = (got, want.detach().to("cpu", got.dtype))
    return pairs


def lost(engine, model, column: int = 5) -> list[str]:
    """The layers of the engine that do not hold the trainer's weights."""
    return [name for name, (a, b) in read_back(engine, model, column).items() if not torch.equal(a, b)]


def trips_the_canary(model, rollouts):
    try:
        train.canary(model, rollouts, train.Config())
    except train.RunStopped as stopped:
        return "it samples from other weights" in str(stopped)
    return False


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vllm_records_and_logprobs(engine, loaded, prompts, temperature, monkeypatch):
    """The same contract as the other sampler's, and the canary's gap: its log-probs are the model's."""
    monkeypatch.setattr(engine, "temperature", temperature)
    rollouts = engine.sample(prompts, COUNTS, seed=1)
    check_records(rollouts, prompts, COUNTS, loaded[1], 30)
    assert gap(loaded[0], rollouts, temperature).max() < 1e-4
    assert same_tokens(rollouts, engine.sample(prompts, COUNTS, seed=1))
    assert not same_tokens(rollouts, engine.sample(prompts, COUNTS, seed=2))


def test_vllm_groups_do_not_depend_on_their_place_in_the_batch(engine, prompts):
    """Catches: seeds by position. Rounding differs with the batch, so a token may differ; not a group."""
    once = engine.sample(prompts, COUNTS, seed=4)
    turned = sorted(engine.sample(prompts[::-1], COUNTS[::-1], seed=4), key=lambda r: -r.group)
    same = [a.response_ids == b.response_ids for a, b in zip(once, turned, strict=True)]
    assert np.mean(same) >= 0.8
    twice = engine.sample([prompts[2], prompts[2]], [4, 4], seed=6)
    assert [r.response_ids for r in twice[:4]] != [r.response_ids for r in twice[4:]]


def test_vllm_takes_large_ragged_groups(engine, prompts, loaded):
    counts = [128, 0, 2, 37, 1]
    check_records(engine.sample(prompts, counts, seed=3), prompts, counts, loaded[1], 30)


def test_vllm_follows_the_trainers_weights(engine, loaded, prompts, changed):
    """Catches: weights, the tied head, or a prefix cache that stay what they were after an update."""
    prompts = [*prompts, *rollout.encode_prompts(loaded[1], [LONG])]
    counts = [*COUNTS, 4]
    engine.sample(prompts, counts, seed=1)  # fills the prefix cache with the old weights
    engine.sync(changed)
    assert not any(lost(engine, changed, column) for column in range(3))
    rollouts = engine.sample(prompts, counts, seed=1)
    assert gap(changed, rollouts).max() < 1e-4 < 0.05 < gap(loaded[0], rollouts).mean()
    assert not trips_the_canary(changed, rollouts) and trips_the_canary(loaded[0], rollouts)
    engine.sync(loaded[0])


def test_trap_a_head_left_behind(engine, loaded, prompts, changed, monkeypatch):
    """named_parameters() of a tied model has no lm_head.weight; vLLM then keeps its old head, silently."""
    monkeypatch.setattr(changed, "state_dict", lambda: dict(changed.named_parameters()))
    engine.sync(changed)
    assert lost(engine, changed) == ["lm_head"]
    assert trips_the_canary(changed, engine.sample(prompts, COUNTS, seed=1))
    monkeypatch.undo()
    engine.sync(loaded[0])


def test_trap_a_prefix_cache_that_was_not_emptied(engine, loaded, changed, monkeypatch):
    prompts = rollout.encode_prompts(loaded[1], [LONG])
    engine.sample(prompts, [4], seed=1)
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
        engine.sync(changed)
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: True)  # says so and does nothing
    engine.sync(changed)
    assert trips_the_canary(changed, engine.sample(prompts, [8], seed=1))
    monkeypatch.undo()
    engine.sync(changed)
    assert not trips_the_canary(changed, engine.sample(prompts, [8], seed=1))
    engine.sync(loaded[0])


@pytest.mark.parametrize("fused", [False, True])
def test_trap_a_skipped_sync(engine, loaded, prompts, fused):
    """One AdamW step of lr 1e-7 moves no log-prob that a canary could see, and autograd's count of changes
    does not notice the fused optimizer; the fingerprint does."""
    model = copy.deepcopy(loaded[0])
    engine.sync(model)
    rollouts = engine.sample(prompts, COUNTS, seed=1)
    grpo.token_logprobs(model, rollouts).sum().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-7, fused=fused).step()
    with pytest.raises(RuntimeError, match="has changed since the last sync"):
        engine.sample(prompts, COUNTS, seed=1)
    assert not trips_the_canary(model, rollouts)
    engine.sync(model)
    assert len(engine.sample(prompts, COUNTS, seed=1)) == sum(COUNTS)
    engine.sync(loaded[0])


def test_read_back_covers_every_kind_of_weight(engine, loaded):
    """Catches: a proof that compares nothing, or not the part of a fused matrix that was lost."""
    layers = loaded[0].config.num_hidden_layers
    assert len(read_back(engine, loaded[0], 5)) == 1 + layers * (len(FUSED) + 2) + 1
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm"):
        model = copy.deepcopy(loaded[0])
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if name in n and n.endswith("weight")).mul_(1.01)
        assert len(lost(engine, model)) == 1, name


def test_an_interrupted_batch_leaves_nothing_behind(engine, prompts, monkeypatch):
    """Catches: requests of an interrupted call that come back, paired with prompts of the next one."""
    want = engine.sample(prompts, COUNTS, seed=7)
    calls, step = [], engine.llm.llm_engine.step

    def interrupted():
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine.llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.sample(prompts[::-1], [9] * 5, seed=8)
    monkeypatch.undo()
    assert same_tokens(want, engine.sample(prompts, COUNTS, seed=7))


def test_a_bfloat16_engine_under_a_float32_trainer(loaded, prompts, changed):
    """Rounded once, exactly; the canary's gap stays under its bound and a stale engine's does not."""
    sampler = rollout.VLLMSampler(
        str(TINY), loaded[1], max_new_tokens=30, max_prompt_tokens=64, dtype="bfloat16"
    )
    try:
        sampler.sync(changed)
        assert not lost(sampler, changed)
        rollouts = sampler.sample(prompts, COUNTS, seed=1)
        assert 1e-5 < gap(changed, rollouts).mean() < train.CANARY_BOUND["cuda"] / 10
        assert gap(loaded[0], rollouts).mean() > train.CANARY_BOUND["cuda"]
    finally:
        sampler.close()


# ------------------------------------------------------------------------------- the whole program

FLAGS = ["--engine", "vllm", "--prompts", "16", "--budget", "96", "--held-out", "20", "--eval-samples", "2"]


def start(out, *flags):
    """train.py with a mark in its environment, by which whatever it leaves behind can be found."""
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS, "--out", str(out), *map(str, flags)]
    marked = os.environ | {"RUN_MARK": str(out)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=marked)


def processes_of(out) -> list[str]:
    """The processes of that run, by their mark."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"RUN_MARK={out}".encode() in environ.read_bytes().split(b"\0"):
                found.append(environ.parent.name)
        except OSError:  # it has just ended, or is somebody else's
            continue
    return found


def all_gone(out) -> bool:
    """Have all of them ended, within a moment?"""
    deadline = time.time() + 5
    while processes_of(out) and time.time() < deadline:
        time.sleep(0.1)
    return not processes_of(out)


def test_the_main_job(tmp_path):
    process = start(tmp_path / "run", "--steps", 3)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert all(m["logprob_gap"] < 1e-4 for m in metrics[1:])  # new weights arrived after every update
    assert len((stdout + stderr).splitlines()) < 20  # no wall of log
    assert all_gone(tmp_path / "run")


def test_it_goes_on(tmp_path):
    """Catches: an engine that takes the optimizer's moments in a checkpoint for weights; one that goes on
    from the model that the run began with."""
    run = tmp_path / "run"
    _, stderr = start(run, "--steps", 2, "--lr", 1e-3).communicate(timeout=300)
    words = [sys.executable, str(ROOT / "train.py"), "--resume", str(run), "--steps", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + stderr
    *_, row = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert row["step"] == 3 and row["logprob_gap"] < 1e-4


def test_the_gpu_bench_runs(tmp_path):
    """Catches: a bench that no longer runs on the day there is a GPU; responses that end early."""
    bench = ROOT / "tests" / "bench" / "bench_gpu_vllm.py"
    command = [sys.executable, str(bench), str(tmp_path / "bench.json")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    bench = json.loads((tmp_path / "bench.json").read_text())
    phases = [row["phase"] for row in bench["phases"] if row["seconds"] >= 0]
    step = ["generate", "canary", "sleep", "update", "wake and sync"]
    assert phases[4:] == [*step * 3, *["sampler", "bare", "bare, no seeds", "bare, no log-probs"] * 3]
    for row in bench["steps"]:
        assert row["shortest_response"] == bench["response"] and row["grad_norm"] > 0
        assert row["logprob_gap"] < 1e-4  # and the engine held new weights each time, or sync would have said
    assert all(speed > 0 for speed in bench["tokens_per_second"].values())


@pytest.mark.parametrize("how", ["Ctrl-C", "Ctrl-C twice", "a bug"])
def test_it_ends_cleanly(tmp_path, how):
    """Catches: an engine that outlives the run."""
    process = start(tmp_path / "run", "--steps", 1000, "--save-every", 2)
    deadline = time.time() + 200
    while not (tmp_path / "run" / "checkpoint" / "step-000002").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert processes_of(tmp_path / "run")  # the mark works
    if how == "a bug":  # a disk that goes away under it
        (tmp_path / "run" / "checkpoint").rename(tmp_path / "gone")
        (tmp_path / "run" / "checkpoint").write_text("")
    else:
        process.send_signal(signal.SIGINT)
        if how == "Ctrl-C twice":
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, None), stderr
    assert all_gone(tmp_path / "run")
