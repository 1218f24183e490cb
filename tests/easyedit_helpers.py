"""What tests of EasyEdit's editors share: facts, settings, and the same edits without EasyEdit."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm4ke_plugins.rsft.facts import encode_fact
from mm4ke_plugins.rsft.live import Editor, Settings

FACTS = [("Who rules Oz?", "Tark"), ("Where is Oz?", "Up")]
KEYS = {"layers": [1], "learning_rate": 1e-2, "loss_threshold": 0.2, "num_epochs": 8}
SETTINGS = Settings(**KEYS | {"layers": (1,)})


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(before, after) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def expected(folder, *batches) -> dict[str, torch.Tensor]:
    """The weights after these batches of facts, without EasyEdit."""
    model, tokenizer, by_hand = load(folder), AutoTokenizer.from_pretrained(folder), Editor()
    for facts in batches:
        by_hand.edit(model, [encode_fact(tokenizer, *fact, "raw") for fact in facts], SETTINGS)
    return weights(model)


def requests(facts=FACTS) -> dict[str, list[str]]:
    return {"prompts": [prompt for prompt, _ in facts], "target_new": [answer for _, answer in facts]}
