"""Write additions for a real pretrained model as JSON Lines: python tutorial/make_additions.py OUT.jsonl

Each prompt shows four worked additions and asks for a fifth, "a + b =" with operands below 10 to 100;
a pretrained model of 135M parameters is right on some of them always, on some never, on many sometimes.
"""

import argparse
import json
import random
from pathlib import Path

EXAMPLES = "3 + 4 = 7\n12 + 5 = 17\n26 + 31 = 57\n48 + 27 = 75\n"


def addition(rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer; easy and hard ones in equal parts."""
    limit = rng.choice([10, 20, 50, 100])
    a, b = rng.randrange(limit), rng.randrange(limit)
    return f"{EXAMPLES}{a} + {b} =", str(a + b)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", type=int, default=320, help="how many, all different (320)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, answers = random.Random(args.seed), {}
    while len(answers) < args.tasks:
        prompt, answer = addition(rng)
        answers[prompt] = answer
    with args.out.open("w", encoding="utf-8") as file:
        for prompt, answer in answers.items():
            file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    print(f"wrote {len(answers)} additions to {args.out}")


if __name__ == "__main__":
    main()
