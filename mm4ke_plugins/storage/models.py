"""Models and tokenizers, loaded from folders with transformers; never from a hub.

What is damaged, incomplete or of another model is refused with a message that names the folder.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import MM4KEError, first_line


def load_model(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The folder's model in evaluation mode.

    Raises MM4KEError when it can't be read, when tensors are missing, and when one holds NaN or infinity.
    """
    transformers_logging.disable_progress_bar()  # there is one bar for everything
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise MM4KEError(f"{folder}: transformers can't load this model: {first_line(error)}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise MM4KEError(f"{folder}: the model lacks {len(names)} tensors, for example {names[0]}; save it again")
    model.to(device)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise MM4KEError(f"{folder}: {name} holds NaN or infinity; train or copy the model again")
    return model.eval()


def require_model_folder(folder: Path, option: str, title: str) -> None:
    """Refuse what is not the folder of a model. `option` and `title` are what the message calls it."""
    if not folder.is_dir():
        raise MM4KEError(f"{option}: no such folder; give the folder of the {title} model")
    if not (folder / "config.json").is_file():
        raise MM4KEError(f"{option}: no config.json in it; give a model folder as transformers saves it")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises MM4KEError when transformers can't load it."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise MM4KEError(f"{folder}: transformers can't load its tokenizer: {first_line(error)}") from error


def require_same_vocabulary(
    folder: Path, tokenizer: PreTrainedTokenizerBase, base_folder: Path, base: PreTrainedTokenizerBase
) -> None:
    """Refuse a tokenizer with other tokens or ids than the base's, naming the first that differs."""
    vocabulary, other = base.get_vocab(), tokenizer.get_vocab()
    if differing := sorted(token for token, _ in vocabulary.items() ^ other.items()):
        raise MM4KEError(
            f"{folder}: its vocabulary of {len(other)} tokens is not that of {base_folder} "
            f"({len(vocabulary)}): {differing[0]!r} differs; compare models that were made from this base"
        )
