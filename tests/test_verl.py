"""Knapsack RL inside verl (tutorial/scale_out/verl_knapsack.py): verl's own trainer object, configuration,
agent loop, TransferQueue, padding and GRPO advantages, with made-up responses in place of the GPU's.

verl lives in a virtual environment of its own: tutorial/scale_out/requirements-verl.txt. Elsewhere: skipped.
"""

import asyncio
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "verl", reason="verl is not installed: pip install -r tutorial/scale_out/requirements-verl.txt"
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tutorial" / "scale_out"))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import numpy as np
import ray
import torch
import transfer_queue as tq
import verl
from omegaconf import OmegaConf
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn
from verl_knapsack import KnapsackTrainer

import knapsack

CONFIG = Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"
M, EACH = 8, 4
P = np.linspace(0, 1, M)  # success probability of prompt i


@pytest.fixture(scope="module", autouse=True)
def transfer_queue():
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)  # a count: storage asks for some
    config = OmegaConf.load(CONFIG).transfer_queue
    config.enable, config.backend.SimpleStorage.num_data_storage_units = True, 1
    tq.init(config)
    yield
    tq.close()
    ray.shutdown()


def make(tmp_path, **changes):
    """verl's trainer, as its configuration makes it, but for `init`, which starts the GPU workers."""
    config = OmegaConf.load(CONFIG)
    settings = {
        "algorithm.adv_estimator": "grpo", "data.train_batch_size": M, "actor_rollout_ref.rollout.n": EACH,
        "trainer.v1.trainer_mode": "knapsack", "trainer.default_local_dir": str(tmp_path),
        "trainer.resume_mode": "auto",
    }  # fmt: skip
    for key, value in (settings | changes).items():
        OmegaConf.update(config, key, value)
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    rows = [
        {"raw_prompt": [{"role": "user", "content": f"prompt {i}"}], "data_source": "sums", "index": i,
         "dummy_tensor": torch.tensor([0])}
        for i in range(M)
    ]  # fmt: skip
    trainer.train_dataloader = torch.utils.data.DataLoader(rows, M, shuffle=True, collate_fn=collate_fn)
    trainer.train_dataloader_it, trainer.global_steps = None, 1
    return trainer


class Worker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """verl's agent loop worker without a server: the response is right with probability P[index]."""

    def __init__(self, config):
        self.config, self.background_tasks, self.rng = config, set(), np.random.default_rng(0)

    async def _run_agent_loop(self, sampling_params, *, session_id, uid, index, **kwargs):
        length = int(self.rng.integers(1, 5))
        scores = torch.zeros(length)
        scores[-1] = float(self.rng.random() < P[index])
        ones = torch.ones(length, dtype=torch.int64)
        prompt = torch.tensor([3, 4])
        field = {
            "uid": uid, "index": index, "prompts": prompt, "responses": 5 * ones, "response_mask": ones,
            "loss_mask": ones, "input_ids": torch.cat([prompt, 5 * ones]), "rm_scores": scores,
            "position_ids": torch.arange(2 + length), "old_log_probs": torch.zeros(length),
            "rollout_log_probs": torch.zeros(length),
        }  # fmt: skip
        tag = {
            "status": "success", "prompt_len": 2, "response_len": length, "seq_len": 2 + length,
            "global_steps": 1, "min_global_steps": 1, "max_global_steps": 1,
        }  # fmt: skip
        await tq.async_kv_batch_put(
            keys=[f"{uid}_{session_id}_0"], fields=tu.list_of_dict_to_tensordict([field]), tags=[tag],
            partition_id="train",
        )  # fmt: skip

    def generate(self, batch):
        async def run():
            await self.generate_sequences(batch)
            await asyncio.gather(*self.background_tasks)

        asyncio.run(run())


def step(trainer):
    """verl's step as far as the advantages: [(index, score, advantage)] of real rows, metrics, counts."""
    batch = trainer._next_train_batch()
    counts = dict(zip(tu.get(batch, "index"), tu.get(batch, "__rollout_n__"), strict=True))
    tags = [{"is_prompt": True, "status": "pending", "global_steps": trainer.global_steps}] * M
    tq.kv_batch_put(keys=list(batch["uid"]), partition_id="train", tags=tags)
    Worker(trainer.config).generate(batch)
    batch, _ = trainer.replay_buffer.sample(
        global_steps=trainer.global_steps, partition_id="train", batch_size=M
    )
    batch = upsample_batch_to_divisible_size(batch, M * EACH + 3, eos_token_id=1)  # 3 padding rows
    assert len(batch) == M * EACH + 3
    metrics = {}
    trainer._compute_advantage(batch, metrics)
    data = tq.kv_batch_get(
        keys=batch.keys, partition_id="train", select_fields=["index", "rm_scores", "advantages"]
    )
    rows = [
        (int(i), float(s.sum()), float(a[0]))
        for tag, i, s, a in zip(batch.tags, data["index"], data["rm_scores"], data["advantages"], strict=True)
        if not tag.get("is_padding")
    ]
    tq.kv_clear(keys=batch.keys, partition_id="train")
    trainer.global_steps += 1
    return rows, metrics, counts


def test_two_steps_with_verls_own_parts(tmp_path):
    """Catches: counts that do not reach the agent loop, outcomes credited to another prompt, padding rows
    taken for failures, a tracker keyed by verl's uid, which is new at each visit and so never remembers."""
    trainer, fresh = make(tmp_path), knapsack.SuccessTracker()
    for k in range(3):
        before = knapsack.SuccessTracker()
        before.load_state_dict(trainer.tracker.state_dict())
        rows, metrics, counts = step(trainer)
        ids = [f"sums/{i}" for i in counts]
        assert list(counts.values()) == knapsack.allocate(before.posterior(ids), M * EACH).tolist()
        assert (max(counts.values()) > EACH) == (k > 0)  # from the second visit on, something is remembered
        outcomes = {i: [s for j, s, _ in rows if j == i] for i in counts}
        assert {i: len(x) for i, x in outcomes.items()} == counts
        fresh.update(ids, [sum(x) for x in outcomes.values()], list(counts.values()))
        np.testing.assert_allclose(trainer.tracker.posterior(ids), fresh.posterior(ids), rtol=1e-9)
        for i, score, advantage in rows:
            group = np.array(outcomes[i])
            assert advantage == pytest.approx((score - group.mean()) / (group.std(ddof=1) + 1e-6), abs=1e-5)
        mixed = [0 < sum(x) < len(x) for x in outcomes.values()]
        assert metrics["knapsack/effective_prompts"] == np.mean(mixed)
        assert metrics["knapsack/effective_rollouts"] == np.dot(mixed, list(counts.values())) / (M * EACH)
        assert metrics["knapsack/largest_group"] == max(counts.values())
    assert not trainer.id_of_uid


def test_checkpoint(tmp_path):
    """Catches: a tracker that a resumed run does not have."""

    class Stub:  # the GPU workers' part of a checkpoint
        def save_checkpoint(self, *args, **kwargs):
            pass

        load_checkpoint = load_state_dict = save_checkpoint

        def state_dict(self):
            return {}

    trainer = make(tmp_path)
    trainer.tracker.update(["sums/3"], [1], [4])
    again = make(tmp_path)
    for t in (trainer, again):
        t.actor_rollout_wg = t.train_dataloader = Stub()
    trainer.global_steps = 7
    trainer._save_checkpoint()
    again._load_checkpoint()
    assert again.global_steps == 7
    assert again.tracker.state_dict() == trainer.tracker.state_dict()


def test_errors(tmp_path):
    """Catches: prompts that all share one memory; a filter that hides what the tracker must see."""
    with pytest.raises(ValueError, match="filter_groups"):
        make(tmp_path, **{"algorithm.filter_groups.enable": True})
    trainer = make(tmp_path)
    rows = [dict(row, index=0) for row in trainer.train_dataloader.dataset]
    trainer.train_dataloader = torch.utils.data.DataLoader(rows, M, collate_fn=collate_fn)
    with pytest.raises(ValueError, match=r"extra_info\.index"):
        trainer._next_train_batch()
    assert isinstance(trainer, KnapsackTrainer) and trainer.trainer_mode == "sync"
