"""lm-eval's `reference=` where one of the two models ties the output head to the embedding."""

import pytest
import torch
from test_tied_heads import IDS, bases, edit_of, logits  # noqa: F401

from mm4ke_plugins.hosts.lm_eval.model import MM4KELM


@pytest.mark.parametrize("base", ["once", "twice"])
@pytest.mark.parametrize(
    "kind",
    ["FFN, head stored", "embedding, head stored", "head", "head, which config.json ties", "head and embedding"],
)
def test_both_models_answer_as_if_alone(bases, tmp_path, base, kind):  # noqa: F811
    edited = edit_of(bases, kind, tmp_path / "edited")
    for pretrained, reference in ((edited, bases / base), (bases / base, edited)):
        model = MM4KELM(str(pretrained), reference=str(reference), device="cpu", dtype="float32")
        for _ in range(2):
            with torch.no_grad(), model._as_reference():
                assert torch.allclose(model.model(IDS).logits, logits(reference), atol=1e-5)
            with torch.no_grad():
                assert torch.allclose(model.model(IDS).logits, logits(pretrained), atol=1e-5)
