"""Models that tie the output head to the embedding: stored once or twice, untied by an edit, named without a prefix."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_command
from tied_heads import EDITS, EMBEDDING, HEAD, IDS, UP, change, edit_of, logits, moved, same_logits, tensors_of
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mm4ke_plugins.comparison import disk_change
from mm4ke_plugins.delta.folders import apply, extract, revert
from mm4ke_plugins.delta.format import load_delta
from mm4ke_plugins.delta.live import LiveDelta, apply_delta
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.rsft.live import changed_tensors


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    return names == sorted(path.name for path in second.iterdir()) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("base", ["once", "twice", "shards"])
def test_the_edit_is_the_edited_model_and_is_undone(tied_bases, tmp_path, base, kind):
    edited = edit_of(tied_bases, kind, tmp_path / "edited")
    for name, choice in (("unfinished", ()), ("finished", (1, 1))):
        extract(tied_bases / base, edited, tmp_path / name, *choice)
        out, back = tmp_path / f"out-{name}", tmp_path / f"back-{name}"
        apply(tied_bases / base, [tmp_path / name], out, [1], [1])
        assert same_logits(out, edited)
        assert not same_logits(out, tied_bases / base)
        revert(out, tmp_path / name, back)
        assert same_files(back, tied_bases / base)
    with_half = tmp_path / "half"
    apply(tied_bases / base, [tmp_path / "unfinished"], with_half)
    revert(with_half, tmp_path / "unfinished", tmp_path / "back")
    assert same_files(tmp_path / "back", tied_bases / base)
    unties = kind.startswith(("head", "embedding, head kept"))
    assert json.loads((with_half / "config.json").read_text())["tie_word_embeddings"] is not unties
    # Programs that read the files by themselves find the head.
    assert not unties or HEAD in tensors_of(with_half)


@pytest.mark.parametrize("kind", ["embedding", "head and FFN"])
def test_an_edited_model_is_reverted_too(tied_bases, tmp_path, kind):
    edited = edit_of(tied_bases, kind, tmp_path / "edited")
    extract(tied_bases / "once", edited, tmp_path / "d")
    revert(edited, tmp_path / "d", tmp_path / "back")
    assert same_logits(tmp_path / "back", tied_bases / "once")
    restored = tensors_of(tmp_path / "back")
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors_of(tied_bases / "once").items())


@pytest.mark.parametrize("kind", ["embedding", "head", "head and embedding"])
def test_a_delta_serves_the_base_however_it_is_stored(tied_bases, tmp_path, kind):
    edited = edit_of(tied_bases, kind, tmp_path / "edited")
    for taken_from, given_to in (("once", "twice"), ("twice", "once"), ("shards", "twice"), ("twice", "shards")):
        place = tmp_path / f"{taken_from}-{given_to}"
        place.mkdir()
        extract(tied_bases / taken_from, edited, place / "d")
        apply(tied_bases / given_to, [place / "d"], place / "out", [1], [1])
        assert same_logits(place / "out", edited)


def test_two_deltas_of_which_one_unties(tied_bases, tmp_path):
    """The other one's embedding is its output head too."""
    edits = [edit_of(tied_bases, kind, tmp_path / kind) for kind in ("head", "embedding")]
    for edited in edits:
        extract(tied_bases / "once", edited, tmp_path / f"{edited.name}.delta")
    apply(tied_bases / "once", [tmp_path / f"{edited.name}.delta" for edited in edits], tmp_path / "out", [0.5], [1])
    base, *others = (tensors_of(folder) for folder in (tied_bases / "once", *edits))
    changes = [other.get(HEAD, other[EMBEDDING]) - base[EMBEDDING] for other in others]
    found = tensors_of(tmp_path / "out")
    assert torch.allclose(found[HEAD], base[EMBEDDING] + 0.5 * changes[0] + 0.5 * changes[1], atol=1e-6)
    assert torch.allclose(found[EMBEDDING], base[EMBEDDING] + 0.5 * changes[1], atol=1e-6)


def test_the_command(tied_bases, tmp_path):
    edited = edit_of(tied_bases, "head and FFN", tmp_path / "edited")
    run = run_command("mm4ke", "delta", "extract", tied_bases / "once", edited, "-o", tmp_path / "d")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{tmp_path / 'd'}: 2 tensors, ")


def test_a_head_that_is_nowhere(tied_bases, tmp_path):
    broken = change(tied_bases / "once", tmp_path / "broken", {UP: moved(tied_bases / "once", UP, 1)}, tie=False)
    with pytest.raises(MM4KEError, match=f"^{broken}: .* is missing; copy or save the model again"):
        extract(tied_bases / "once", broken, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_base_that_is_not_tied_whatever_its_config_says(tied_bases, tmp_path):
    """transformers ties no two tensors that are stored with other numbers."""
    base = change(tied_bases / "once", tmp_path / "base", {HEAD: moved(tied_bases / "once", EMBEDDING, 7)}, tie=True)
    edited = change(base, tmp_path / "edited", {HEAD: moved(base, HEAD, 8), UP: moved(base, UP, 1)})
    extract(base, edited, tmp_path / "d")
    assert sorted(load_delta(tmp_path / "d").manifest.tensors) == [HEAD, UP]
    apply(base, [tmp_path / "d"], tmp_path / "out", [1], [1])
    assert same_logits(tmp_path / "out", edited)
    revert(tmp_path / "out", tmp_path / "d", tmp_path / "back")
    assert same_files(tmp_path / "back", base)


def test_an_edit_that_ties(tmp_path):
    base = make_tiny_model(tmp_path / "base", layers=1, tie_word_embeddings=False)
    edited = change(base, tmp_path / "edited", {HEAD: None, UP: moved(base, UP, 1)}, tie=True)
    extract(base, edited, tmp_path / "d")
    apply(base, [tmp_path / "d"], tmp_path / "out", [1], [1])
    assert same_logits(tmp_path / "out", edited)
    revert(tmp_path / "out", tmp_path / "d", tmp_path / "back")
    assert same_files(tmp_path / "back", base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_numbers_in_another_dtype(tied_bases, tmp_path, dtype):
    half = {name: tensor.bfloat16() for name, tensor in tensors_of(tied_bases / "once").items()}
    base = change(tied_bases / "once", tmp_path / "base", half)
    more = {name: tensor.to(dtype) for name, tensor in half.items()} | {HEAD: half[EMBEDDING].float()}
    edited = change(base, tmp_path / "edited", more | {UP: half[UP].to(dtype) * 2})
    extract(base, edited, tmp_path / "d")
    assert list(load_delta(tmp_path / "d").manifest.tensors) == [UP]
    assert disk_change(base, edited)["changed_tensors"] == [UP]


# ---- names without a prefix ----


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """`base` as old files name its tensors, with the masks that were stored then, and `edited` as they are named now."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=32))
    model.save_pretrained(folder / "saved")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(folder / "saved").items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}
    change(folder / "saved", folder / "base", dict.fromkeys(tensors_of(folder / "saved")) | old | masks)
    up = "transformer.h.0.mlp.c_fc.weight"
    change(folder / "saved", folder / "edited", {up: moved(folder / "saved", up, 1)})
    wte = "transformer.wte.weight"
    change(folder / "edited", folder / "untied", {HEAD: moved(folder / "saved", wte, 2)}, tie=False)
    return folder


@pytest.mark.parametrize("edit", ["edited", "untied"])
def test_names_without_a_prefix(gpt2, tmp_path, edit):
    base = gpt2 / "base"
    assert same_logits(base, gpt2 / "saved")
    extract(base, gpt2 / edit, tmp_path / "d")
    names = ["h.0.mlp.c_fc.weight"] if edit == "edited" else ["h.0.mlp.c_fc.weight", HEAD]
    assert sorted(load_delta(tmp_path / "d").manifest.tensors) == names
    for place, folder in enumerate((base, gpt2 / "saved")):
        out, back = tmp_path / f"out{place}", tmp_path / f"back{place}"
        apply(folder, [tmp_path / "d"], out, [1], [1])
        assert same_logits(out, gpt2 / edit)
        revert(out, tmp_path / "d", back)
        assert same_files(back, folder)
    assert disk_change(base, gpt2 / edit)["changed_tensors"] == sorted([f"transformer.{names[0]}", *names[1:]])


# ---- live models, comparing ----


def test_on_a_live_model(tied_bases, gpt2, tmp_path):
    edited = edit_of(tied_bases, "embedding", tmp_path / "edited")
    for base in ("once", "twice"):
        model = AutoModelForCausalLM.from_pretrained(tied_bases / base)
        extract(tied_bases / base, edited, tmp_path / base)
        with torch.no_grad(), apply_delta(model, tmp_path / base, 1, 1):
            assert torch.equal(model(IDS).logits, logits(edited))
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, logits(tied_bases / base))
    extract(gpt2 / "base", gpt2 / "edited", tmp_path / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(gpt2 / "base")
    with torch.no_grad(), apply_delta(model, tmp_path / "gpt2", 1, 1) as live:
        assert torch.equal(model(IDS).logits, logits(gpt2 / "edited"))
        assert live.parameters.keys() == {"h.0.mlp.c_fc.weight"}


@pytest.mark.parametrize("base", ["once", "twice"])
@pytest.mark.parametrize("kind", ["head", "embedding, head kept"])
def test_a_live_model_that_ties_what_the_delta_unties(tied_bases, tmp_path, base, kind):
    extract(tied_bases / base, edit_of(tied_bases, kind, tmp_path / "edited"), tmp_path / "d")
    model = AutoModelForCausalLM.from_pretrained(tied_bases / base)
    message = f"^{tmp_path}/d: unties {HEAD} from {EMBEDDING}, which the live LlamaForCausalLM ties; .*delta apply"
    with pytest.raises(MM4KEError, match=message), apply_delta(model, tmp_path / "d"):
        pass
    apply(tied_bases / base, [tmp_path / "d"], tmp_path / "out", [1], [1])
    assert same_logits(tmp_path / "out", tmp_path / "edited")


def test_what_changed_on_disk(tied_bases, tmp_path):
    once, twice = tied_bases / "once", tied_bases / "twice"
    size = sum(tensor.numel() for tensor in tensors_of(once).values())
    vocabulary = tensors_of(once)[EMBEDDING].numel()
    for kind, names, parameters in (
        ("FFN, head stored", [UP], size),
        ("FFN, head stored and no longer tied", [UP], size + vocabulary),
        ("embedding, head stored", [EMBEDDING], size),
        ("head", [HEAD], size + vocabulary),
        ("head and FFN", [HEAD, UP], size + vocabulary),
        ("embedding, head kept", [EMBEDDING], size + vocabulary),
    ):
        edited = edit_of(tied_bases, kind, tmp_path / kind)
        for base in (once, twice):
            found = disk_change(base, edited)
            assert (found["changed_tensors"], found["parameters"]) == (names, parameters), kind
            changed = sum(tensors_of(edited)[name].numel() for name in names)
            assert found["changed_parameters"] == changed
    for first, second in ((once, twice), (twice, once)):
        assert disk_change(first, second)["changed_parameters"] == 0
        assert disk_change(first, second)["parameters"] == size


def test_a_checkpoint_for_a_live_model(tied_bases, tmp_path):
    """As EasyEdit's method takes one for a merged model."""
    ffn, both = (edit_of(tied_bases, kind, tmp_path / kind) for kind in ("FFN, head stored", "embedding, head stored"))
    untied = edit_of(tied_bases, "head and FFN", tmp_path / "untied")
    for base in ("once", "twice"):
        model = AutoModelForCausalLM.from_pretrained(tied_bases / base)
        assert changed_tensors(model, ffn).keys() == {UP}
        assert len(changed_tensors(model, both)) == 1
        assert changed_tensors(model, tied_bases / "once") == changed_tensors(model, tied_bases / "twice") == {}
        with pytest.raises(MM4KEError, match=f"^{untied}: unties .*, which the model ties; give a merged model that"):
            changed_tensors(model, untied)
    loaded = AutoModelForCausalLM.from_pretrained(untied)
    assert changed_tensors(loaded, edit_of(tied_bases, "FFN", tmp_path / "tied")).keys() == {HEAD}


def test_what_stays_on_a_model_has_the_models_names(gpt2, tmp_path):
    extract(gpt2 / "base", gpt2 / "edited", tmp_path / "d")
    model = AutoModelForCausalLM.from_pretrained(gpt2 / "base")
    live = LiveDelta(model, load_delta(tmp_path / "d"))
    live.set()
    (name,) = live.keep()
    assert not torch.equal(model.get_parameter(name), tensors_of(gpt2 / "saved")[name])
