"""How long are real responses, prompt by prompt? Sample some with vLLM and keep only their lengths.

    python tutorial/scale_out/record_lengths.py MODEL TASKS.jsonl OUT.json

lengths_smollm2_gsm8k.json is what this wrote for SmolLM2-135M-Instruct and the first prompts of GSM8K's
training set; tests/bench_scale.py balances workers with it. Needs vLLM (either build).
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import reward
import rollout


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder or a hub id; its chat template is used")
    parser.add_argument("tasks", help="anything reward.load_tasks takes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--samples", type=int, default=8, help="rollouts a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    warnings.simplefilter("ignore")
    tasks = reward.load_tasks(args.tasks)[: args.prompts]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = rollout.encode_prompts(tokenizer, [t.prompt for t in tasks], chat=True)
    sampler = rollout.VLLMSampler(
        args.model, tokenizer, args.max_new_tokens, max_prompt_tokens=max(map(len, prompts))
    )
    group, rollouts = [], []
    for sample in range(args.samples):  # few at a time: vLLM's CPU build fails where a prompt with a seed of
        for start in range(0, len(prompts), 16):  # its own does not fit whole into a batch of 2048 tokens
            few = prompts[start : start + 16]
            new = sampler.sample(few, [1] * len(few), args.seed + sample)
            rollouts += new
            group += [start + r.group for r in new]
    sampler.close()
    with reward.Verifier(workers=1) as verifier:
        right = verifier.score_many([r.text for r in rollouts], [tasks[g].answer for g in group])
    rows = [{"prompt_tokens": len(p), "lengths": [], "right": 0} for p in prompts]
    for g, r, ok in zip(group, rollouts, right, strict=True):
        rows[g]["lengths"].append(len(r.response_ids))
        rows[g]["right"] += int(ok)
    settings = {"model": Path(args.model).name, "tasks": Path(args.tasks).stem}
    settings |= {k: getattr(args, k) for k in ("samples", "max_new_tokens", "seed")}
    lines = ",\n".join(json.dumps(row) for row in rows)
    args.out.write_text(f'{{"settings": {json.dumps(settings)},\n"prompts": [\n{lines}\n]}}\n')
    tokens = sum(len(r.response_ids) for r in rollouts)
    print(f"{len(rollouts)} rollouts, {tokens} tokens, {right.mean():.3f} right")


if __name__ == "__main__":
    main()
