"""The settings of R-SFT and of the merge after it, in one form and checked, whatever host they come from."""

import math
from dataclasses import dataclass

from ..errors import MM4KEError
from ..merging.choice import DEFAULT_DENSITY, DEFAULT_WEIGHT

SCHEDULES = ("cosine", "constant")
GRADIENT_AT = ("all", "from_subject")


@dataclass(frozen=True)
class Settings:
    """How facts are trained (Algorithm 1) and merged (Equations 5 and 6). The defaults are the paper's.

    layers:           whose FFN is trained, counted from 0; also as one number, or as a text with commas
    modules:          ("ffn",), or parts of the FFN such as "down_proj"; also as a text with commas
    steps_per_sample: K, the most updates in one visit of one fact
    loss_threshold:   tau, in nats per token: of the answer alone, and with its end (`losses.losses_of_rows`)
    num_epochs:       the most visits of one fact
    learning_rate:    of the first visit
    lr_scheduler_type: "cosine", over all visits to 0, or "constant"
    facts_per_visit:  how many facts one visit trains: 1 is depth-first, more are breadth-first
    gradient_at:      at "all" tokens, or those "from_subject" on: see `rsft.subject`
    guard_weight:     of the guard's loss; 0 is without: see `rsft.guard`
    weight, density:  of the knowledge delta, as in `merging.equations.merge`

    Raises MM4KEError, which names the setting, its value and what would be right: "layers: -1: give the index ...".
    """

    layers: tuple[int, ...] = (5,)
    modules: tuple[str, ...] = ("ffn",)
    steps_per_sample: int = 6
    loss_threshold: float = 0.1
    num_epochs: int = 5
    learning_rate: float = 5e-4
    lr_scheduler_type: str = "cosine"
    facts_per_visit: int = 1
    gradient_at: str = "all"
    guard_weight: float = 0.0
    weight: float = DEFAULT_WEIGHT
    density: float = DEFAULT_DENSITY

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _layers(self.layers))
        object.__setattr__(self, "modules", _modules(self.modules))
        for key, right, advice in (
            ("steps_per_sample", is_count, "give a whole number of at least 1 (the paper uses 6)"),
            ("loss_threshold", _is_positive, "give a finite loss above 0 (the paper uses 0.1)"),
            ("num_epochs", is_count, "give a whole number of at least 1"),
            ("learning_rate", _is_positive, "give a finite number above 0"),
            ("lr_scheduler_type", SCHEDULES.__contains__, f"give {' or '.join(SCHEDULES)}"),
            ("facts_per_visit", is_count, "give a whole number of at least 1"),
            ("gradient_at", GRADIENT_AT.__contains__, f"give {' or '.join(GRADIENT_AT)}"),
            (
                "guard_weight",
                lambda value: _is_number(value) and value >= 0,
                "give a finite number above 0, or 0 for none",
            ),
            (
                "weight",
                lambda value: _is_number(value) and value != 0,
                f"give a finite number other than 0 (default {DEFAULT_WEIGHT})",
            ),
            (
                "density",
                lambda value: _is_positive(value) and value <= 1,
                f"give a share above 0, up to 1 (default {DEFAULT_DENSITY})",
            ),
        ):
            if not right(value := getattr(self, key)):
                raise wrong(key, value, advice)


def wrong(key: str, value: object, advice: str) -> MM4KEError:
    """The error that a setting's value is."""
    return MM4KEError(f"{key}: {value}: {advice}")


def is_count(value: object, least: int = 1) -> bool:
    """Whether this is a whole number of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0


def _as_list(value: object) -> list:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _layers(value: object) -> tuple[int, ...]:
    advice = "give the index of a layer, counted from 0, or a list of them"
    layers = [int(part) if isinstance(part, str) and part.isdecimal() else part for part in _as_list(value)]
    if not layers or not all(is_count(layer, 0) for layer in layers):
        raise wrong("layers", value, advice)
    if len(set(layers)) != len(layers):
        raise wrong("layers", value, f"{advice}, each once")
    return tuple(sorted(layers))


def _modules(value: object) -> tuple[str, ...]:
    modules = _as_list(value)
    if not modules or not all(isinstance(part, str) and part for part in modules):
        raise wrong("modules", value, "give ffn, or names of its parts such as down_proj")
    if len(set(modules)) != len(modules) or ("ffn" in modules and len(modules) > 1):
        raise wrong("modules", value, "name each part once; ffn already is all of them")
    return tuple(modules)
