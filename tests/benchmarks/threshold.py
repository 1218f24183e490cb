"""What tau judges: all trained tokens, or the answer's own ones as well, as R-SFT does here.

    python tests/benchmarks/threshold.py work/base --facts recipes/facts.json [--limit 6]

Trains the same facts both ways, in a chat template and in a reasoning template that puts an empty block of thoughts
before the answer. The losses are of the trained model, before any merge: of the answers' own tokens, in nats.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamafactory.hparams.parser  # noqa: F401  isort: skip  (LLaMA-Factory's parts import each other in this order)
from llamafactory.data import get_template_and_fix_tokenizer

from mm4ke_plugins.hosts.llamafactory.facts import own_tokens
from mm4ke_plugins.knowedit.dataset import read_facts
from mm4ke_plugins.rsft import live
from mm4ke_plugins.rsft.algorithm import EpochStatistics
from mm4ke_plugins.rsft.layers import ffn_parameter_names
from mm4ke_plugins.rsft.losses import IGNORED, samples_of
from mm4ke_plugins.rsft.settings import Settings


def encode(folder: Path, template_name: str, records) -> tuple[list[live.Fact], list[slice]]:
    """The facts, and where the own tokens of each one's answer are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments = {"template": template_name, "train_on_prompt": False, "tool_format": None, "default_system": None}
    template = get_template_and_fix_tokenizer(
        tokenizer, SimpleNamespace(**arguments, enable_thinking=True, preserve_thinking=False)
    )
    facts, own = [], []
    for record in records:
        messages = [
            {"role": "user", "content": record.prompt},
            {"role": "assistant", "content": record.target_new},
        ]
        ((source, target),) = template.encode_multiturn(tokenizer, messages)
        start, stop = (len(source) + place for place in own_tokens(template, tokenizer, messages[1], target))
        ids = source + target + [tokenizer.eos_token_id] * template.efficient_eos
        facts.append(live.Fact(ids, len(source), len(ids)))
        own.append(slice(start, stop))
    return facts, own


def train(folder: Path, facts, own, answers_count: bool) -> tuple[int, list[float]]:
    """The number of updates, and the loss of each answer's own tokens at the end."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    place_of = {tuple(fact.ids): place for fact, place in zip(facts, own, strict=True)}

    def sample(fact, device):
        labels = torch.full((1, len(fact.ids)), IGNORED)
        labels[:, fact.answer_start :] = torch.tensor(fact.ids[fact.answer_start :])
        is_own = torch.zeros_like(labels, dtype=torch.bool)
        is_own[:, place_of[tuple(fact.ids)] if answers_count else slice(fact.answer_start, None)] = True
        ids = torch.tensor([fact.ids])
        batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        (made,) = samples_of(batch, device, is_own)
        return made

    updates, add = [], EpochStatistics.add
    EpochStatistics.add = lambda self, visit: (updates.append(visit.updates), add(self, visit))[1]
    make, live.sample_of = live.sample_of, sample
    try:
        names = ffn_parameter_names(model, [5], ["ffn"])
        live.train_facts(model, names, facts, Settings(learning_rate=1e-3))
    finally:
        live.sample_of, EpochStatistics.add = make, add
    losses = []
    with torch.inference_mode():
        for fact, place in zip(facts, own, strict=True):
            logits = model(torch.tensor([fact.ids])).logits[0].float()
            rows = logits[place.start - 1 : place.stop - 1]
            losses.append(torch.nn.functional.cross_entropy(rows, torch.tensor(fact.ids[place])).item())
    return sum(updates), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=6)
    arguments = parser.parse_args()
    records = read_facts(arguments.facts, arguments.limit)
    tau = Settings.loss_threshold
    table = Table("template", "tau judges", "updates", "answer's loss, mean", "largest", f"answers at {tau} or more")
    for template in ("smollm2", "qwen3"):
        facts, own = encode(arguments.model, template, records)
        for answers_count, title in ((False, "all trained tokens"), (True, "the answer as well")):
            updates, losses = train(arguments.model, facts, own, answers_count)
            above = sum(loss >= tau for loss in losses)
            mean = sum(losses) / len(losses)
            table.add_row(
                template, title, str(updates), f"{mean:.3f}", f"{max(losses):.3f}", f"{above} of {len(losses)}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
