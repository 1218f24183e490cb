"""Tiny randomly initialised models of the real architectures, with a real (byte-level) chat tokenizer.

They train and merge in a second and need no download.
"""

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# The ChatML format of SmolLM2 and Qwen, so that LLaMA-Factory's `smollm2` template fits.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# What a family needs beyond the common sizes. Each is a dense decoder that LLaMA-Factory trains.
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "phi3": {},
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte plus the ChatML tokens: 259 entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
    tie_word_embeddings: bool = False,
    **config,
) -> Path:
    """Write a tiny model of `family` with its tokenizer and generation config to `folder`, and return it."""
    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie_word_embeddings,
        "initializer_range": 0.2,  # large enough for one FFN to move the output
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | FAMILIES[family] | config)))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def as_hub_model(folder: Path, cache: Path) -> str:
    """Lay a copy of a model folder into the hub's cache, as a download leaves it, and return its hub id."""
    repository, commit = cache / "models--someone--model", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return "someone/model"
