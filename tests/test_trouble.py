"""Numerical trouble is seen, named, and survived or ended with advice: each test provokes one kind."""

import dataclasses
import json
import shutil
import signal
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import grpo
import rollout
import train

SMALL = ["--prompts", 4, "--budget", 16, "--held-out", 8, "--eval-samples", 1, "--engine", "hf"]


def file_of(path, answer):
    """Forty sums of two digits below ten, with answer(sum) for an answer."""
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10) if a + b < 10]
    rows = [{"prompt": f"{a}+{b}=", "answer": str(answer(a + b))} for a, b in sums]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_silent_batches_end_the_run_with_advice(main, tmp_path):
    """No answer is ever right: no group is mixed, no step is taken, and hours would pass."""
    out, tasks = tmp_path / "run", file_of(tmp_path / "tasks.jsonl", lambda total: total + 100)
    error, _ = main(*SMALL, "--tasks", tasks, "--out", out, "--steps", 50)
    assert "every group was silent, 0% all right" in error and "bring easier tasks" in error
    last = (out / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == train.PATIENCE
    assert train.newest_checkpoint(out)[1]["step"] == train.PATIENCE  # what was learned before is not lost
    assert not (out / "final").exists()


def test_cut_responses_and_lost_entropy_show_in_each_line(main, tmp_path):
    """Catches: a run whose answers are all cut, or that explores nothing, and looks healthy."""
    shutil.copytree(rollout.TINY, tmp_path / "sure")
    weights = load_file(tmp_path / "sure" / "model.safetensors")
    weights["model.norm.weight"] *= 100  # it always says the same
    save_file(weights, tmp_path / "sure" / "model.safetensors", metadata={"format": "pt"})
    flags = ["--model", tmp_path / "sure", "--tasks", "arithmetic", "--limit", 40, "--steps", 1]
    _, said = main(*SMALL, *flags, "--out", tmp_path / "run", "--max-new-tokens", 1)
    assert "cut 1.00  entropy 0.00" in said


def test_one_good_step_is_no_reason_to_stop():
    """Catches: a run ended by a single bad batch, or before there are enough of them."""
    bad = {"all_right": 1, "effective_rollouts": 0, "steps_skipped": 0}
    rows = [bad] * train.PATIENCE
    assert "bring harder tasks" in train.hopeless(rows)
    assert train.hopeless(rows[1:]) is None
    assert train.hopeless([*rows[1:], bad | {"effective_rollouts": 0.1}]) is None


def test_three_steps_that_were_not_taken_end_the_run():
    """Catches: a run that goes on for hours while no update is ever taken."""
    good = {"all_right": 0, "effective_rollouts": 0.5, "steps_skipped": 0, "loss": 0.1}
    skipped = good | {"steps_skipped": 2, "loss": None}
    assert "not finite three steps in a row" in train.hopeless([good, skipped, skipped, skipped])
    assert train.hopeless([skipped, skipped, good, skipped, skipped]) is None
    assert train.hopeless([good | {"steps_skipped": 1}] * 3) is None  # one minibatch of several


def test_weights_that_blow_up_are_named_and_not_saved(main, tmp_path, monkeypatch):
    """A step that throws the weights out of range."""
    step = torch.optim.AdamW.step

    def too_far(self):
        step(self)
        self.param_groups[0]["params"][0].data *= float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", too_far)
    error, _ = main(*SMALL, "--out", tmp_path / "run", "--steps", 9, "--save-every", 1)
    assert "training has blown up: start again with a lower --lr" in error and "\n" not in error
    assert not (tmp_path / "run" / "final").exists()
    assert "not saved" in error  # the newest one is of step 1, whose groups were all silent
    assert train.newest_checkpoint(tmp_path / "run")[1]["step"] == 1


def test_a_log_prob_that_is_no_number_is_one_line(main, tmp_path, monkeypatch):
    """Catches: NaN in a rollout that the canary does not look at."""
    honest = rollout.HFSampler.sample

    def spoilt(self, prompts, counts, seed):
        rollouts = honest(self, prompts, counts, seed)
        nan = (float("nan"),) * len(rollouts[1].logprobs)
        return [rollouts[0], dataclasses.replace(rollouts[1], logprobs=nan), *rollouts[2:]]

    monkeypatch.setattr(rollout.HFSampler, "sample", spoilt)
    error, _ = main(*SMALL, "--out", tmp_path / "run")
    assert "the model's log-probs are not finite" in error and "\n" not in error


def test_a_full_gpu_is_one_line(main, tmp_path, monkeypatch):
    """Catches: a traceback where a smaller batch is all that is needed; another error taken for this one."""

    said = "stopped: out of GPU memory: {} with a lower --tokens-per-microbatch"
    held, close = [], rollout.HFSampler.close

    def full(*_, **__):
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def full_card(*_):
        raise RuntimeError("CUDA Error: out of memory at csrc/cumem_allocator.cpp:131")

    def closed(self):
        held.append(held[0]())
        close(self)

    monkeypatch.setattr(grpo, "update", full)
    monkeypatch.setattr(rollout.HFSampler, "close", closed)
    error, _ = main(*SMALL, "--out", tmp_path / "run")
    assert said.format(f"python train.py --resume {tmp_path / 'run'}") in error
    assert held[1] is None  # an engine that wakes up to be closed has room again
    # While it is set up; in vLLM's own words.
    with monkeypatch.context() as m:
        m.setattr(rollout.HFSampler, "sync", full_card)
        error, _ = main(*SMALL, "--out", tmp_path / "early")
        assert said.format("start again") in error
    with monkeypatch.context() as m:  # a reward's own container is no GPU of ours
        m.setattr("reward.Verifier.__call__", full_card)
        with pytest.raises(RuntimeError, match="reward Verifier failed"):
            main(*SMALL, "--out", tmp_path / "reward")
    monkeypatch.setattr(grpo, "update", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(*SMALL, "--out", tmp_path / "other")


def test_a_second_signal_ends_the_run_at_once(main, tmp_path, monkeypatch):
    def twice(*_, **__):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(grpo, "update", twice)
    error, _ = main(*SMALL, "--out", tmp_path / "run")
    assert error == f"interrupted; go on with: python train.py --resume {tmp_path / 'run'}"


def test_a_signal_during_a_save_ends_the_run_there(main, tmp_path, monkeypatch):
    """Catches: a further step, which may take minutes, before a run that was just saved stops."""
    save = train.save_checkpoint

    def interrupted(run):
        save(run)
        if run.state["step"] == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "save_checkpoint", interrupted)
    code, said = main(*SMALL, "--out", tmp_path / "run", "--steps", 3, "--save-every", 1)
    assert code == 130 and "stopped after step 1; go on with" in said


def test_a_sampler_with_other_weights_ends_the_run(main, tmp_path, monkeypatch):
    """The sampler says every token was a nat likelier than the trainer says: it is another policy."""
    honest = rollout.HFSampler.sample

    def stale(self, prompts, counts, seed):
        rollouts = honest(self, prompts, counts, seed)
        return [
            rollout.Rollout(r.group, r.prompt_ids, r.response_ids, tuple(np.array(r.logprobs) + 1), r.text)
            for r in rollouts
        ]

    monkeypatch.setattr(rollout.HFSampler, "sample", stale)
    error, _ = main(*SMALL, "--out", tmp_path / "run", "--steps", 3)
    assert error.startswith("train.py: stopped: the sampler's log-probs are 1 nats from the trainer's")
    assert "\n" not in error and not (tmp_path / "run" / "final").exists()
