"""Models that don't store what mergekit lists for their architecture: merged all the same, or refused in one line that
names a tensor and the way that works."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mergekit_helpers import LAYER, edit, expect, ffn, load, recipe, refuses, run_merge, save, shard
from tiny import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM

from mm4ke_plugins.delta.folders import apply, extract
from mm4ke_plugins.hosts.mergekit import plan as mergekit_plan

MOE = {"moe_intermediate_size": 16, "num_experts": 4}
# Of some architectures mergekit 0.1.5 lists more than there is: buffers, other norms, an output head beside tied
# embeddings; and it saves experts as one tensor.
FITTING = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mamba": {},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
}
OTHERS = {
    "gpt_neox": {},
    "falcon": {},
    "cohere": {},
    "phi3": {"tie_word_embeddings": True},
    "stablelm": {"tie_word_embeddings": True},
    "phi": {"tie_word_embeddings": True},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": MOE | {"head_dim": 8, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
}


def make_pair(folder: Path, family: str, **config) -> list[str]:
    """A base and an edit of the FFN of its layer 2 in float32; the tensors that were edited."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, FAMILIES.get(family, {}))
        make_tiny_model(folder / "base", family, dtype=torch.bfloat16, **config)
    shutil.copytree(folder / "base", folder / "rsft")
    tensors, generator = load(folder / "base"), torch.Generator().manual_seed(1)
    parts = ("mlp", "fc", "mixer", "experts")
    edited = [name for name in tensors if f".{LAYER}." in name and any(part in name for part in parts)]
    for name in edited:
        tensors[name] = tensors[name].float() + torch.randn(tensors[name].shape, generator=generator) * 0.01
    save(tensors, folder / "rsft")
    return edited


@pytest.mark.parametrize("family, config", (FITTING | OTHERS).items(), ids=FITTING | OTHERS)
def test_architectures(family, config, tmp_path, streamed_merges):
    """The same tensors as before, of which the edited ones are merged; the same as by `mm4ke delta`, bit for bit."""
    edited = make_pair(tmp_path, family, **config)
    merged, base = run_merge(recipe(tmp_path), tmp_path / "out"), load(tmp_path / "base")
    assert edited and streamed_merges == [len(base)]
    assert merged.keys() == base.keys()
    assert sorted(name for name in base if not torch.equal(merged[name], base[name])) == sorted(edited)
    for name in edited:
        assert torch.equal(merged[name], expect(tmp_path, name))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model(torch.tensor([[1, 2, 3]]))

    extract(tmp_path / "base", tmp_path / "rsft", tmp_path / "delta")
    apply(tmp_path / "base", [tmp_path / "delta"], tmp_path / "applied")
    applied = load(tmp_path / "applied")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in applied.items())


def test_parameters_by_layer_and_name(tmp_path):
    """As where mergekit's list is used."""
    make_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    shutil.copytree(tmp_path / "base", tmp_path / "rsft")
    tensors = load(tmp_path / "rsft")
    save(
        {name: tensor.float() + 0.01 * torch.randn(tensor.shape) for name, tensor in tensors.items()},
        tmp_path / "rsft",
    )
    parameters = {"weight": [0.3, 0.5, 0.9], "density": [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 0.7}]}
    entries = [{"model": str(tmp_path / "rsft"), "parameters": parameters}]
    content = recipe(tmp_path, models=entries)
    listed = run_merge(content, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mergekit_plan, "not_stored", lambda weights, stored: ["some tensor"])
        stored = run_merge(content, tmp_path / "out")
    assert stored.keys() == listed.keys()
    assert all(torch.equal(tensor, listed[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("sharded", [["base"], ["rsft"], ["base", "rsft"]])
def test_files(tmp_path, sharded):
    edited = make_pair(tmp_path, "falcon")
    wanted = run_merge(recipe(tmp_path), tmp_path / "wanted")
    for name in sharded:
        shard(tmp_path / name)
    merged = run_merge(recipe(tmp_path, dtype="float32"), tmp_path / "out", out_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.bfloat16(), wanted[name])
    assert torch.equal(merged[edited[0]], expect(tmp_path, edited[0], dtype=torch.float32))


def test_pickled_files(tmp_path):
    edited = make_pair(tmp_path, "falcon")
    wanted = run_merge(recipe(tmp_path), tmp_path / "wanted")
    for name in ("base", "rsft"):
        torch.save(load(tmp_path / name), tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "model.safetensors").unlink()
    merged = run_merge(recipe(tmp_path), tmp_path / "out")
    assert merged.keys() == wanted.keys() and torch.equal(merged[edited[0]], wanted[edited[0]])


@pytest.mark.parametrize("who", [["base"], ["rsft"], ["base", "rsft"]])
def test_buffers_that_older_versions_saved(tmp_path, who):
    edited = make_pair(tmp_path, "gpt_neox")
    for name in who:
        tensors = load(tmp_path / name)
        for layer in range(4):
            prefix = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{prefix}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
            tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e9, dtype=torch.bfloat16)
            tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(4)
        save(tensors, tmp_path / name)
    merged, base = run_merge(recipe(tmp_path), tmp_path / "out"), load(tmp_path / "base")
    assert merged.keys() == base.keys()
    assert sorted(name for name in base if not torch.equal(merged[name], base[name])) == sorted(edited)


def test_slices_need_what_mergekit_lists(tmp_path):
    make_pair(tmp_path, "falcon")
    sources = [{"model": str(tmp_path / name), "layer_range": [0, 4]} for name in ("base", "rsft")]
    remedy = r"; without slices, modules, tokenizer .* it can be merged, also by `mm4ke delta extract` and `apply`"
    message = rf"merge recipe: base_model: {tmp_path}/base: mergekit needs transformer.h.0.ln_attn.\w+, which is not"
    refuses(recipe(tmp_path, models=None, slices=[{"sources": sources}]), message + ".*" + remedy, tmp_path)
    refuses(recipe(tmp_path, tokenizer={"source": "base"}), message, tmp_path)
    refuses(recipe(tmp_path), message, tmp_path, unsafe_truncate_embeddings=True)


def test_slices_of_experts(tmp_path):
    """mergekit makes its own tensors of these, so they are not missing."""
    make_pair(tmp_path, "mixtral", **OTHERS["mixtral"])
    sources = [{"model": str(tmp_path / name), "layer_range": [0, 4]} for name in ("base", "rsft")]
    merged = run_merge(recipe(tmp_path, models=None, slices=[{"sources": sources}]), tmp_path / "out")
    assert "model.layers.2.mlp.experts.gate_up_proj" in merged


@pytest.mark.parametrize("lacking, other", [("rsft", "base"), ("base", "rsft")])
def test_a_tensor_that_one_model_lacks(tmp_path, lacking, other):
    make_tiny_model(tmp_path / "base")
    edit(tmp_path / "base", tmp_path / "rsft")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load(tmp_path / lacking)
    del tensors[name]
    save(tensors, tmp_path / lacking)
    message = f"merge recipe: models: {tmp_path}/rsft: {name} is in {tmp_path}/{other} and not in {tmp_path}/{lacking}"
    refuses(recipe(tmp_path), message, tmp_path)


# ---- configurations that say too little ----


def test_no_architecture(tmp_path):
    make_tiny_model(tmp_path / "base")
    edit(tmp_path / "base", tmp_path / "rsft")
    for name in ("base", "rsft"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        del config["architectures"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    message = "merge recipe: base_model: .*: config.json names no architectures; merge it by `mm4ke delta extract`"
    refuses(recipe(tmp_path), message, tmp_path)
    extract(tmp_path / "base", tmp_path / "rsft", tmp_path / "delta")
    apply(tmp_path / "base", [tmp_path / "delta"], tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[ffn()], expect(tmp_path, ffn()))


def test_names_of_ones_own(tmp_path):
    """A wrapped model, such as trainers save by mistake; then one of a class that nobody knows."""
    make_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    edit(tmp_path / "base", tmp_path / "rsft")
    for name in ("base", "rsft"):
        save({f"module.{key}": tensor for key, tensor in load(tmp_path / name).items()}, tmp_path / name)
    merged = run_merge(recipe(tmp_path), tmp_path / "out")
    assert torch.equal(merged[f"module.{ffn()}"], expect(tmp_path, f"module.{ffn()}"))
    for name in ("base", "rsft"):
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"architectures": ["MineForCausalLM"]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    message = "merge recipe: base_model: .*: mergekit does not know 39 of its tensors, such as module.lm_head.weight, "
    refuses(recipe(tmp_path), message + ".*; merge this model by `mm4ke delta extract` and `apply`", tmp_path)


# ---- quantized models ----


def quantize(folder: Path, how: str) -> None:
    """Attention in the form of GPTQ, bitsandbytes, LLM.int8, or 8-bit floats with or without a scale."""
    tensors = {}
    for name, tensor in load(folder).items():
        if "self_attn" not in name:
            tensors[name] = tensor
            continue
        prefix, ones = name.removesuffix("weight"), torch.ones(8)
        tensors |= {
            "gptq": {
                f"{prefix}qweight": torch.arange(128, dtype=torch.int32).view(4, 32),
                f"{prefix}qzeros": torch.ones(1, 4, dtype=torch.int32),
                f"{prefix}scales": ones.half(),
                f"{prefix}g_idx": torch.zeros(32, dtype=torch.int32),
            },
            "nf4": {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8), f"{name}.absmax": ones},
            "int8": {name: torch.zeros(tensor.shape, dtype=torch.int8), f"{prefix}SCB": ones},
            "fp8": {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale": ones},
            "fp8 alone": {name: tensor.to(torch.float8_e4m3fn)},
        }[how]
    save(tensors, folder)


@pytest.fixture
def quantized(request, tmp_path) -> Path:
    make_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    edit(tmp_path / "base", tmp_path / "rsft")
    for name in ("base", "rsft"):
        quantize(tmp_path / name, request.param)
    return tmp_path


@pytest.mark.parametrize("quantized", ["gptq"], indirect=True)
def test_integers_stay_as_they_are(quantized, streamed_merges):
    merged, base = run_merge(recipe(quantized), quantized / "out"), load(quantized / "base")
    assert streamed_merges == [len(base)] and merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == base[name].dtype
        assert torch.equal(tensor, expect(quantized, name) if f"{LAYER}.mlp" in name else base[name])
    for key in ("dtype", "out_dtype"):
        message = f"merge recipe: {key}: bfloat16: .*g_idx holds integers, which must stay so; leave {key} out"
        refuses(recipe(quantized, **{key: "bfloat16"}), message, quantized, out="other")
    tensors = load(quantized / "rsft")
    tensors["model.layers.0.self_attn.k_proj.qweight"][0, 0] += 1
    save(tensors, quantized / "rsft")
    message = "merge recipe: models: .*/rsft: model.layers.0.self_attn.k_proj.qweight holds other integers than the"
    refuses(recipe(quantized), message, quantized, out="other")


@pytest.mark.parametrize(
    "quantized, problem",
    [
        ("nf4", "mergekit does not know 16 of its tensors, such as .*k_proj.weight.absmax, and would drop them"),
        ("int8", "mergekit does not know 16 of its tensors, such as .*k_proj.SCB, and would drop them"),
        ("fp8", "model.layers.0.self_attn.k_proj.weight is F8_E4M3, which mergekit can't merge"),
        ("fp8 alone", "model.layers.0.self_attn.k_proj.weight is F8_E4M3, which mergekit can't merge"),
    ],
    indirect=["quantized"],
)
def test_the_way_that_works(quantized, problem):
    refuses(recipe(quantized), f"merge recipe: .*: {problem}; .*`mm4ke delta extract` and `apply`", quantized)
    extract(quantized / "base", quantized / "rsft", quantized / "delta")
    apply(quantized / "base", [quantized / "delta"], quantized / "out")
    base, applied = (load(quantized / name) for name in ("base", "out"))
    assert applied.keys() == base.keys()
    assert torch.equal(applied[ffn()], expect(quantized, ffn()))
    assert [name for name in base if not applied[name].view(torch.uint8).equal(base[name].view(torch.uint8))] == [
        name for name in base if f"layers.{LAYER}.mlp" in name
    ]
