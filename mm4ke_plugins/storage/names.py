"""What the tensors in a model folder's files are to the model: its own names, and which of them are tied.

Files may leave out the prefix of the names (`h.0.` for `transformer.h.0.`), hold buffers that transformers ignores,
store the output head of a model that ties it to the embedding, or leave it out. What counts is what transformers
(5.6) makes of them when it loads the model:

    one of two tied tensors is stored    the other is the same
    both, with the same numbers          they are tied
    both, with other numbers             they are not, whatever config.json says
"""

import json
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import MM4KEError, first_line
from .checkpoint import open_tensors
from .tensors import identical

TIE = re.compile(r'("tie_word_embeddings"\s*:\s*)(true|false)')
NEW_TIE = '\n  "tie_word_embeddings": false,'
# Of old checkpoints; transformers computes them for every architecture.
ALWAYS_IGNORED = [r"rotary_emb\.inv_freq"]


@dataclass(frozen=True)
class ModelNames:
    """A model folder's tensors by the model's names.

    stored: the name in the files, of every tensor that the model has; of a tied one that is not stored the other's
    tied:   of two tied tensors, the one that gives way (as a rule the output head): the one that stays
    needed: what the model has by its architecture. Empty where transformers doesn't know that; then `stored` has the
            names in the files, and nothing is tied
    prefix: what files may leave out of the names
    """

    folder: Path
    stored: Mapping[str, str]
    tied: Mapping[str, str]
    needed: Collection[str]
    prefix: str

    def find(self, name: str) -> str | None:
        """The model's name of a tensor that has this name in some file of the model; None: it has none such."""
        return name_in(self.stored, name, self.prefix)

    def is_stored(self, name: str) -> bool:
        """Whether the files have the model's tensor for itself, also if it is tied."""
        return name not in self.tied or self.stored[name] != self.stored[self.tied[name]]

    def tied_to(self, name: str) -> str | None:
        """The other one, if the model's tensor is tied."""
        return self.tied.get(name) or next((one for one, other in self.tied.items() if other == name), None)

    def same(self, first: str, second: str) -> bool:
        """Whether two of the model's tensors hold the same numbers."""
        names = self.stored[first], self.stored[second]
        with ExitStack() as stack:
            files = open_tensors(self.folder, stack)
            return names[0] == names[1] or _same(*(files[name].get_tensor(name) for name in names))


def model_names(folder: Path) -> ModelNames:
    """The names of a model folder's tensors. Tied ones that are both stored are compared. Raises as `open_tensors`."""
    with ExitStack() as stack:
        files = open_tensors(folder, stack)
        if (model := _skeleton(folder)) is None:
            return ModelNames(folder, {name: name for name in files}, {}, (), "")
        needed = model.state_dict().keys()
        ignored = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), *ALWAYS_IGNORED]))
        stored = {}
        for name in files:
            known = name_in(needed, name, model.base_model_prefix)
            if known or not ignored.search(name):
                stored[known or name] = name
        tied = {}
        for target, source in model.all_tied_weights_keys.items():
            if target in stored and source in stored:
                if _same(*(files[stored[name]].get_tensor(stored[name]) for name in (target, source))):
                    tied[target] = source
            elif target in stored or source in stored:
                there, other = (target, source) if target in stored else (source, target)
                stored[other] = stored[there]
                tied[other] = there
        return ModelNames(folder, stored, tied, needed, model.base_model_prefix)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and identical(first, second)


def name_in(names: Collection[str], name: str, prefix: str) -> str | None:
    """Which of `names` this is, with or without the prefix that checkpoints of a model may leave out."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if prefix else (name,)
    return next((candidate for candidate in candidates if candidate in names), None)


def _skeleton(folder: Path) -> Any:
    """The model that transformers would load from the folder, without its numbers; None if it knows none."""
    import transformers  # seconds, which are not needed where two folders name their tensors alike

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                return kind(config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, NotImplementedError):
        return None  # code of its own, or a configuration that is not complete


# ---- config.json ----


def read_config(folder: Path) -> dict[str, Any]:
    """What a model folder's config.json says. Raises MM4KEError if it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MM4KEError(f"{path}: {first_line(error)}; give a model folder as transformers saves it") from None
    if not isinstance(config, dict):
        raise MM4KEError(f"{path}: no settings in it; give a model folder as transformers saves it")
    return config


def ties_in(config: str) -> list[bool]:
    """What the text of a config.json says of tying, at every place where it does."""
    return [value == "true" for _, value in TIE.findall(config)]


def untied(config: str) -> str:
    """The text of a config.json that no longer ties the output head to the embedding."""
    if TIE.search(config):
        return TIE.sub(r"\1false", config)
    return config.replace("{", "{" + NEW_TIE, 1)


def tied_as_before(config: str, ties: list[bool]) -> str:
    """The text from which `untied` made this one. ties: what `ties_in` said of it."""
    if not ties:
        return config.replace(NEW_TIE, "", 1)
    values = iter(ties)
    return TIE.sub(lambda found: found[1] + str(next(values, ties[0])).lower(), config)
