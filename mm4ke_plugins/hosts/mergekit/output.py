"""Which folders a merge may replace: empty ones and earlier results that hold nothing else."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MM4KEError
from ...storage.replacing import has_record, refuse_to_replace, users_files

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

# What mergekit and the tokenizers that it saves call their files; those of models come from its writer.
NAMES = {
    *("config.json", "generation_config.json", "README.md", "mergekit_config.yml"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.json"),
    *("chat_template.jinja", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("normalizer.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
}
WEIGHTS = re.compile(r"model(-\d+(-of-\d+)?)?\.safetensors|pytorch_model(-\d+(-of-\d+)?)?\.bin")


def is_mergekits(name: str) -> bool:
    """Whether mergekit gives this name to a file that it writes into a result, by any of its options."""
    return name in NAMES or bool(WEIGHTS.fullmatch(name))


def check_output(out_path: str, merge_config: "MergeConfiguration") -> None:
    """Refuse to replace anything but an empty folder or an earlier result, and anything that the merge reads.

    Results of mergekit's other methods count by their model card's recipe and by the names of their files.
    """
    folder = Path(out_path).resolve()
    read = [part.path for model in merge_config.referenced_models() for part in (model.model, model.lora) if part]
    if any(folder == Path(path).resolve() for path in read):
        raise MM4KEError(f"{out_path}: is one of the models to merge; give another folder for the result")
    if os.path.ismount(folder):
        raise MM4KEError(f"{out_path}: is a mount point, which can't be replaced in one step; give a folder in it")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise MM4KEError(f"{out_path}: exists and is no earlier result of mergekit; remove it or give another folder")
    is_result = has_record(folder) or (folder / "mergekit_config.yml").is_file()
    kept = users_files(folder, lambda name: is_result and is_mergekits(name))
    kind = "more than an" if is_result else "no"
    refuse_to_replace(out_path, f"exists and is {kind} earlier result of mergekit", kept)
