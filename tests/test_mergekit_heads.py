"""Merges of models that tie the output head to the embedding, or don't: the result does what the edited model does."""

import json

import mergekit_helpers
import pytest
import torch
from tied_heads import (
    EDITS,
    EMBEDDING,
    HEAD,
    UP,
    change,
    edit_of,
    moved,
    same_logits,
    tensors_of,
)

from mm4ke_plugins.delta.folders import apply, extract
from mm4ke_plugins.errors import MM4KEError

WHOLE = {"weight": 1, "density": 1}


def merge(base, out, *edited, **options) -> None:
    models = [{"model": str(path), "parameters": options or WHOLE} for path in edited]
    content = {"merge_method": "mm4ke", "base_model": str(base), "models": models}
    mergekit_helpers.run_merge(content, out)


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("base", ["once", "twice", "shards"])
def test_the_result_is_the_edited_model(tied_bases, tmp_path, base, kind):
    edited = edit_of(tied_bases, kind, tmp_path / "edited")
    merge(tied_bases / base, tmp_path / "out", edited)
    assert same_logits(tmp_path / "out", edited)
    unties = kind.startswith(("head", "embedding, head kept"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is not unties

    extract(tied_bases / base, edited, tmp_path / "d")
    for place in ("once", "twice"):
        merge(tied_bases / place, tmp_path / f"of-delta-{place}", tmp_path / "d")
        assert same_logits(tmp_path / f"of-delta-{place}", edited)

    merge(tied_bases / base, tmp_path / "merged", edited, weight=0.6, density=0.5)
    apply(tied_bases / base, [tmp_path / "d"], tmp_path / "applied", [0.6], [0.5])
    merged, applied = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "applied")
    for name in {EMBEDDING, UP} | applied.keys():
        assert torch.equal(merged[name], applied[name]), name


@pytest.mark.parametrize("stored", ["head stored", "head stored and no longer tied"])
def test_a_head_that_is_only_stored_is_no_edit(tied_bases, tmp_path, stored):
    same = tensors_of(tied_bases / "once")[EMBEDDING]
    edited = change(tied_bases / "once", tmp_path / "edited", {HEAD: same}, tie="no longer" not in stored)
    with pytest.raises(MM4KEError, match="edited: equals base_model"):
        merge(tied_bases / "once", tmp_path / "out", edited)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_nowhere(tied_bases, tmp_path):
    edited = change(tied_bases / "once", tmp_path / "edited", {UP: moved(tied_bases / "once", UP, 1)}, tie=False)
    with pytest.raises(MM4KEError, match=f"^models: {edited}: .* is missing; copy or save the model again"):
        merge(tied_bases / "once", tmp_path / "out", edited)
    assert not (tmp_path / "out").exists()
