"""Free answers in lm-eval by the size of a batch: sizes take turns at the same questions, in one process.

    python tests/benchmarks/free_answers.py [--model work/base] [--facts recipes/facts.json] [--n 64] [--sizes 16,64]

CPU time, since it depends less than the clock on what else runs. The model before an edit is the one that takes long:
few of its answers end before the 50 tokens.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
from lm_eval.api.instance import Instance

from mm4ke_plugins.hosts.lm_eval.model import MM4KELM
from mm4ke_plugins.knowedit.metrics import questions_of
from mm4ke_plugins.knowedit.records import read_records

OPTIONS = {"until": [], "do_sample": False, "max_gen_toks": 50}  # those of the tasks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="work/base")
    parser.add_argument("--facts", type=Path, default="recipes/facts.json")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--sizes", default="16,64")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    lm = MM4KELM(arguments.model, device="cpu")
    asked = (question for question in questions_of(read_records(arguments.facts)) if question.metric != "locality")
    prompts = [
        lm.apply_chat_template([{"role": "user", "content": question.prompt}])
        for question in islice(asked, arguments.n)
    ]
    requests = [Instance("generate_until", {}, (prompt, dict(OPTIONS)), place) for place, prompt in enumerate(prompts)]
    first = None
    for number in range(1, arguments.rounds + 1):
        for size in map(int, arguments.sizes.split(",")):
            lm.batch_size_per_gpu = size
            begin = time.process_time()
            said = lm.generate_until(requests, disable_tqdm=True)
            seconds = time.process_time() - begin
            first = first or said
            same = sum(text == other for text, other in zip(said, first, strict=True))
            print(
                f"round {number}, batch {size}: {seconds:.1f} s, {same} of {len(said)} answers as at first", flush=True
            )


if __name__ == "__main__":
    main()
