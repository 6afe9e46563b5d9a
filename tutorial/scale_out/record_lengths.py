"""How long are real responses, prompt by prompt? Sample some with vLLM and keep only their lengths.

    python tutorial/scale_out/record_lengths.py MODEL TASKS.jsonl OUT.json

lengths_smollm2_gsm8k.json is what this wrote for SmolLM2-135M-Instruct and the first prompts of GSM8K's
training set; tests/bench/bench_scale.py balances workers with it. Needs vLLM (either build).
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
    parser.add_argument("--samples", type=int, default=6, help="rollouts a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    warnings.simplefilter("ignore")
    tasks = reward.load_tasks(args.tasks)[: args.prompts]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = rollout.encode_prompts(tokenizer, [t.prompt for t in tasks], chat=True)
    sampler = rollout.VLLMSampler(
        args.model, tokenizer, args.max_new_tokens, max_prompt_tokens=max(map(len, prompts))
    )
    from vllm import SamplingParams, TokensPrompt

    # No seeds: vLLM's CPU build fails where a request with a seed of its own is prefilled in parts.
    params = SamplingParams(n=args.samples, temperature=1.0, max_tokens=args.max_new_tokens)
    outputs = sampler.llm.generate(
        [TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False
    )
    responses = [[(o.text, len(o.token_ids)) for o in output.outputs] for output in outputs]
    sampler.close()
    rows = []
    with reward.Verifier(workers=1) as verifier:
        for task, prompt, group in zip(tasks, prompts, responses, strict=True):
            right = verifier.score_many([text for text, _ in group], [task.answer] * len(group))
            lengths = [n for _, n in group]
            rows.append({"prompt_tokens": len(prompt), "lengths": lengths, "right": int(right.sum())})
    settings = {"model": Path(args.model).name, "tasks": Path(args.tasks).stem}
    settings |= {"samples": args.samples, "max_new_tokens": args.max_new_tokens}
    lines = ",\n".join(json.dumps(row) for row in rows)
    args.out.write_text(f'{{"settings": {json.dumps(settings)},\n"prompts": [\n{lines}\n]}}\n')
    print(f"{sum(map(len, responses))} rollouts, {sum(sum(r['lengths']) for r in rows)} tokens")


if __name__ == "__main__":
    main()
