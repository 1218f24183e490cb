"""Models and tokenizers, from folders and from the hub.

What is damaged, incomplete or of another model is refused with a message that names the folder.
"""

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import MM4KEError, first_line

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
# A repository often has the same weights in other formats beside these.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def is_hub_id(name: str | Path) -> bool:
    """Whether a model's name is a hub id such as org/name. What is on the disk by this name goes before."""
    return HUB_ID.fullmatch(str(name)) is not None and not Path(name).exists()


def local_path(path: str | Path) -> str:
    """A path such as out/rsft as mergekit does not take it for a hub id."""
    text = str(path)
    return text if text.startswith(("/", "./", "../")) else f"./{text}"


def model_name(name: str | Path) -> str:
    """A model's hub id, or the path of its folder, as mergekit takes it."""
    return str(name) if is_hub_id(name) else local_path(name)


def find_model(name: str | Path, option: str, title: str, revision: str | None = None) -> Path:
    """The folder of a model that is given as a folder or as a hub id.

    What the hub's cache does not have of it is downloaded, unless HF_HUB_OFFLINE says not to. `option` and `title` are
    what a message calls the model.

    Raises MM4KEError: no such folder, no model in it, or the hub's model is not to be had.
    """
    if not is_hub_id(name):
        require_model_folder(Path(name), option, title)
        return Path(name)
    try:
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError, HTTPError) as error:
        raise MM4KEError(
            f"{option}: no such folder, and not to be had from the hub ({first_line(error)}); "
            f"give the folder of the {title} model"
        ) from None
    require_model_folder(folder, option, title)
    return folder


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
