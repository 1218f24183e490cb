"""What a training's result follows from: its settings, its base model and its facts. Knows no host.

Two trainings of one provenance give the same weights, so either may go on from the other's checkpoint, and what one
left need not be trained again. Of two others neither may.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from ..storage.tensors import tensor_sha256
from ..storage.threads import in_threads

# Why a key counts that one might think can be changed halfway.
REASONS = {
    "num_train_epochs": "the learning rate of every visit depends on it",
    "max_steps": "the learning rate of every visit depends on it",
}
NOT_SET = object()


@dataclass(frozen=True)
class Provenance:
    """
    settings: what a recipe says that changes the result, by its keys; values as JSON has them
    base:     the hash of the base model's parameters
    facts:    a short hash of every fact, in the order of the data set
    """

    settings: Mapping[str, Any]
    base: str
    facts: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the facts in one line, since a file may be written with a line for each entry of a list."""
        return {"settings": dict(self.settings), "base": self.base, "facts": " ".join(self.facts)}

    @classmethod
    def from_dict(cls, saved: Any) -> "Provenance | None":
        """What `to_dict` gave; None for anything else."""
        try:
            return cls(dict(saved["settings"]), str(saved["base"]), saved["facts"].split())
        except (TypeError, KeyError, ValueError, AttributeError):
            return None

    def sha256(self) -> str:
        lines = [self.base, *self.facts, *(f"{key}: {value!r}" for key, value in sorted(self.settings.items()))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def differences(self, there: "Provenance", fact: Callable[[int], str]) -> list[str]:
        """How the provenance `there` differs from this one, a phrase each; `fact` shows one of this one's facts."""
        found = []
        for key in sorted(self.settings.keys() | there.settings.keys()):
            values = [settings.get(key, NOT_SET) for settings in (there.settings, self.settings)]
            if values[0] != values[1]:
                theirs, ours = ("not set" if value is NOT_SET else value for value in values)
                reason = f" ({REASONS[key]})" if key in REASONS else ""
                found.append(f"{key}: {theirs} there, {ours} here{reason}")
        if self.base != there.base:
            found.append("model_name_or_path: the base model has other weights here")
        pairs = enumerate(zip_longest(self.facts, there.facts))
        if (first := next((index for index, (ours, theirs) in pairs if ours != theirs), None)) is not None:
            shown = f", {fact(first)!r}" if first < len(self.facts) else ""
            found.append(
                f"facts: {len(there.facts)} there, {len(self.facts)} here, differing from number {first} (0-based{shown}) on"
            )
        return found


def parameter_hashes(model: torch.nn.Module) -> dict[str, str]:
    """The hash of every parameter, by name. Of the whole model: an edit of any layer makes another base.

    One core takes a second for a GB, and as many cores as there are take part.
    """
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, in_threads(tensor_sha256, parameters.values())))


def joint_hash(hashes: Mapping[str, str]) -> str:
    """One hash of the hashes of parameters, whatever their order."""
    return hashlib.sha256(
        "\n".join(f"{digest} {name}" for name, digest in sorted(hashes.items())).encode()
    ).hexdigest()
