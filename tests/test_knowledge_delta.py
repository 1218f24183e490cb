"""Knowledge deltas as files and on live models: exact both ways, small, and safe to get from a stranger."""

import importlib.util
import json
import os
import struct

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from mm4ke_plugins.delta import format as knowledge_delta
from mm4ke_plugins.delta.base import check_alike
from mm4ke_plugins.delta.encoding import from_gaps, ordered, shifted_bits, to_gaps, unpack_bits
from mm4ke_plugins.delta.format import MANIFEST_KEY, SHA256_KEY, KnowledgeDelta, load_delta, save_delta
from mm4ke_plugins.delta.live import LiveDelta, apply_delta, on_models
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.merging.equations import merge
from mm4ke_plugins.storage.tensors import identical, tensor_sha256

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def pair(shape=(61, 47), dtype=torch.float32, edited_dtype=None, share=1.0, seed=0):
    """A base and an edited tensor that differ in about `share` of their entries."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    change = torch.randn(shape, generator=generator) * 0.02
    change[torch.rand(shape, generator=generator) >= share] = 0
    return base, (base.float() + change).to(edited_dtype or dtype)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)
    )


def write(path, base, edited, **options) -> KnowledgeDelta:
    save_delta(path, {"w": base}, {"w": edited}, **options)
    return load_delta(path)


# ---- the numbers ----


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05, 0.002])
@pytest.mark.parametrize(
    ("dtype", "edited_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_an_unfinished_delta_gives_both_models_exactly(tmp_path, dtype, edited_dtype, share):
    base, edited = pair((61, 47), dtype, edited_dtype, share)
    delta = write(tmp_path / "d", base, edited)
    assert same_bits(delta.edited("w", base), edited.to(torch.promote_types(dtype, edited_dtype)))
    assert same_bits(delta.base("w", edited), base)


@pytest.mark.parametrize("weight, density", [(0.8, 0.8), (0.8, 0.2), (1.5, 0.01), (-1.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_any_weight_and_density_did_is_undone(tmp_path, dtype, weight, density):
    """By an unfinished delta, to whose numbers weight and rounding have no way back, and by a finished one."""
    base, edited = pair((61, 47), dtype, torch.float32)
    merged = merge(base, [edited], [weight], [density], names=["b", "e"])
    assert same_bits(write(tmp_path / "u", base, edited).base("w", merged), base)
    finished = write(tmp_path / "f", base, edited, weight=weight, density=density)
    assert same_bits(finished.edited("w", base), merged)
    assert same_bits(finished.base("w", merged), base)


def test_weight_1_and_density_1_take_the_edited_numbers_as_they_are(tmp_path):
    """A float32 sum could not: base + (edited - base) is rounded twice."""
    base, edited = pair(share=0.5)
    edited = edited * 3
    assert not torch.equal(merge(base, [edited], [1.0], [1.0], names=["b", "e"]), edited)
    assert same_bits(write(tmp_path / "d", base, edited, weight=1, density=1).edited("w", base), edited)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_numbers(tmp_path, dtype):
    """From the smallest to the largest and across zero, where the steps don't fit into their integers and wrap."""
    info = torch.finfo(dtype)
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, info.max, info.min, info.tiny, -info.tiny, info.smallest_normal / 4])
    base, edited = (grid.reshape(-1).to(dtype) for grid in torch.meshgrid(values, values, indexing="ij"))
    for choice in ({}, {"weight": 1, "density": 1}):
        delta = write(tmp_path / "d", base, edited, **choice)
        assert same_bits(delta.edited("w", base), edited)
        assert same_bits(delta.base("w", edited), base)


def test_steps_count_representable_numbers_and_carry_the_sign(tmp_path):
    base = torch.tensor([1.0, -1.0, 0.5, 0.0])
    edited = torch.nextafter(base, torch.tensor([2.0, -2.0, 0.0, 0.0]))
    delta = write(tmp_path / "d", base, edited)
    assert delta.arrays["w:steps"].tolist() == [1, -1, -1]
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    assert torch.equal(ordered(ordered(bits)), bits)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5, 7), (1, 1), (128, 8192 + 3)])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_shapes(tmp_path, shape, share):
    """The last one is more than a piece that is decoded at once."""
    base, edited = pair(shape, share=share, seed=3)
    edited.reshape(-1)[-1] += 1  # at least one difference, and the last entry's
    delta = write(tmp_path / "d", base, edited)
    assert same_bits(delta.edited("w", base), edited)
    assert same_bits(delta.base("w", edited), base)


def test_a_tensor_that_is_not_contiguous(tmp_path):
    base, edited = pair((40, 30), share=0.3)
    delta = write(tmp_path / "d", base.T, edited.T)
    assert same_bits(delta.edited("w", base.T).contiguous(), edited.T.contiguous())


# ---- the encoding ----


@pytest.mark.parametrize(("share", "positions"), [(1.0, "all"), (0.9, "bitmap"), (0.5, "bitmap"), (0.01, "gaps")])
def test_the_smallest_encoding_is_chosen(tmp_path, share, positions):
    base, edited = pair((200, 100), share=share)
    delta = write(tmp_path / "d", base, edited, weight=1, density=1)
    info = delta.manifest.tensors["w"]
    assert info.positions == positions
    kept = int((base != edited).sum())
    costs = {"all": 4 * 20_000, "bitmap": 20_000 // 8 + 4 * kept}
    costs["gaps"] = len(to_gaps(np.flatnonzero((base != edited).numpy()))) + 4 * kept
    assert sum(array.nbytes for array in delta.arrays.values()) == min(costs.values()) == costs[positions]
    assert np.array_equal(
        delta.positions("w"), (base != edited).reshape(-1).nonzero()[:, 0] if kept < 20_000 else np.arange(20_000)
    )


@pytest.mark.parametrize("positions", [[0], [254], [255], [256], [510], [0, 1, 2], [5, 260, 516, 5000], [100_000]])
def test_gaps_of_every_length(positions):
    assert from_gaps(to_gaps(np.array(positions))).tolist() == positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_is_by_the_bits(dtype):
    zeros, nan = torch.tensor([0.0, -0.0], dtype=dtype), torch.tensor([float("nan")], dtype=dtype)
    assert not identical(zeros[:1], zeros[1:])
    assert identical(nan, nan.clone())
    assert identical(zeros[:1], torch.zeros(1, dtype=torch.float64))


def test_bits_are_unpacked_alike_for_a_gpu(monkeypatch):
    bitmap = torch.arange(256, dtype=torch.uint8)
    expected = [bool(byte >> bit & 1) for byte in range(256) for bit in range(8)]
    for unpacked in (unpack_bits(bitmap), shifted_bits(bitmap)):
        assert unpacked.dtype == torch.bool
        assert unpacked.tolist() == expected
    monkeypatch.setattr("mm4ke_plugins.delta.encoding.shifted_bits", lambda bitmap: bitmap.device.type)
    assert unpack_bits(bitmap.to("meta")) == "meta"  # the one other device that every machine has


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_a_gpu_gives_the_same(tmp_path, share):
    base, edited = pair((300, 200), torch.bfloat16, torch.float32, share)
    delta = write(tmp_path / "d", base.cuda(), edited.cuda())
    assert same_bits(delta.edited("w", base.cuda()).cpu(), edited)
    assert same_bits(delta.base("w", edited.cuda()).cpu(), base)


@pytest.mark.parametrize(("density", "share"), [(0.2, 0.01), (0.8, 0.03)])
def test_an_ffn_of_a_7b_model_is_a_small_share_of_the_checkpoint(tmp_path, density, share):
    """A tenth of such an FFN's rows: Qwen2.5-7B has 3 x 3584 x 18944 weights in it, and a checkpoint of 15.2 GB."""
    base, edited = pair((3584, 1894), torch.bfloat16, torch.float32)
    save_delta(tmp_path / "d", {"w": base}, {"w": edited}, weight=0.8, density=density)
    assert (tmp_path / "d").stat().st_size * 30 < share * 15.2e9


# ---- what the file says ----


def test_the_manifest(tmp_path):
    base, edited = pair((10, 20), torch.bfloat16, torch.float32)
    recipe = {"learning_rate": 5e-4, "rsft_layers": [5], "odd": {"a": 1}, "line": "a\x1b[31m\nb", "nothing": None}
    save_delta(
        tmp_path / "d",
        {"w": base, "same": base},
        {"w": edited, "same": base},
        architecture="X",
        recipe=recipe,
        facts=7,
    )
    manifest = load_delta(tmp_path / "d").manifest
    assert list(manifest.tensors) == ["w"]
    assert (manifest.architecture, manifest.facts, manifest.applied) == ("X", 7, None)
    assert manifest.recipe == recipe | {"odd": "{'a': 1}", "line": "a [31m b"}
    info = manifest.tensors["w"]
    assert (info.shape, info.base_dtype, info.edited_dtype) == ([10, 20], "bfloat16", "float32")
    assert info.base_sha256 == tensor_sha256(base) != tensor_sha256(base.T.contiguous())
    difference = edited - base.float()
    assert info.norm == pytest.approx(float(difference.norm()))
    assert info.base_norm == pytest.approx(float(base.float().norm()))
    assert sum(info.magnitudes) == 200
    assert info.magnitudes[4] == int(((difference.abs() >= 1e-3) & (difference.abs() < 1e-2)).sum())


def test_equal_numbers_make_no_delta(tmp_path):
    base = pair()[0]
    with pytest.raises(MM4KEError, match="^edited: equals base, so there is no delta"):
        save_delta(tmp_path / "d", {"w": base}, {"w": base.clone()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("base", "edited", "options", "message"),
    [
        ({"w": torch.ones(2)}, {"v": torch.ones(2)}, {}, "^B: v: not in A; give a model that was made from this base"),
        ({"w": torch.ones(2)}, {"w": torch.ones(3)}, {}, "^B: w is 3, in A 2"),
        ({"w": torch.ones(2).long()}, {"w": torch.zeros(2).long()}, {}, "^A: w is int64; a delta is of float32"),
        ({"w": torch.ones(2)}, {"w": torch.tensor([1, float("nan")])}, {}, "^B: w: holds NaN"),
        ({"w": torch.tensor([1, float("inf")])}, {"w": torch.ones(2)}, {}, "^A: w: holds an infinite number"),
        ({"w": torch.ones(2)}, {"w": torch.zeros(2)}, {"weight": 11}, "^weight: 11: give a number from -10 to 10"),
        ({"w": torch.ones(2)}, {"w": torch.zeros(2)}, {"weight": float("nan")}, "^weight: nan: give"),
        ({"w": torch.ones(2)}, {"w": torch.zeros(2)}, {"density": 0}, "^density: 0: give a share above 0, up to 1"),
        ({"w": torch.ones(2)}, {"w": torch.zeros(2)}, {"density": 1.1}, "^density: 1.1: give a share"),
    ],
)
def test_what_can_not_be_a_delta(tmp_path, base, edited, options, message):
    with pytest.raises(MM4KEError, match=message):
        save_delta(tmp_path / "d", base, edited, titles=("A", "B"), **options)
    assert not list(tmp_path.iterdir())


def test_a_file_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    base, edited = pair((3, 3))
    with pytest.raises(MM4KEError, match="file/d: can't be written: .*; give another place"):
        save_delta(tmp_path / "file" / "d", {"w": base}, {"w": edited})


# ---- files of strangers ----


def damaged(path, change):
    """The file at `path` after `change(header, manifest)` of its JSON, with a checksum that fits where one can."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    manifest = json.loads(header["__metadata__"][MANIFEST_KEY])
    change(header, manifest)
    text = json.dumps(manifest)
    header["__metadata__"] |= {MANIFEST_KEY: text}
    header["__metadata__"][SHA256_KEY] = knowledge_delta._file_sha256(text, load_delta(path).arrays)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    return path


def set_info(**values):
    return lambda header, manifest: manifest["tensors"]["w"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, manifest: manifest.update(format=2), "format: not that of version .*; update mm4ke-plugins"),
        (lambda header, manifest: manifest.update(applied={"weight": 99, "density": 1}), "applied.weight: "),
        (lambda header, manifest: manifest.update(architecture="\x1b[2J"), "architecture: .*control characters"),
        (lambda header, manifest: manifest.update(surprise=1), "surprise: Extra inputs"),
        (lambda header, manifest: manifest["tensors"].clear(), "tensors: "),
        (set_info(count=10**9), "w: count: 1000000000 of 2867 entries"),
        (set_info(shape=[2**40, 2**40]), "w:bitmap: is U8 .*by the manifest it is U8"),
        (set_info(shape=[-61, -47]), "tensors.w.shape.0: "),
        (set_info(shape=[61, 49]), "w:bitmap: is U8"),
        (set_info(shape=[30, 90]), "w:bitmap: is U8"),
        (set_info(edited_dtype="bfloat16", base_dtype="bfloat16"), "w:steps: is I32 .*by the manifest it is I16"),
        (set_info(positions="gaps"), "w:bitmap: unknown"),
        (set_info(positions="all", count=2867), "w:bitmap: unknown"),
        (set_info(base_sha256="0" * 63), "tensors.w.base_sha256: "),
        (set_info(norm=-1), "tensors.w.norm: "),
        (set_info(magnitudes=[10**6] * 8), "w: count: "),
    ],
)
def test_a_manifest_that_lies(tmp_path, change, message):
    write(tmp_path / "d", *pair(share=0.5))
    with pytest.raises(MM4KEError, match=f"/d: {message}"):
        load_delta(damaged(tmp_path / "d", change))


def test_a_narrower_dtype_that_is_a_lie(tmp_path):
    """Entries that are not kept would lose bits in a cast to it."""
    base, edited = pair(dtype=torch.bfloat16, edited_dtype=torch.float32, share=0.5)
    edited = torch.where(edited == base, base * 1e-6, edited)
    write(tmp_path / "d", base * 1e-6, edited)
    delta = load_delta(damaged(tmp_path / "d", set_info(edited_dtype="float16")))
    kept = torch.zeros(base.numel(), dtype=torch.bool)
    kept[torch.from_numpy(delta.positions("w"))] = True
    found = delta.edited("w", base * 1e-6).reshape(-1)
    assert not kept.all() and torch.equal(found[~kept], (base * 1e-6).float().reshape(-1)[~kept])


def test_a_changed_number_is_noticed(tmp_path):
    write(tmp_path / "d", *pair())
    content = bytearray((tmp_path / "d").read_bytes())
    content[-1] ^= 1
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(MM4KEError, match="/d: damaged: its content is not what its checksum says"):
        load_delta(tmp_path / "d")


def test_steps_to_infinity_and_a_bitmap_with_other_counts(tmp_path):
    """With checksums that fit: what only a look at the numbers finds."""
    base, edited = pair(share=0.5)
    delta = write(tmp_path / "d", base, edited, weight=1, density=1)
    steps = delta.arrays["w:steps"].clone()
    first = int(delta.positions("w")[0])
    steps[0] = torch.tensor(float("inf")).view(torch.int32) - ordered(base.reshape(-1)[first].view(torch.int32))
    evil = KnowledgeDelta(delta.path, delta.manifest, dict(delta.arrays) | {"w:steps": steps})
    with pytest.raises(MM4KEError, match="/d: w: holds an infinite number"):
        evil.edited("w", base)

    bitmap = delta.arrays["w:bitmap"].clone()
    bitmap[0] ^= 1
    with pytest.raises(MM4KEError, match="/d: w: its positions are not .* of 2867 entries"):
        knowledge_delta._check_positions(KnowledgeDelta(delta.path, delta.manifest, {"w:bitmap": bitmap}), "w")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, b"PK\x03\x04", b"[" * 10_000])
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(MM4KEError, match="/d: not a readable safetensors file"):
        load_delta(tmp_path / "d")


def test_what_is_no_delta(tmp_path):
    folder = make_tiny_model(tmp_path / "model", layers=1)
    with pytest.raises(MM4KEError, match="not a knowledge delta; `mm4ke delta extract"):
        load_delta(folder / "model.safetensors")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for path in (tmp_path / "pipe", tmp_path / "none", folder):
        with pytest.raises(MM4KEError, match="no such file; give a knowledge delta"):
            load_delta(path)


def test_damaged_files_harm_nobody(tmp_path):
    """3000 files; `python tests/benchmarks/fuzz_delta.py` makes 100 000, and limits memory and time."""
    spec = importlib.util.spec_from_file_location("fuzz_delta", ROOT / "tests" / "benchmarks" / "fuzz_delta.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    outcomes = module.fuzz(3000, 1, tmp_path)
    assert outcomes["refused"] > 2000
    assert outcomes["loaded and applied, made to fit"] > 50 and outcomes["loaded and applied, same content"] > 10


def test_deltas_of_different_bases(tmp_path):
    (base, edited), other = pair((5, 5)), pair((5, 5), seed=1)[0]
    first, second = write(tmp_path / "1", base, edited), write(tmp_path / "2", other, edited)
    with pytest.raises(MM4KEError, match="/2: w: was taken from another base than that of .*/1; give deltas of one"):
        check_alike([first, second])
    save_delta(tmp_path / "3", {"v": base}, {"v": edited}, architecture="A")
    save_delta(tmp_path / "4", {"w": base}, {"w": edited}, architecture="B")
    with pytest.raises(MM4KEError, match="/4: is for B, .*/3 for A; give deltas of one base"):
        check_alike([load_delta(tmp_path / "3"), load_delta(tmp_path / "4")])
    check_alike([first, load_delta(tmp_path / "3")])


# ---- live models ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=True)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(folder, request):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=request.param).eval()


def edit_of(model, path, names=(UP, DOWN), seed=1, **options) -> tuple[KnowledgeDelta, dict[str, torch.Tensor]]:
    """A delta of a live model, and the edited float32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: model.get_parameter(name).detach() for name in names}
    edited = {
        name: tensor.float() + torch.randn(tensor.shape, generator=generator) * 0.02 for name, tensor in base.items()
    }
    save_delta(path, base, edited, **options)
    return load_delta(path), edited


def state(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal_states(first, second) -> bool:
    return first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)


def test_a_delta_is_put_on_and_taken_off(model, tmp_path):
    delta, edited = edit_of(model, tmp_path / "d")
    before = state(model)
    storage = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with apply_delta(model, tmp_path / "d", weight=0.5, density=0.3):
        expected = {name: merge(before[name], [edited[name]], [0.5], [0.3], names=["b", "e"]) for name in edited}
        assert equal_states(state(model), before | expected)
        assert not equal_states(state(model), before)
    assert equal_states(state(model), before)
    assert storage == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with apply_delta(model, delta):
        expected = {name: merge(before[name], [edited[name]], [0.8], [0.8], names=["b", "e"]) for name in edited}
        assert equal_states(state(model), before | expected)


def test_a_finished_delta_is_taken_as_it_is_unless_told_otherwise(model, tmp_path):
    delta, _ = edit_of(model, tmp_path / "d", weight=0.7, density=0.5)
    before = state(model)
    finished = {name: delta.edited(name, before[name]) for name in (UP, DOWN)}
    with apply_delta(model, delta):
        assert equal_states(state(model), before | finished)
    with apply_delta(model, delta, weight=0.5):
        halves = {
            name: merge(before[name], [tensor], [0.5], [1.0], names=["b", "e"]) for name, tensor in finished.items()
        }
        assert equal_states(state(model), before | halves)
    assert equal_states(state(model), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_the_base(model, tmp_path, error):
    delta, _ = edit_of(model, tmp_path / "d")
    before = state(model)
    with pytest.raises(error), apply_delta(model, delta):
        with torch.no_grad():
            model.get_parameter(UP).zero_()  # whatever is done to the delta's tensors in the block is undone
        raise error
    assert equal_states(state(model), before)
    assert not on_models[model]


def test_deltas_within_deltas_add_up(model, tmp_path):
    first, edited = edit_of(model, tmp_path / "1", (UP, DOWN))
    second, others = edit_of(model, tmp_path / "2", (DOWN,), seed=2)
    before = state(model)
    with apply_delta(model, first, weight=0.6, density=0.5):
        outer = state(model)
        with apply_delta(model, second, weight=1.2, density=0.4) as inner:
            both = merge(before[DOWN], [edited[DOWN], others[DOWN]], [0.6, 1.2], [0.5, 0.4], names=["b", "e", "f"])
            assert equal_states(state(model), outer | {DOWN: both})
            inner.set(0.3, 0.2)
            assert not torch.equal(model.get_parameter(DOWN), both)
        assert equal_states(state(model), outer)
    assert equal_states(state(model), before)


def test_weight_and_density_are_changed_without_decoding_again(model, tmp_path):
    delta, edited = edit_of(model, tmp_path / "d")
    before = state(model)
    live = LiveDelta(model, delta)
    assert equal_states(state(model), before)
    for choice in [(0.8, 0.8), (0.1, 1.0), (0.8, 0.2)]:
        live.set(*choice)
        for name in (UP, DOWN):
            expected = merge(before[name], [edited[name]], choice[:1], choice[1:], names=["b", "e"])
            assert same_bits(model.get_parameter(name).detach(), expected)
    live.set(weight={UP: 0.5}, density={UP: 0.1, DOWN: 0.9})
    for name, weight, density in ((UP, 0.5, 0.1), (DOWN, 0.8, 0.9)):
        expected = merge(before[name], [edited[name]], [weight], [density], names=["b", "e"])
        assert same_bits(model.get_parameter(name).detach(), expected)
    live.remove()
    assert equal_states(state(model), before)
    live.remove()
    live.set(1.0, 1.0)
    kept = live.keep()
    assert kept.keys() == {UP, DOWN} and all(same_bits(kept[name], before[name]) for name in kept)
    assert not on_models[model] and not equal_states(state(model), before)


def test_only_the_last_delta_can_be_changed(model, tmp_path):
    lives = [LiveDelta(model, edit_of(model, tmp_path / str(seed), seed=seed)[0]) for seed in (1, 2)]
    for live in lives:
        live.set()
    for change in (lives[0].set, lives[0].remove):
        with pytest.raises(RuntimeError, match="another delta was put on this model later"):
            change()


def test_tied_weights_stay_tied(model, tmp_path):
    delta, _ = edit_of(model, tmp_path / "d", (EMBEDDING,))
    ids = torch.arange(5)[None]
    before, logits = state(model), model(ids).logits
    with apply_delta(model, delta):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert not torch.equal(model(ids).logits, logits)
    assert torch.equal(model(ids).logits, logits) and equal_states(state(model), before)


def test_two_changes_of_one_tied_weight(model, tmp_path):
    base = model.get_parameter(EMBEDDING).detach().clone()
    edited = base + 1
    save_delta(
        tmp_path / "same", {EMBEDDING: base, "lm_head.weight": base}, {EMBEDDING: edited, "lm_head.weight": edited}
    )
    with apply_delta(model, tmp_path / "same", 0.5, 1.0):
        assert not torch.equal(model.lm_head.weight, base)
    save_delta(
        tmp_path / "two", {EMBEDDING: base, "lm_head.weight": base}, {EMBEDDING: edited, "lm_head.weight": base + 2}
    )
    with pytest.raises(MM4KEError, match=f"/two: changes {EMBEDDING} and lm_head.weight differently, which .* ties"):
        LiveDelta(model, load_delta(tmp_path / "two"))


def refused(model, delta, message) -> None:
    before = state(model)
    with pytest.raises(MM4KEError, match=message), apply_delta(model, delta):
        pytest.fail("the block was entered")
    if not any(parameter.is_meta for parameter in model.parameters()):
        assert equal_states(state(model), before)


def test_models_that_the_delta_is_not_of(model, folder, tmp_path):
    """By other numbers, another precision, or a layer too few."""
    delta, _ = edit_of(model, tmp_path / "d")
    with torch.no_grad():
        model.get_parameter(DOWN)[0, 0] += 1
    refused(
        model, delta, f"the live LlamaForCausalLM: {DOWN} holds other numbers than the base that .*/d was taken from"
    )
    refused(model.double(), delta, f"{UP} is quantized \\(Parameter, torch.float64\\)")
    model.model.layers = model.model.layers[:1]
    refused(model, delta, f"/d: {UP} is not in the live LlamaForCausalLM")
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    refused(other, delta, f"{UP} is float16, .*/d was taken from .*; load the model with dtype=")


def test_other_shapes(model, tmp_path):
    delta, _ = edit_of(model, tmp_path / "d")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 65, bias=False, dtype=model.dtype)
    refused(model, delta, f"{UP} is 65x32, in .*/d 64x32; give the base")


def test_weights_that_are_not_there_or_not_plain(model, tmp_path):
    delta, _ = edit_of(model, tmp_path / "d")
    up = model.model.layers[1].mlp.up_proj
    up.weight = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    refused(model, delta, f"{UP} is quantized \\(Parameter, torch.int8\\); load the model without quantization")

    class Packed(torch.nn.Parameter):
        """As bitsandbytes and torchao have them."""

    up.weight = Packed(torch.zeros(64, 32, dtype=model.dtype))
    refused(model, delta, f"{UP} is quantized \\(Packed")
    refused(model.to("meta"), delta, "is on the meta device: offloaded, or not loaded")


def test_numbers_out_of_range_on_a_live_model(model, tmp_path):
    delta, _ = edit_of(model, tmp_path / "d")
    before = state(model)
    live = LiveDelta(model, delta)
    for choice, message in [
        ({"weight": 11}, "weight: 11: give a number from -10 to 10"),
        ({"density": 0}, "density: 0: give a share above 0"),
        ({"density": {UP: 2}}, "density: 2: give a share"),
        ({"weight": {"x": 1}}, "weight: x: not in .*/d; there are: "),
    ]:
        with pytest.raises(MM4KEError, match=message):
            live.set(**choice)
        assert equal_states(state(model), before)
