"""Knapsack RL inside verl 0.9.1: its synchronous trainer, with knapsack.py deciding each prompt's rollouts.

    pip install -r tutorial/scale_out/requirements-verl.txt         # an environment of its own; README.md
    export PYTHONPATH=$PWD/tutorial/scale_out VERL_USE_EXTERNAL_MODULES=verl_knapsack       # on every node
    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=knapsack algorithm.adv_estimator=grpo ...

verl's agent loop already takes a number of rollouts a prompt, `__rollout_n__`, groups advantages by the
prompt's uid and balances tokens over the ranks; so this only says how many, and listens to how they came out.
A step spends data.train_batch_size x actor_rollout_ref.rollout.n rollouts, as without us.

**What was run**: the methods below, with verl's own batch, agent loop, padding rows and GRPO advantages, on a
CPU (tests/test_verl.py). **What was not**: a training run; verl's rollout servers need a GPU.

A prompt is remembered by its data source and `extra_info.index`, not by its uid: verl draws a fresh uid at
each visit, and a tracker keyed by that never sees a prompt twice.
"""

import json
import sys
from pathlib import Path

import numpy as np
import transfer_queue as tq
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import knapsack

N_MIN, N_MAX = 2, 128


@register_trainer("knapsack")
class KnapsackTrainer(PPOTrainerSync):
    def __init__(self, config):
        # verl found us under our name; whatever it then decides by the mode shall be as for "sync".
        config.trainer.v1.trainer_mode = "sync"
        filter_groups = config.algorithm.get("filter_groups", None)
        if filter_groups is not None and filter_groups.get("enable", False):
            raise ValueError(
                "algorithm.filter_groups.enable=True drops all-right and all-wrong groups before the "
                "knapsack hears of them: set it to False"
            )
        super().__init__(config)
        self.tracker = knapsack.SuccessTracker()
        self.id_of_uid: dict[str, str] = {}  # of the prompts whose rollouts are under way

    def _next_train_batch(self, num_prompts=None):
        """verl's batch of M prompts, and how many rollouts each of them gets."""
        batch = super()._next_train_batch(num_prompts)
        index, source = tu.get(batch, "index"), tu.get(batch, "data_source")
        if len(batch) > 1 and len(set(index)) == 1:  # verl's default where there is none is 0
            raise ValueError(f"every prompt has extra_info.index = {index[0]}: number the dataset's rows")
        ids = [f"{s}/{i}" for s, i in zip(source, index, strict=True)]
        budget = len(batch) * self.config.actor_rollout_ref.rollout.n
        counts = knapsack.allocate(self.tracker.posterior(ids), budget, N_MIN, N_MAX)  # (M,)
        tu.assign_non_tensor(batch, __rollout_n__=counts.tolist())
        self.id_of_uid |= zip(tu.get(batch, "uid"), ids, strict=True)
        return batch

    def _compute_advantage(self, batch, metrics):
        """verl's advantages; and the outcome of each rollout to the tracker."""
        scores = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"]
        )
        right = {}  # uid_session -> bool; an agent's session of several outputs is one rollout
        for key, tag, score in zip(batch.keys, batch.tags, scores["rm_scores"], strict=True):
            if not tag.get("is_padding", False):
                right[key.rsplit("_", 1)[0]] = float(score.sum()) > 0
        uid_of_rollout = np.array([session.rsplit("_", 1)[0] for session in right])  # (R,)
        uids, group, trials = np.unique(uid_of_rollout, return_inverse=True, return_counts=True)
        successes = np.bincount(group, list(right.values()))
        self.tracker.update([self.id_of_uid.pop(uid) for uid in uids], successes, trials)
        mixed = (successes > 0) & (successes < trials)
        metrics["knapsack/effective_rollouts"] = float(trials[mixed].sum() / trials.sum())
        metrics["knapsack/effective_prompts"] = float(mixed.mean())
        metrics["knapsack/largest_group"] = int(trials.max())
        return super()._compute_advantage(batch, metrics)

    # The tracker goes with verl's checkpoints, in global_step_N/knapsack.json.

    def _save_checkpoint(self):
        folder = Path(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "knapsack.json").write_text(json.dumps(self.tracker.state_dict()))
        super()._save_checkpoint()  # last, as its last line declares the checkpoint complete

    def _load_checkpoint(self):
        super()._load_checkpoint()
        if self.global_steps:
            folder = Path(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
            if self.config.trainer.resume_mode == "resume_path":
                folder = Path(self.config.trainer.resume_from_path)
            self.tracker.load_state_dict(json.loads((folder / "knapsack.json").read_text()))
