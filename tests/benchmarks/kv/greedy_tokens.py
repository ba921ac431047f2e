"""Greedy answers under KV plans beside the 16-bit cache's, alone and in one batch.

    python tests/benchmarks/kv/greedy_tokens.py MODEL... --problems FILE.jsonl [--specs 8 4 4r]
        [--count 50] [--max-tokens 40] [--plain]

``same`` is the share of prompts with the very tokens of the plain cache, ``batch`` the share whose
tokens in one batch of all prompts are those of the prompt alone, both in float32; ``accuracy`` the
share that ends in the right number.
"""

import argparse
import importlib
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm

from mlx_optiq_ext import kv

# The package's attribute of this name is the function.
generating: Any = importlib.import_module("mlx_lm.generate")


def prompts_of(tokenizer: Any, problems: list[dict], *, plain: bool) -> list[list[int]]:
    """Chat prompts, or the plain form of a base model."""
    if tokenizer.chat_template and not plain:
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": p["question"]}], add_generation_prompt=True
            )
            for p in problems
        ]
    return [tokenizer.encode(f"Question: {p['question']}\nAnswer:") for p in problems]


def alone(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Tokens of each prompt by itself."""
    rows = []
    for prompt in prompts:
        tokens = []
        step = generating.generate_step(
            mx.array(prompt), model, max_tokens=limit, prompt_cache=kv.make_caches(model)
        )
        for token, _ in step:
            if token in tokenizer.eos_token_ids:
                break
            tokens.append(token)
        rows.append(tokens)
    return rows


def together(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Tokens of all prompts in one batch of mixed lengths."""
    batch = generating.BatchGenerator(
        model,
        max_tokens=limit,
        stop_tokens=[[t] for t in tokenizer.eos_token_ids],
        completion_batch_size=len(prompts),
    )
    uids = batch.insert(prompts, caches=[kv.make_caches(model) for _ in prompts])
    rows: dict[int, list[int]] = {uid: [] for uid in uids}
    while found := batch.next_generated():
        for response in found:
            if response.finish_reason != "stop":
                rows[response.uid].append(response.token)
    batch.close()
    return [rows[uid] for uid in uids]


def accuracy(tokenizer: Any, rows: list[list[int]], problems: list[dict]) -> float:
    """Share of answers that end in the right number."""
    right = 0
    for row, problem in zip(rows, problems, strict=True):
        found = re.search(r"####\s*(-?\d+)", tokenizer.decode(row))
        right += found is not None and found[1] == problem["answer"].rsplit("####", 1)[1].strip()
    return right / len(rows)


def main() -> None:
    """Print one line a model and plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--problems", required=True, type=Path)
    parser.add_argument("--specs", nargs="*", default=["8", "4", "4r"])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--plain", action="store_true", help="Prompts of a base model.")
    args = parser.parse_args()
    lines = args.problems.read_text().splitlines()[: args.count]
    problems = [json.loads(line) for line in lines]
    print("| model | plan | same | batch | accuracy |\n|---|---|---|---|---|")
    for name in args.models:
        model, tokenizer = mlx_lm.load(name)[:2]
        model.set_dtype(mx.float32)
        prompts = prompts_of(tokenizer, problems, plain=args.plain)
        plain = alone(model, tokenizer, prompts, args.max_tokens)
        right = accuracy(tokenizer, plain, problems)
        batch = together(model, tokenizer, prompts, args.max_tokens)
        equal = sum(a == b for a, b in zip(plain, batch, strict=True)) / len(plain)
        print(
            f"| {Path(name).name} | 16 bit | | {100 * equal:.0f} % | {100 * right:.0f} % |",
            flush=True,
        )
        for text in args.specs:
            plan = kv.parse_spec(text) or kv.read_plan(Path(text))
            mounted = kv.mount(model, plan)
            rows = alone(model, tokenizer, prompts, args.max_tokens)
            batch = together(model, tokenizer, prompts, args.max_tokens)
            same = sum(a == b for a, b in zip(rows, plain, strict=True)) / len(rows)
            equal = sum(a == b for a, b in zip(rows, batch, strict=True)) / len(rows)
            right = accuracy(tokenizer, rows, problems)
            note = " (dense)" if mounted.dense else ""
            print(
                f"| {Path(name).name} | {text}{note} | {100 * same:.0f} % | {100 * equal:.0f} % "
                f"| {100 * right:.0f} % |",
                flush=True,
            )
        kv.unmount(model)


if __name__ == "__main__":
    main()
