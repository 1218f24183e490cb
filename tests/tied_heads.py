"""A tiny model that ties the output head to the embedding, and its edits, of which some untie it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"
IDS = torch.arange(7)[None]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def change(source: Path, target: Path, new: dict[str, torch.Tensor | None], tie: bool | None = None) -> Path:
    """A copy of a model in one file with other tensors (None: without this one) and, maybe, another word on tying."""
    shutil.copytree(source, target)
    tensors = {name: tensor for name, tensor in (tensors_of(source) | new).items() if tensor is not None}
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    if tie is not None:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tie}))
    return target


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def same_logits(first: Path, second: Path) -> bool:
    """Up to the last bits, which depend on where in a file a matrix begins."""
    return torch.allclose(logits(first), logits(second), atol=1e-5)


def moved(folder: Path, name: str, seed: int) -> torch.Tensor:
    tensor = tensors_of(folder)[name]
    return tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


def edit_of(folder: Path, kind: str, target: Path) -> Path:
    """An edited model of the base that `folder` has `once`."""
    once, up = folder / "once", moved(folder / "once", UP, 1)
    embedding, head = moved(once, EMBEDDING, 2), moved(once, EMBEDDING, 3)
    same = tensors_of(once)[EMBEDDING]
    new, tie = {
        "FFN": ({UP: up}, None),
        "FFN, head stored": ({UP: up, HEAD: same}, None),
        "FFN, head stored and no longer tied": ({UP: up, HEAD: same}, False),
        "embedding": ({EMBEDDING: embedding}, None),
        "embedding, head stored": ({EMBEDDING: embedding, HEAD: embedding}, None),
        "embedding, head kept": ({EMBEDDING: embedding, HEAD: same}, False),
        "head": ({HEAD: head}, False),
        "head, which config.json ties": ({HEAD: head}, True),
        "head and FFN": ({HEAD: head, UP: up}, False),
        "head and embedding": ({HEAD: head, EMBEDDING: embedding}, False),
    }[kind]
    return change(once, target, new, tie)


EDITS = [
    "FFN", "FFN, head stored", "FFN, head stored and no longer tied", "embedding", "embedding, head stored",
    "embedding, head kept", "head", "head, which config.json ties", "head and FFN", "head and embedding",
]  # fmt: skip
