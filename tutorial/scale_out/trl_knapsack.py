"""Knapsack RL inside TRL: its GRPOTrainer with groups of different sizes, allocated by our knapsack.py.

    pip install -r tutorial/scale_out/requirements-trl.txt
    python tutorial/scale_out/trl_knapsack.py                        # the embedded model, a CPU
    torchrun --nproc-per-node 2 tutorial/scale_out/trl_knapsack.py --use_cpu --per_device_train_batch_size 128

    trainer = KnapsackGRPOTrainer(model, reward_funcs=right, args=GRPOConfig(...), train_dataset=rows)

The dataset needs a column `id` (str or int), which is what a prompt is remembered by. The first reward
function says whether a completion is right (> 0) and feeds the tracker; others only shape the advantage.

TRL draws M prompts a generation batch, `num_generations` rows each, and takes equal groups for granted
(`rewards.view(-1, num_generations)`). Its sampler, losses, vLLM, DeepSpeed and logging stay as they are;
only the rows of a batch are dealt out anew, N_i to prompt i, and the advantages computed by these groups.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOConfig, GRPOTrainer, TrlParser
from trl.trainer.utils import nanstd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import many_workers

import knapsack

ROOT = Path(__file__).resolve().parents[2]


def group_statistics(rewards: torch.Tensor, group: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std), each (R,): of the rewards (R,) in the same group, labels 0 .. m-1 in any order.

    TRL's own functions, on a table with a row for each prompt that is padded with the NaN they ignore. For
    equal groups the table is TRL's `rewards.view(-1, num_generations)`, so nothing differs in any bit.
    """
    table = pad_sequence([rewards[group == g] for g in range(m)], True, torch.nan)  # (M, longest group)
    return torch.nanmean(table, dim=1)[group], nanstd(table, dim=1)[group]


class KnapsackGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose generation batch is a knapsack: `num_generations` is the mean size of a group."""

    def __init__(self, *args, n_min: int = 2, n_max: int = 128, **kwargs):
        """n_min, n_max: fewest and most rollouts of a prompt; everything else as in GRPOTrainer."""
        super().__init__(*args, **kwargs)
        if "id" not in (self.train_dataset.column_names or ["id"]):  # a stream may not know its columns
            raise ValueError(
                "train_dataset has no column 'id', by which a prompt is remembered; "
                "add its index: dataset.map(lambda row, i: {'id': i}, with_indices=True)"
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError("ragged groups: set multi_objective_aggregation='sum_then_normalize'")
        self.n_min, self.n_max = n_min, n_max
        self.tracker = knapsack.SuccessTracker()  # the same on every rank: all of them see all rewards
        self.mean_length: dict[str | int, float] = {}  # tokens a completion, at the prompt's last visit
        # Bounds that cannot work are refused now rather than after the first batch has been drawn.
        prompts = self.args.generation_batch_size // self.num_generations
        knapsack.allocate(np.full(prompts, 0.5), self.args.generation_batch_size, n_min, n_max)

    def allocate(self, ids: list, budget: int) -> np.ndarray:
        """(M,) rollouts of each prompt; they add up to the budget."""
        return knapsack.allocate(self.tracker.posterior(ids), budget, self.n_min, self.n_max)

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        rows = gather_object(inputs)  # (R,) of all ranks: M prompts, num_generations times each
        prompts = rows[:: self.num_generations]  # (M,)
        if any(row["id"] != prompts[k // self.num_generations]["id"] for k, row in enumerate(rows)):
            raise RuntimeError("the sampler did not repeat each prompt num_generations times in a row")
        ids = [row["id"] for row in prompts]
        counts = np.asarray(self.allocate(ids, len(rows)))  # (M,)
        if counts.sum() != len(rows):
            raise RuntimeError(f"allocate gave {counts.sum()} rollouts; the generation batch has {len(rows)}")

        # Dealt to the ranks so that each has as many rows and, as far as one knows, as many tokens.
        group = np.repeat(np.arange(len(ids)), counts)  # (R,)
        known = [self.mean_length[i] for i in ids if i in self.mean_length]
        length = np.array([self.mean_length.get(i, np.mean(known or [1.0])) for i in ids])  # (M,)
        rank_of_row = many_workers.deal(length[group], ranks)  # (R,)
        group = group[np.argsort(rank_of_row, kind="stable")]  # (R,) rank 0's rows first, as TRL gathers them
        mine = slice(rank * len(inputs), (rank + 1) * len(inputs))
        # A copy a row: TRL may write a rollout function's results into it.
        output = super()._generate_and_score_completions([dict(prompts[g]) for g in group[mine]])
        rewards_per_func, lengths = self._scored  # (R, functions), (R,): of all ranks, in this order

        # TRL's lines, with our groups in place of view(-1, num_generations).
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        rewards[rewards_per_func.isnan().all(dim=1)] = torch.nan  # no function could score it
        mean, std = group_statistics(rewards, torch.from_numpy(group).to(rewards.device), len(ids))
        if self.scale_rewards == "batch":
            std = nanstd(rewards).expand_as(rewards)
        advantages = rewards - mean
        if self.scale_rewards != "none":
            advantages = advantages / (std + 1e-4)
        advantages = advantages.nan_to_num(nan=0.0)
        output["advantages"] = advantages[mine]

        first = rewards_per_func[:, 0].cpu().numpy()
        successes = np.bincount(group, first > 0, len(ids))  # (M,)
        trials = np.bincount(group, ~np.isnan(first), len(ids))  # (M,)
        self.tracker.update(ids, successes, trials)
        for i, n, tokens in zip(ids, counts, np.bincount(group, lengths, len(ids)), strict=True):
            if n:
                self.mean_length[i] = float(tokens / n)

        mixed = (successes > 0) & (successes < trials)
        log = self._metrics["train"]
        log["knapsack/effective_rollouts"].append(float(counts[mixed].sum() / counts.sum()))
        log["knapsack/effective_prompts"].append(float(mixed.mean()))
        log["knapsack/largest_group"].append(int(counts.max()))
        # What TRL logged by its own groups:
        log["frac_reward_zero_std"][-1] = torch.isclose(std, torch.zeros_like(std)).float().mean().item()
        self._logs["advantages"].extend(advantages.tolist())  # holds one batch: pushes TRL's out
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            self._scored = rewards_per_func, gather_object([len(ids) for ids in completion_ids_list])
        return rewards_per_func

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        # In server mode TRL sends the vLLM server every num_generations-th prompt and asks for that many
        # completions. Our rows are not repeated so: one completion a row (the server shares equal prefixes).
        if self.model.training:
            num_generations = 1
        return super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
        )

    # What earlier rollouts told is saved with the optimizer's state, in the checkpoint's folder.

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"tracker": self.tracker.state_dict(), "mean_length": list(self.mean_length.items())}
            Path(output_dir, "knapsack.json").write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = json.loads(Path(checkpoint, "knapsack.json").read_text())
            self.tracker.load_state_dict(state["tracker"])
            self.mean_length = {i: length for i, length in state["mean_length"]}


# ------------------------------------------------------------------------------------ an example


@dataclass
class Arguments:
    """model: folder or hub id; tasks: anything reward.load_tasks takes. Further flags: GRPOConfig's."""

    model: str = str(ROOT / "tutorial" / "tiny_model")
    tasks: str = "arithmetic"
    n_min: int = 2
    n_max: int = 128


def main() -> None:
    from datasets import Dataset

    import reward

    parser = TrlParser((Arguments, GRPOConfig))
    parser.set_defaults(  # for the embedded model on a CPU; 64 prompts x 8, as in train.py
        output_dir="runs/trl-knapsack", max_steps=20, per_device_train_batch_size=256, steps_per_generation=2,
        num_generations=8, max_completion_length=40, learning_rate=1e-4, lr_scheduler_type="constant",
        logging_steps=1, save_steps=10, report_to="none", bf16=False, disable_tqdm=True,
    )  # fmt: skip
    arguments, config = parser.parse_args_and_config()
    tasks = reward.load_tasks(arguments.tasks)
    verifier = reward.Verifier()

    def right(completions, answer, **_):
        return verifier.score_many(completions, answer).tolist()

    trainer = KnapsackGRPOTrainer(
        arguments.model,
        reward_funcs=right,
        args=config,
        train_dataset=Dataset.from_list(
            [{"id": t.id, "prompt": t.prompt, "answer": t.answer} for t in tasks]
        ),
        n_min=arguments.n_min,
        n_max=arguments.n_max,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    verifier.close()


if __name__ == "__main__":
    main()
