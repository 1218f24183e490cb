"""Exact lookahead: the samples that are converged already are found many at a time.

In the later epochs of R-SFT most visits are one forward which finds that there is nothing to do. As long as nothing is
updated the parameters stay the same, so the coming samples can be scored together in one batch without a graph: those
before the first unconverged one are done, exactly as if they had been visited one by one.

A batch rounds its sums in another order than a sample alone. So a loss this near to the threshold is not believed, and
the sample is visited as if it had not been scored.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch

from .algorithm import Visit

# Scores may be off by this many times the rounding unit of the dtype that the model computes in.
ROUNDING_UNITS = 16


class Lookahead:
    """Knows, before a batch is visited, which of its samples need no visit.

    limit:          how many samples are scored at once, at most (1: none; a batch is scored whole or not at all)
    loss_threshold: tau, in nats per token
    dtype:          in which the model computes
    """

    def __init__(self, limit: int, loss_threshold: float, dtype: torch.dtype):
        self.limit = limit
        self.sure = loss_threshold * (1 - max(1e-3, ROUNDING_UNITS * torch.finfo(dtype).eps))
        self.window = 1
        self.expect_converged = False
        self.scored: deque[list[float]] = deque()  # the losses of this batch and the next ones, under these parameters

    def arrival(self, batches: Sequence[Sequence], score: Callable[[list], list[float]]) -> list[float | None]:
        """The judged losses of the first batch's samples that are under the threshold for sure, None for the others.

        batches: the batch that comes to be visited now and those after it, as far as they are known; never empty
        score:   computes the judged losses of a list of samples under the current parameters, in one forward
        """
        if not self.scored and self.limit > 1 and self.expect_converged:
            window = [batches[0]]
            while len(window) < len(batches) and sum(map(len, window)) + len(batches[len(window)]) <= self.window:
                window.append(batches[len(window)])
            samples = [sample for batch in window for sample in batch]
            if len(samples) > 1:
                losses = iter(score(samples))
                self.scored.extend([next(losses) for _ in batch] for batch in window)
        if not self.scored:
            return [None] * len(batches[0])
        return [loss if loss < self.sure else None for loss in self.scored.popleft()]

    def visited(self, visit: Visit) -> None:
        """Take note of the visit that `arrival` was asked for."""
        # Scoring costs an unconverged sample a second forward: it pays where most samples are converged.
        self.expect_converged = 2 * sum(visit.already_converged) >= len(visit.already_converged)
        if visit.updates:
            self.scored.clear()
            self.window = 1
        else:
            self.window = min(self.limit, 2 * self.window)
