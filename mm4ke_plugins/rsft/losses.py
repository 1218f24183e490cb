"""The samples of a batch, and the loss of each: what is trained, and what tau judges."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

IGNORED = -100  # the label of a token that is not in the answer

# The head runs for a multiple of so many rows: for fewer, libraries take another path with other rounding.
ROWS = 8


@dataclass(frozen=True)
class Sample:
    """One sample of a batch, on the model's device.

    ids:     token ids, padded on the right as in its batch, shape (tokens,)
    length:  how many of them are no padding
    rows:    the tokens whose predictions are needed: a range that ends with the one before the answer's last
    targets: the token that each of them should predict, or IGNORED, shape (rows,)
    own:     whether this token is the answer's own, bool, shape (rows,)
    key:     equal for equal samples
    learns:  whether the trained FFN has a gradient at this token, bool, shape (tokens,); None: at all of them
    """

    ids: torch.Tensor
    length: int
    rows: range
    targets: torch.Tensor
    own: torch.Tensor
    key: tuple[int, ...]
    learns: torch.Tensor | None = None


def samples_of(
    batch: Mapping[str, torch.Tensor],
    device: torch.device,
    own: torch.Tensor | None = None,
    learns: torch.Tensor | None = None,
) -> list[Sample] | None:
    """The samples of a batch with `input_ids`, `labels` and `attention_mask`, (samples, tokens) each.

    own: which labels are the answer's own tokens, bool, (samples, tokens); by default all that are not IGNORED
    learns: at which tokens the trained FFN has a gradient, bool, (samples, tokens); by default all

    Returns None for a batch that is not as simple: other inputs too, padding that is not on the right, no answer.
    """
    if batch.keys() != {"input_ids", "labels", "attention_mask"} or batch["attention_mask"].ndim != 2:
        return None
    if own is None:
        own = batch["labels"] != IGNORED
    samples = []
    places = [None] * len(own) if learns is None else learns.to(device)
    for ids, labels, mask, answers, place in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], own, places, strict=True
    ):
        length = int(mask.sum())
        answer = (labels != IGNORED).nonzero()[:, 0]
        if not mask[:length].all() or not len(answer) or answer[0] == 0 or not answers.any():
            return None
        rows = _rows(int(answer[0]) - 1, int(answer[-1]), len(ids))
        # Row r predicts token r + 1; the last token predicts nothing that is known.
        targets = torch.full((len(rows),), IGNORED)
        known = labels[rows.start + 1 : rows.stop + 1]
        targets[: len(known)] = known
        judged = torch.zeros(len(rows), dtype=torch.bool)
        judged[: len(known)] = answers[rows.start + 1 : rows.stop + 1]
        key = tuple(ids[:length].tolist())
        samples.append(Sample(ids.to(device), length, rows, targets.to(device), judged.to(device), key, place))
    return samples


def _rows(start: int, stop: int, tokens: int) -> range:
    """The range start ... stop - 1, extended to a multiple of ROWS, to the left and where there is no room to the right."""
    count = -(-(stop - start) // ROWS) * ROWS
    start = max(0, stop - count)
    return range(start, min(tokens, start + count))


def answer_losses(logits: torch.Tensor, labels: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain way to `losses_of_rows`, from all logits of a batch.

    logits: (samples, tokens, vocabulary). labels: (samples, tokens), IGNORED where a token is not trained.
    own: bool, (samples, tokens), where a label is the answer's own token
    """
    return losses_of_rows(logits[:, :-1], labels[:, 1:], own[:, 1:])


def losses_of_rows(
    logits: Iterable[torch.Tensor], targets: Iterable[torch.Tensor], own: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each sample the loss that is trained, with a graph where that is enabled, and the one that tau judges.

    trained: the mean cross-entropy of all targets (nats), shape (samples,)
    judged:  the larger one of that and the mean cross-entropy of the answer's own tokens, shape (samples,), no graph.
             A template's tokens around the answer are learned early and would hide an answer that is not known yet;
             but where it is known, the model must also have learned to end it.

    logits: of each sample (rows, vocabulary). targets: (rows,), or IGNORED. own: bool, (rows,)
    """
    trained, judged = [], []
    for rows, known, is_own in zip(logits, targets, own, strict=True):
        rows, known, is_own = rows.float(), known.to(rows.device), is_own.to(rows.device)
        loss = torch.nn.functional.cross_entropy(rows, known, ignore_index=IGNORED)
        answer = torch.nn.functional.cross_entropy(rows.detach()[is_own], known[is_own])
        trained.append(loss)
        judged.append(torch.maximum(loss.detach(), answer))
    return torch.stack(trained), torch.stack(judged)
