"""Algorithm 1: robust supervised fine-tuning (R-SFT), in pure torch.

    for every epoch, for every sample:                      the caller's loop
        for at most `steps_per_sample` (K) times:           visit_sample
            loss = mean token cross-entropy of the answer
            stop if loss < `loss_threshold` (tau)
            update the parameters

A visit that stops at once leaves the model as it was, so facts that are already known cost one forward and
are not trained into the ground. The test comes before the update: a visit that uses up its K updates has not
seen the loss after the last one. Source: arXiv 2506.12384, Algorithm 1, lines 6-12.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Visit:
    """What one visit of one sample did.

    updates:    how often the parameters were updated, 0 ... K
    first_loss: the loss on arrival, before any update of this visit (nats per token)
    final_loss: the last loss that was computed (nats per token)
    converged:  final_loss < loss_threshold
    """

    updates: int
    first_loss: float
    final_loss: float
    converged: bool


def visit_sample(
    loss_of_sample: Callable[[], torch.Tensor],
    update: Callable[[torch.Tensor], None],
    *,
    loss_threshold: float,
    steps_per_sample: int,
) -> Visit:
    """Train one sample for at most `steps_per_sample` updates, and stop as soon as its loss is under the threshold.

    loss_of_sample: computes the sample's loss under the current parameters, a scalar tensor with a graph
    update:         takes that loss and updates the parameters: backward, clip, optimizer step, zero_grad
    loss_threshold: tau > 0, in nats per token
    steps_per_sample: K >= 1

    Raises FloatingPointError when the loss is NaN or infinite; the parameters are then those that gave this loss.
    """
    for step in range(steps_per_sample):
        loss = loss_of_sample()
        final_loss = loss.item()
        if step == 0:
            first_loss = final_loss
        if not math.isfinite(final_loss):
            raise FloatingPointError(f"the loss is {final_loss} after {step} updates of this sample")
        if final_loss < loss_threshold:
            return Visit(step, first_loss, final_loss, converged=True)
        update(loss)
    return Visit(steps_per_sample, first_loss, final_loss, converged=False)


@dataclass
class EpochBooks:
    """The sums over one epoch's visits. JSON-serializable by `asdict`, so that an epoch can be resumed midway."""

    visits: int = 0
    updates: int = 0
    already_converged: int = 0
    converged: int = 0
    final_loss_sum: float = 0.0
    max_final_loss: float = 0.0

    def enter(self, visit: Visit) -> None:
        self.visits += 1
        self.updates += visit.updates
        self.already_converged += visit.converged and visit.updates == 0
        self.converged += visit.converged
        self.final_loss_sum += visit.final_loss
        self.max_final_loss = max(self.max_final_loss, visit.final_loss)

    def summary(self) -> dict[str, float]:
        """The books of a finished epoch: counts, the fraction of visits that ended under tau, losses in nats."""
        return {
            "visits": self.visits,
            "updates": self.updates,
            "already_converged": self.already_converged,
            "converged_fraction": self.converged / self.visits,
            "mean_final_loss": self.final_loss_sum / self.visits,
            "max_final_loss": self.max_final_loss,
        }

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
