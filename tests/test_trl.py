"""Knapsack RL inside TRL (tutorial/scale_out/trl_knapsack.py) on the embedded model, against plain TRL.

TRL lives in a virtual environment of its own: tutorial/scale_out/requirements-trl.txt. Elsewhere: skipped.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip(
    "trl", reason="TRL is not installed: pip install -r tutorial/scale_out/requirements-trl.txt"
)

import numpy as np
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tutorial" / "scale_out"))
import trl_knapsack
from trl_knapsack import ROOT, KnapsackGRPOTrainer

import knapsack
import reward

M, EACH = 8, 32
SCRIPT = [[128, 2, 60, 2, 2, 2, 2, 58], [2, 2, 60, 2, 128, 2, 60, 0]]  # then the knapsack decides


def right(completions, answer, **_):
    return [float(c.split()[-1:] == [a]) for c, a in zip(completions, answer, strict=True)]


def short(completions, **_):
    """A reward that is no whole number: sums of it depend on the order of adding."""
    return [0.1 / (1 + len(c)) for c in completions]


def make(cls, folder, rows=M * EACH, each=EACH, tasks=32, ranks=1, reward_funcs=right, **settings):
    """A trainer of the embedded model: `rows` rollouts an optimizer step, in two microbatches a rank."""
    # Sums from which the embedded model, which is wrong at some of them, makes mixed groups.
    rows_of_tasks = [
        {"id": t.id, "prompt": t.prompt, "answer": t.answer} for t in reward.load_tasks("arithmetic")[:tasks]
    ]
    defaults = dict(
        per_device_train_batch_size=rows // 2 // ranks, gradient_accumulation_steps=2, num_generations=each,
        max_completion_length=24, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    config = GRPOConfig(str(folder), **(defaults | settings))
    dataset = Dataset.from_list(rows_of_tasks)
    return cls(str(ROOT / "tutorial" / "tiny_model"), reward_funcs, config, dataset)


class Uniform(KnapsackGRPOTrainer):
    def allocate(self, ids, budget):
        return knapsack.uniform(len(ids), budget)


class Scripted(KnapsackGRPOTrainer):
    """Counts from SCRIPT, then the knapsack's. Keeps what each step's batch was on this rank."""

    def allocate(self, ids, budget):
        steps = self.__dict__.setdefault("steps", [])
        counts = SCRIPT[len(steps)] if len(steps) < len(SCRIPT) else super().allocate(ids, budget).tolist()
        steps.append({"ids": ids, "counts": counts})
        return counts

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        decode = self.processing_class.decode
        self.steps[-1]["rows"] = [
            [decode(p[pm.bool()]), decode(c[cm.bool()], skip_special_tokens=True), float(a)]
            for p, pm, c, cm, a in zip(
                output["prompt_ids"], output["prompt_mask"], output["completion_ids"],
                output["completion_mask"], output["advantages"], strict=True,
            )
        ]  # fmt: skip
        return output


def weights(trainer):
    return {k: v.clone() for k, v in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def naive(rewards):
    """Advantages of one group, in float64."""
    r = np.array(rewards, float)
    std = r.std(ddof=1) if len(r) > 1 else np.nan
    return np.nan_to_num((r - r.mean()) / (std + 1e-4))


# -------------------------------------------------------------------------- the advantages by themselves


def test_group_statistics_against_a_loop():
    """Catches: groups mixed up, the biased std, an empty or a single group that spoils its neighbours."""
    rng = np.random.default_rng(0)
    counts = [128, 1, 0, 7, 2, 33, 0]
    group = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    rewards = rng.random(len(group))
    rewards[rng.random(len(group)) < 0.1] = np.nan  # could not be scored: not part of its group
    mean, std = trl_knapsack.group_statistics(torch.from_numpy(rewards), torch.from_numpy(group), len(counts))
    for g in set(group.tolist()):
        own = rewards[(group == g) & ~np.isnan(rewards)]
        np.testing.assert_allclose(mean[group == g], np.mean(own) if len(own) else np.nan, rtol=1e-12)
        np.testing.assert_allclose(
            std[group == g], own.std(ddof=1) if len(own) > 1 else np.nan, rtol=1e-6, equal_nan=True
        )


# ------------------------------------------------------------------------------- against plain TRL


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_uniform_counts_are_plain_trl_to_the_bit(loss_type, tmp_path):
    """Catches: any change to the rows, their order, the random numbers, the advantages or the loss."""
    result = {}
    for cls in (GRPOTrainer, Uniform):
        trainer = make(
            cls, tmp_path, rows=48, each=6, reward_funcs=[right, short], loss_type=loss_type, max_steps=4
        )
        before = weights(trainer)
        trainer.train()
        assert not same(before, weights(trainer))  # something was learnt, so there is something to compare
        result[cls] = weights(trainer), list(trainer._logs["advantages"])
    assert same(result[GRPOTrainer][0], result[Uniform][0])
    assert result[GRPOTrainer][1] == result[Uniform][1]


# --------------------------------------------------------------------------------- one process and two


def run_script(folder, ranks=1):
    trainer = make(Scripted, folder, ranks=ranks, max_steps=3)
    before = weights(trainer)
    trainer.train()
    assert not same(before, weights(trainer))
    checksum = {k: v.double().sum().item() for k, v in weights(trainer).items()}
    log = [row for row in trainer.state.log_history if "knapsack/effective_rollouts" in row]
    return dict(
        steps=trainer.steps, checksum=checksum, tracker=trainer.tracker.state_dict(),
        mean_length=trainer.mean_length, log=log, ranks=trainer.accelerator.num_processes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run_script(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same on two processes; this file is their program. [rank 0's, rank 1's]"""
    folder = tmp_path_factory.mktemp("two")
    # Not `accelerate launch --cpu --num_processes 2`: that silently runs one process.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)]


def check_groups(steps_of_ranks):
    """Rows of all ranks, regrouped by the text of their prompt: as many as allocated, and advantages as in a
    loop over the rewards computed anew from the text of the completion."""
    answers = {t.prompt: t.answer for t in reward.load_tasks("arithmetic")}
    prompt_of = {t.id: t.prompt for t in reward.load_tasks("arithmetic")}
    for ranks in zip(*steps_of_ranks, strict=True):
        rows = [row for step in ranks for row in step["rows"]]
        expected = dict(zip(map(prompt_of.get, ranks[0]["ids"]), ranks[0]["counts"], strict=True))
        assert Counter(p for p, _, _ in rows) == Counter(expected)
        assert len({len(step["rows"]) for step in ranks}) == 1
        for prompt in expected:
            group = [row for row in rows if row[0] == prompt]
            rewards = right([c for _, c, _ in group], [answers[prompt]] * len(group))
            if group:
                np.testing.assert_allclose([a for _, _, a in group], naive(rewards), atol=1e-5)


def check_tracker(result, steps_of_ranks):
    """What the tracker holds is what the rollouts said: replayed into a fresh one from the texts."""
    answers = {t.prompt: (t.id, t.answer) for t in reward.load_tasks("arithmetic")}
    fresh = knapsack.SuccessTracker()
    for ranks in zip(*steps_of_ranks, strict=True):
        outcomes = {i: [] for i in ranks[0]["ids"]}
        for prompt, completion, _ in (row for step in ranks for row in step["rows"]):
            outcomes[answers[prompt][0]] += right([completion], [answers[prompt][1]])
        counts = list(map(len, outcomes.values()))
        fresh.update(list(outcomes), list(map(sum, outcomes.values())), counts)
        mixed = [0 < sum(x) < len(x) for x in outcomes.values()]
        yield dict(
            effective_rollouts=np.dot(mixed, counts) / sum(counts),
            effective_prompts=np.mean(mixed), largest_group=max(counts),
        )  # fmt: skip
    assert result["tracker"] == fresh.state_dict()


def test_groups_in_one_process(one):
    """Catches: a prompt that gets another's number of rollouts, advantages of another group or row, a
    tracker fed with the wrong prompt, figures of TRL's own groups in the log."""
    check_groups([one["steps"]])
    assert [step["counts"] for step in one["steps"][:2]] == SCRIPT
    assert one["ranks"] == 1 and len(one["steps"]) == 3
    for figures, logged in zip(check_tracker(one, [one["steps"]]), one["log"], strict=True):
        for name, value in figures.items():
            assert logged[f"knapsack/{name}"] == pytest.approx(value)
        assert logged["frac_reward_zero_std"] == pytest.approx(1 - figures["effective_rollouts"], abs=1e-6)


def test_two_processes_agree(one, two):
    """Catches: ranks that allocate differently, rows dealt to the wrong rank, a rank that takes the other's
    advantages, trackers or weights that drift apart, and a launch that in truth runs one process."""
    assert [rank["ranks"] for rank in two] == [2, 2]
    steps = [rank["steps"] for rank in two]
    check_groups(steps)
    for _ in check_tracker(two[0], steps):
        pass
    for name in ("checksum", "tracker", "mean_length"):
        assert two[0][name] == two[1][name], name
    for a, b, alone in zip(*steps, one["steps"], strict=True):
        assert a["ids"] == b["ids"] == alone["ids"]
        assert a["counts"] == b["counts"]
    assert [step["counts"] for step in steps[0][:2]] == SCRIPT
    # Nothing is known of lengths in the first step: every group is cut evenly.
    halves = [Counter(p for p, _, _ in rank[0]["rows"]) for rank in steps]
    assert max(abs(halves[0][p] - halves[1][p]) for p in halves[0] | halves[1]) <= 1


# ------------------------------------------------------------------------------------------- resume


def test_resume_is_the_same_run(tmp_path):
    """Catches: a tracker that is not saved, or not loaded: the counts after the resume would differ."""
    # Unshuffled: beyond its first epoch a resumed TRL shuffles anew, with or without us.
    settings = dict(rows=64, each=8, tasks=16, save_strategy="steps", save_steps=2, max_steps=5)
    settings |= dict(shuffle_dataset=False)
    whole = make(KnapsackGRPOTrainer, tmp_path / "run", **settings)
    whole.train()
    again = make(KnapsackGRPOTrainer, tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same(weights(whole), weights(again))
    assert whole.tracker.state_dict() == again.tracker.state_dict()
    assert whole.mean_length == again.mean_length
    sizes = [r["knapsack/largest_group"] for r in whole.state.log_history if "knapsack/largest_group" in r]
    assert max(sizes) > 8  # or a lost tracker could not have shown


# ------------------------------------------------------------------------- vLLM, evaluation, errors


def test_server_completions_belong_to_their_prompts(tmp_path):
    """Catches: TRL's num_generations handed through to the vLLM server, which then answers prompts 0, 8, 16,
    ... and hands the answers to their neighbours. The server here answers each prompt with itself."""

    class Server:
        def sync_weights(self):
            pass

        def generate(self, prompts, images, num_generations, profiler):  # as in VLLMGeneration, mode "server"
            asked = prompts[::num_generations]
            answers = [ids for ids in asked for _ in range(num_generations)]
            return prompts, answers, [[[0.0]] * len(ids) for ids in answers], None

    trainer = make(KnapsackGRPOTrainer, tmp_path, rows=64, each=8)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Server(), -1
    trainer.model.train()
    ragged = [[i, i + 1] for i, n in enumerate([40, 2, 10, 2, 2, 2, 2, 4]) for _ in range(n)]
    assert trainer._generate_single_turn(ragged, None, {}, trainer.num_generations)[0] == ragged
    trainer.model.eval()
    equal = [[i, i + 1] for i in range(8) for _ in range(8)]
    assert trainer._generate_single_turn(equal, None, {}, 8)[0] == equal


def test_evaluation_is_trls(tmp_path):
    """Catches: evaluation rollouts that are reallocated or that feed the tracker."""
    trainer = make(KnapsackGRPOTrainer, tmp_path, rows=64, each=8, per_device_eval_batch_size=16)
    dataset = trainer.train_dataset.select(range(4))
    assert 0 <= trainer.evaluate(dataset)["eval_reward"] <= 1
    assert trainer.tracker.state_dict() == knapsack.SuccessTracker().state_dict()


def test_errors(tmp_path):
    """Catches: a run that fails after its first batch, or forgets its prompts silently."""
    with pytest.raises(ValueError, match="n_min"):  # 64 rollouts for 16 prompts
        make(partial(KnapsackGRPOTrainer, n_min=5), tmp_path, rows=64, each=4)

    def nameless(model, right, config, dataset):
        return KnapsackGRPOTrainer(model, right, config, dataset.remove_columns("id"))

    with pytest.raises(ValueError, match="'id'"):
        make(nameless, tmp_path)


if __name__ == "__main__":  # one of the two processes
    result = run_script(sys.argv[1], ranks=2)
    Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
