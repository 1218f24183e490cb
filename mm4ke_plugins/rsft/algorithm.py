"""Algorithm 1: robust supervised fine-tuning (R-SFT), in pure torch.

    for every epoch, for every sample:                      the caller's loop
        for at most `steps_per_sample` (K) times:           visit
            loss = mean token cross-entropy of the answer
            stop if loss < `loss_threshold` (tau)
            update the parameters by the loss's gradient

A visit that stops at once leaves the model as it was, so facts that are already known cost one forward and
are not trained into the ground. The test comes before the update: a visit that uses up its K updates has not
seen the loss after the last one. Source: arXiv 2506.12384, Algorithm 1, lines 6-12.

What is trained may be more than the answer: the tokens that end it, or an empty block of thoughts before it. Where
these are easy they hide an answer that is not learned yet. So a sample has two losses: one that is trained, and one
that is judged, which is held against tau. In the paper they are the same.

A visit may be of several samples, the breadth-first way of LocFT-BF (arXiv 2509.22072): one update trains all of them
that are not under tau yet, each judged by its own loss.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


class LossNotFinite(FloatingPointError):
    """A judged loss is NaN or infinite. `index` says which sample's of the visit."""

    def __init__(self, loss: float, updates: int, index: int):
        super().__init__(f"the loss is {loss} after {updates} updates of this sample")
        self.index = index


@dataclass(frozen=True)
class Visit:
    """What one visit did. The lists have one entry for each sample.

    updates:      how often the parameters were updated, 0 ... K
    first_losses: the judged losses before the first update of this visit (nats per token)
    final_losses: the last judged losses that were computed (nats per token)
    already_converged, converged: the first, the final loss is under the threshold
    guard_loss:   the sum of the guard's losses that were added to the updates' (see `guard.py`)
    """

    updates: int
    first_losses: list[float]
    final_losses: list[float]
    already_converged: list[bool]
    converged: list[bool]
    guard_loss: float = 0.0


def visit(
    losses_of: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]],
    update: Callable[[torch.Tensor, list[int]], None],
    count: int,
    *,
    loss_threshold: float,
    steps_per_sample: int,
) -> Visit:
    """Train `count` samples for at most `steps_per_sample` updates; leave each as soon as its loss is under the threshold.

    losses_of: computes the losses of the samples with these indices under the current parameters: those that are
               trained, a tensor of one dimension with a graph, and those that are judged, as many
    update:    takes the mean trained loss of the samples that are not under the threshold, a scalar, and their
               indices, and updates the parameters: backward, clip, optimizer step, zero_grad
    loss_threshold: tau > 0, in nats per token
    steps_per_sample: K >= 1

    Raises LossNotFinite when a judged loss is NaN or infinite; the parameters are then those that gave this loss.
    """
    first_losses, losses = [], [math.nan] * count
    active, updates = list(range(count)), 0
    while active and updates < steps_per_sample:
        trained, judged = losses_of(active)
        for index, loss in zip(active, judged.tolist(), strict=True):
            if not math.isfinite(loss):
                raise LossNotFinite(loss, updates, index)
            losses[index] = loss
        first_losses = first_losses or list(losses)
        above = [row for row, index in enumerate(active) if losses[index] >= loss_threshold]
        active = [active[row] for row in above]
        if active:
            update(trained[above].mean(), active)
            updates += 1
    already_converged, converged = ([loss < loss_threshold for loss in part] for part in (first_losses, losses))
    return Visit(updates, first_losses, losses, already_converged, converged)


@dataclass
class EpochStatistics:
    """The sums over one epoch's visits, of judged losses; as JSON by `to_dict`, so that an epoch can be resumed midway.

    A visit of several samples counts as that many visits; an update of several samples is one update.
    """

    visits: int = 0
    updates: int = 0
    already_converged: int = 0
    converged: int = 0
    final_loss_sum: float = 0.0
    max_final_loss: float = 0.0
    guard_loss_sum: float = 0.0

    def add(self, visit: Visit) -> None:
        self.visits += len(visit.final_losses)
        self.updates += visit.updates
        self.already_converged += sum(visit.already_converged)
        self.converged += sum(visit.converged)
        self.final_loss_sum += sum(visit.final_losses)
        self.max_final_loss = max(self.max_final_loss, *visit.final_losses)
        self.guard_loss_sum += visit.guard_loss

    def summary(self) -> dict[str, float]:
        """Of a finished epoch: counts, the fraction of visits that ended under tau, judged losses in nats; and, with a
        guard, its mean loss in an update."""
        guard = {"mean_guard_loss": self.guard_loss_sum / self.updates} if self.guard_loss_sum else {}
        return guard | {
            "visits": self.visits,
            "updates": self.updates,
            "already_converged": self.already_converged,
            "converged_fraction": self.converged / self.visits,
            "mean_final_loss": self.final_loss_sum / self.visits,
            "max_final_loss": self.max_final_loss,
        }

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
