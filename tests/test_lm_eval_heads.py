"""lm-eval's `reference=` where one of the two models ties the output head to the embedding."""

import pytest
import torch
from tied_heads import IDS, edit_of, logits

from mm4ke_plugins.hosts.lm_eval.model import MM4KELM


@pytest.mark.parametrize("base", ["once", "twice"])
@pytest.mark.parametrize(
    "kind",
    ["FFN, head stored", "embedding, head stored", "head", "head, which config.json ties", "head and embedding"],
)
def test_both_models_answer_as_if_alone(tied_bases, tmp_path, base, kind):
    edited = edit_of(tied_bases, kind, tmp_path / "edited")
    for pretrained, reference in ((edited, tied_bases / base), (tied_bases / base, edited)):
        model = MM4KELM(str(pretrained), reference=str(reference), device="cpu", dtype="float32")
        for _ in range(2):
            with torch.no_grad(), model._as_reference():
                assert torch.allclose(model.model(IDS).logits, logits(reference), atol=1e-5)
            with torch.no_grad():
                assert torch.allclose(model.model(IDS).logits, logits(pretrained), atol=1e-5)
