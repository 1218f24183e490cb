"""Points of the grid and their rows: what `measure` fills, `choose` compares and `output` shows.

A point is a weight and a density for the whole edit, and perhaps others for some layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..merging.choice import DEFAULT_DENSITY, DEFAULT_WEIGHT

# What is tried where nothing else is said, and the share of R-SFT's edit success that has to stay.
WEIGHTS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
DENSITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
KEEP = 0.97

# Of the records: those with an even index decide, those with an odd one confirm.
HALVES = ("choice", "confirmation")


@dataclass(frozen=True)
class Point:
    """How much of an edit is on the model. layers: (layer, weight, density) of those that differ from the others."""

    weight: float
    density: float
    layers: tuple[tuple[int, float, float], ...] = ()

    def of_layer(self, layer: int) -> tuple[float, float]:
        """Weight and density of a layer."""
        return next(((w, d) for number, w, d in self.layers if number == layer), (self.weight, self.density))

    def with_layer(self, layer: int, weight: float, density: float) -> "Point":
        """This point with another weight and density for one layer."""
        others = [entry for entry in self.layers if entry[0] != layer]
        if (weight, density) != (self.weight, self.density):
            others.append((layer, weight, density))
        return Point(self.weight, self.density, tuple(sorted(others)))


# Measured whatever the grid is: all of R-SFT, which says how much edit success there is to keep, and the default.
RSFT, DEFAULT = Point(1.0, 1.0), Point(DEFAULT_WEIGHT, DEFAULT_DENSITY)


@dataclass
class Row:
    """What was measured of a point.

    in_grid:    whether it may be picked at all; RSFT and DEFAULT are measured wherever the grid is
    state:      "scored", "hopeless" (only edit success was asked) or "skipped"
    scores:     by half, then by metric, 0 to 1; None where no record has such probes
    locality_by_record: of the records with such probes, on the half that decides
    kl:         of the neutral text, in nats per token; perplexity: of the same text
    known_kl:   along the base's right answers to everyday questions; known_kept: the share of these answers that are
                right still, of which only the points are asked that are confirmed. Both as in `knowedit/known_facts.py`
    on_front:   whether no other point that can be picked is better in locality or KL and not worse in the other

    Of the numbers those are None that are not measured, or not finite; of the known ones all where the base knew nothing.
    """

    point: Point
    in_grid: bool = True
    state: str = "scored"
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    locality_by_record: list[float] = field(default_factory=list)
    kl: float | None = None
    perplexity: float | None = None
    known_kl: float | None = None
    known_kept: float | None = None
    on_front: bool = False

    @property
    def edit_success(self) -> float:
        """Of the half that decides; 0 in a row that was skipped."""
        return self.scores.get(HALVES[0], {}).get("edit_success") or 0.0

    @property
    def locality(self) -> float:
        """Of the half that decides; 0 without such probes."""
        return self.scores[HALVES[0]]["locality"] or 0.0


def settings(
    point: Point, names: Mapping[str, Any], names_of: Mapping[int, Sequence[str]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Weight and density of each tensor at a point, by its name, as `LiveDelta.set` takes them.

    names:    of all tensors of the edit
    names_of: of those of each layer, by its number
    """
    weights, densities = dict.fromkeys(names, point.weight), dict.fromkeys(names, point.density)
    for layer, weight, density in point.layers:
        weights |= dict.fromkeys(names_of[layer], weight)
        densities |= dict.fromkeys(names_of[layer], density)
    return weights, densities


def title(point: Point) -> str:
    """What tables, figures and messages call a point."""
    layers = "".join(f", layer {layer}: {weight:g}/{density:g}" for layer, weight, density in point.layers)
    return f"weight {point.weight:g}, density {point.density:g}{layers}"
