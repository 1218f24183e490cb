"""R-SFT without wasted work: Algorithm 1 (algorithm.py) on fast losses (forward.py).

The sequence of updates is that of the plain loop. Where the fast way is not to be had, the plain one is taken from
there on, with one warning: in a model whose losses come out otherwise, or when memory runs out.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..errors import first_line
from .algorithm import Visit, visit
from .forward import FastForward
from .guard import Guard
from .losses import Sample

logger = logging.getLogger(__name__)


class Visitor:
    """Visits one batch after the other.

    fast:  computes the losses; None to compute them plainly
    guard: what every update is to leave as it was
    """

    def __init__(
        self, fast: FastForward | None, *, loss_threshold: float, steps_per_sample: int, guard: Guard | None = None
    ):
        self.fast = fast
        self.guard = guard
        self.settings = {"loss_threshold": loss_threshold, "steps_per_sample": steps_per_sample}
        self.checked = False

    def visit(
        self,
        samples: Sequence[Sample],
        *,
        number: int,
        plain_losses: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]],
        backward: Callable[[torch.Tensor], None],
        step: Callable[[], None],
        zero_grad: Callable[[], None],
    ) -> Visit:
        """Visit the samples of a batch; without `fast` only their number counts.

        number:       this visit's, in all of the training; the guard's tokens follow from it
        plain_losses: the losses of the samples with these indices, by the whole model: those that are trained, with a
                      graph, and those that are judged
        backward, step, zero_grad: the parts of an update, which takes the mean loss of some samples

        Raises what `algorithm.visit` raises.
        """
        if self.fast and not self.checked:
            self._check(samples, plain_losses)

        def losses_of(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            if self.fast:
                try:
                    return self.fast.losses([samples[index] for index in indices])
                except RuntimeError as error:
                    self._give_up_if_out_of_memory(error)
            return plain_losses(indices)

        guard_losses: list[float] = []

        def update(loss: torch.Tensor, indices: list[int]) -> None:
            update_number = number * self.settings["steps_per_sample"] + len(guard_losses)

            def guarded(loss: torch.Tensor) -> torch.Tensor:
                return loss + self.guard.loss(update_number) if self.guard else loss

            total = guarded(loss)
            guard_losses.append(float(total.detach() - loss.detach()))
            try:
                backward(total)
            except RuntimeError as error:
                if not self.fast:
                    raise
                self._give_up_if_out_of_memory(error)
                zero_grad()
                backward(guarded(plain_losses(indices)[0].mean()))
            step()
            zero_grad()

        visited = visit(losses_of, update, len(samples), **self.settings)
        return replace(visited, guard_loss=sum(guard_losses))

    @torch.no_grad()
    def _check(self, samples: Sequence[Sample], plain_losses: Callable) -> None:
        """Compare the two ways once, since an architecture may hand on more than hidden states from layer to layer."""
        self.checked = True
        plain, _ = plain_losses(list(range(len(samples))))
        try:
            fast, _ = self.fast.losses(samples)
            if torch.allclose(fast, plain.to(fast.dtype), rtol=1e-2, atol=1e-3, equal_nan=True):
                return
            problem = f"the loss of the first fact is {fast[0]:.4f} instead of {plain[0]:.4f}"
        except Exception as error:  # whatever an architecture that was never seen may raise
            logger.debug("R-SFT's fast paths failed", exc_info=True)
            problem = first_line(error)
        self._give_up(f"this model can't be computed in parts ({problem})")

    def _give_up_if_out_of_memory(self, error: RuntimeError) -> None:
        # The text is that of PyTorch's allocator for a CPU, which has no exception of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise error
        self._give_up(f"out of memory ({first_line(error)})")

    def _give_up(self, reason: str) -> None:
        self.fast = None
        logger.warning("R-SFT goes on without its fast paths, with the same result: %s", reason)
