"""Weight and density of Equation 6: their range, and what they are where nothing is said. Imports nothing heavy."""

from ..errors import MM4KEError

# The paper's, for all that merges: recipes, unfinished deltas, edits of a live model.
DEFAULT_WEIGHT = DEFAULT_DENSITY = 0.8


def choose(weight: float | None, density: float | None, finished: bool = False) -> tuple[float, float]:
    """The weight and density that count where one may be left out: 1 and 1 for a finished delta, else the defaults.

    Raises MM4KEError for a weight outside -10 to 10 and a density that is not above 0 and up to 1.
    """
    weight = (1.0 if finished else DEFAULT_WEIGHT) if weight is None else weight
    density = (1.0 if finished else DEFAULT_DENSITY) if density is None else density
    if not isinstance(weight, (int, float)) or not -10 <= weight <= 10:
        raise MM4KEError(f"weight: {weight}: give a number from -10 to 10 (default {DEFAULT_WEIGHT})")
    if not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise MM4KEError(f"density: {density}: give a share above 0, up to 1 (default {DEFAULT_DENSITY})")
    return float(weight), float(density)
