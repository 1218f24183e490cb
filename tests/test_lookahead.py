"""Exact lookahead: the updates of the plain loop, in its order, with fewer forwards."""

import random

import pytest
import torch

from mm4ke_plugins.rsft.algorithm import Visit, visit
from mm4ke_plugins.rsft.lookahead import Lookahead

TAU = 0.1
SETTINGS = {"loss_threshold": TAU, "steps_per_sample": 3}


class World:
    """Samples whose losses fall when they are trained, and now and then rise when another one is.

    A batch of several is scored with an error, as rounding makes one.
    """

    def __init__(self, count: int, seed: int, error: float = 0.0):
        self.random = random.Random(seed)
        self.noise = random.Random(seed + 1)
        self.losses = [self.random.uniform(0, 2) for _ in range(count)]
        self.error = error
        self.near = 0  # scores that the error could move across the threshold
        self.updates = []
        self.forwards = 0

    def losses_of(self, samples):
        self.forwards += 1
        losses = torch.tensor([self.losses[sample] for sample in samples], dtype=torch.float64)
        return losses, losses

    def score(self, samples):
        assert len(samples) > 1
        self.forwards += 1
        self.near += sum(abs(self.losses[sample] - TAU) < self.error for sample in samples)
        return [self.losses[sample] + self.noise.uniform(-self.error, self.error) for sample in samples]

    def update(self, samples):
        self.updates.append(tuple(samples))
        for sample in samples:
            self.losses[sample] *= self.random.choice([0.1, 0.4, 0.8])
        other = self.random.randrange(len(self.losses))
        self.losses[other] = self.random.choice([self.losses[other], self.losses[other], TAU, 0.9 * TAU, 0.3])


def train(world: World, limit: int, batch_size: int, epochs: int = 12) -> list[Visit]:
    lookahead = Lookahead(limit, TAU, torch.float32)
    count = len(world.losses)
    batches = [list(range(start, min(count, start + batch_size))) for start in range(0, count, batch_size)]
    visits = []
    for _ in range(epochs):
        for index, batch in enumerate(batches):
            arrival = lookahead.arrival(batches[index:], world.score)
            visited = visit(
                lambda indices, batch=batch: world.losses_of([batch[i] for i in indices]),
                lambda loss, indices, batch=batch: world.update([batch[i] for i in indices]),
                arrival,
                **SETTINGS,
            )
            lookahead.visited(visited)
            visits.append(visited)
    return visits


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("limit", [2, 8, 100])
def test_same_visits_with_fewer_forwards(limit, batch_size):
    saved = 0
    for seed in range(20):
        plain, fast = World(30, seed), World(30, seed)
        assert train(plain, 1, batch_size) == train(fast, limit, batch_size)
        assert plain.updates == fast.updates
        assert plain.losses == fast.losses
        saved += plain.forwards - fast.forwards
    if batch_size == 1:
        assert saved > 20 * 30  # of the 360 visits of each world


def test_rounding_flips_no_decision():
    """A score that is wrong by rounding counts only where the loss is not near the threshold."""
    near = 0
    for seed in range(20):
        plain, fast = World(30, seed), World(30, seed, error=TAU * 5e-4)
        train(plain, 1, 1)
        train(fast, 8, 1)
        assert plain.updates == fast.updates
        near += fast.near
    assert near > 20


def test_scores_are_forgotten_after_an_update():
    lookahead = Lookahead(8, TAU, torch.float32)
    lookahead.expect_converged, lookahead.window = True, 3
    batches = [[0], [1], [2], [3]]
    assert lookahead.arrival(batches, lambda samples: [0.01, 0.5, 0.02]) == [0.01]
    lookahead.visited(Visit(0, [0.01], [0.01], [True], [True]))
    assert lookahead.arrival(batches[1:], pytest.fail) == [None]  # known to be unconverged: to be visited
    lookahead.visited(Visit(1, [0.5], [0.05], [False], [True]))
    assert lookahead.arrival(batches[2:], pytest.fail) == [None]  # 0.02 was under the parameters of then


def test_the_margin_grows_with_the_rounding_of_the_dtype():
    for dtype, sure, unsure in ((torch.float32, 0.0998, 0.09995), (torch.bfloat16, 0.087, 0.09)):
        lookahead = Lookahead(8, TAU, dtype)
        lookahead.expect_converged, lookahead.window = True, 2
        assert lookahead.arrival([[0, 1]], lambda samples, scores=(sure, unsure): list(scores)) == [sure, None]
