"""Knowledge deltas on a live model of the transformers library, put on and taken off again without a trace.

    with apply_delta(model, "facts.delta.safetensors", weight=0.8):
        ...                                  # the model knows the facts
                                             # and here it is the base again, bit for bit, whatever happened

To try many weights and densities, decode the delta once:

    live = LiveDelta(model, load_delta(path))
    live.set(weight=0.5, density=0.2)        # as often as you like
    live.remove()
"""

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import MM4KEError
from ..merging.choice import choose
from ..storage.names import name_in
from ..storage.tensors import FLOATS
from ..storage.threads import in_threads
from .base import check_base, merged_tensor
from .format import KnowledgeDelta, load_delta

# The deltas that are on a model, the first put on first.
on_models: weakref.WeakKeyDictionary[torch.nn.Module, list["LiveDelta"]] = weakref.WeakKeyDictionary()


@contextmanager
def apply_delta(
    model: torch.nn.Module,
    delta: KnowledgeDelta | Path | str,
    weight: float | Mapping[str, float] | None = None,
    density: float | Mapping[str, float] | None = None,
) -> Iterator["LiveDelta"]:
    """While this is open, the model has the edit; then it is as it was before, bit for bit, also after an exception.

    The numbers are those that `mm4ke delta apply` and mergekit write for this weight and density, see `LiveDelta.set`.
    Within another delta's block both are on: their differences add up, as in one `merging.equations.merge` of both. A delta that
    was put on within this block and is still on at its end is taken off with it.

    Raises MM4KEError, before the model is touched: what `load_delta` raises, and what `LiveDelta` does.
    """
    live = LiveDelta(model, delta if isinstance(delta, KnowledgeDelta) else load_delta(Path(delta)))
    try:
        live.set(weight, density)
        yield live
    finally:
        live.remove_with_later()


class LiveDelta:
    """A delta that is decoded for a model, and may be on it or not.

    On the model's devices it keeps the base's tensors (a copy) and the edited ones: for an FFN of a 7B bfloat16 model
    0.4 GB each, the latter twice that if they were trained in float32. Parameters keep their storage, so that tied
    ones stay tied.

    Raises MM4KEError; the model is then as it was. It lacks a tensor, or has it in another shape or dtype, with other
    numbers (the hash is compared, of the delta's tensors only), quantized, on the meta device (where weights that
    are offloaded are), or ties two that the delta changes differently; the result is not finite.
    """

    def __init__(self, model: torch.nn.Module, delta: KnowledgeDelta):
        self.model, self.delta = model, delta
        self.choices: dict[str, tuple[float, float]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.names = _model_names(parameters, model, delta)
        self.parameters = {name: _usable(parameters, own, model) for name, own in self.names.items()}
        if head := delta.manifest.untied_head:
            prefix = getattr(model, "base_model_prefix", "")
            one, other = (parameters.get(name_in(parameters, name, prefix)) for name in (head.name, head.embedding))
            if one is other:
                raise MM4KEError(
                    f"{delta.path}: unties {head.name} from {head.embedding}, which the live {type(model).__name__} "
                    "ties; load the folder that `mm4ke delta apply` makes"
                )
        # What an outer delta has changed is here as the base had it.
        outer = {name: base for live in on_models.get(model, []) for name, base in live.base.items()}
        self.base = {name: outer.get(name, parameter.detach()) for name, parameter in self.parameters.items()}
        owner = f"the live {type(model).__name__}"

        def decode(name: str) -> torch.Tensor:
            check_base([delta], name, self.base[name], owner)
            return delta.edited(name, self.base[name])

        self.edited = dict(zip(self.base, in_threads(decode, self.base), strict=True))
        names_of: dict[int, str] = {}
        for name, parameter in self.parameters.items():
            first = names_of.setdefault(id(parameter), name)
            if first != name and not torch.equal(self.edited[first], self.edited[name]):
                raise MM4KEError(
                    f"{delta.path}: changes {first} and {name} differently, which {owner} ties; "
                    "give a model that doesn't tie them"
                )
        self.base = {name: base if name in outer else base.clone() for name, base in self.base.items()}
        self.before: dict[str, torch.Tensor] | None = None

    def set(
        self,
        weight: float | Mapping[str, float] | None = None,
        density: float | Mapping[str, float] | None = None,
    ) -> None:
        """Put the delta on the model, or change how much of it is on.

        weight, density: as in `merging.equations.merge`; for all tensors, or by tensor name (a name that is left out has the
                         default, see `merging.choice.choose`)

        Of several deltas on a model only the last may be changed. Raises MM4KEError for numbers out of range, tensor
        names that the delta doesn't have, and a result that is not finite; the model is then as it was.
        """
        for key, value in (("weight", weight), ("density", density)):
            if isinstance(value, Mapping) and (unknown := sorted(value.keys() - self.edited.keys())):
                raise MM4KEError(f"{key}: {unknown[0]}: not in {self.delta.path}; there are: {', '.join(self.edited)}")
        choices = {
            name: choose(
                weight.get(name) if isinstance(weight, Mapping) else weight,
                density.get(name) if isinstance(density, Mapping) else density,
                self.delta.manifest.applied is not None,
            )
            for name in self.edited
        }
        stack = on_models.setdefault(self.model, [])
        if self.before is not None and stack[-1] is not self:
            raise RuntimeError("another delta was put on this model later; take that one off first")
        outer = [live for live in stack if live is not self]
        merged = dict(zip(self.edited, in_threads(lambda name: self._merged(name, choices[name], outer), self.edited)))
        if self.before is None:
            covered = {name for live in outer for name in live.edited}
            current = {name: self.parameters[name].detach().clone() for name in covered & self.base.keys()}
            self.before = self.base | current
            stack.append(self)
        self.choices = choices
        self._fill(merged)

    def remove(self) -> None:
        """Take the delta off the model, which then has the numbers that it had before the first `set`."""
        if self.before is None:
            return
        stack = on_models[self.model]
        if stack[-1] is not self:
            raise RuntimeError("another delta was put on this model later; take that one off first")
        self._fill(self.before)
        self.before = None
        stack.pop()

    def remove_with_later(self) -> None:
        """Take the delta off the model, and before it those that were put on later."""
        while self.before is not None:
            on_models[self.model][-1].remove()

    def keep(self) -> dict[str, torch.Tensor]:
        """Leave the delta on the model for good. Returns the tensors as they were before it, by the model's names.

        Only the single delta on a model can stay: the numbers of several depend on all of them.
        """
        if on_models[self.model] != [self]:
            raise RuntimeError(
                "another delta is on this model, which would take this one off; take that one off first"
            )
        on_models[self.model].remove(self)
        before, self.before = self.before, None
        return {self.names[name]: tensor for name, tensor in before.items()}

    def _merged(self, name: str, choice: tuple[float, float], outer: list["LiveDelta"]) -> torch.Tensor:
        lives = [*(live for live in outer if name in live.edited), self]
        return merged_tensor(
            name,
            self.base[name],
            [live.edited[name] for live in lives],
            [*(live.choices[name] for live in lives[:-1]), choice],
            [str(live.delta.path) for live in lives],
            [live.delta.manifest.applied is not None for live in lives],
        )

    @torch.no_grad()
    def _fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)


def _model_names(parameters: Collection[str], model: torch.nn.Module, delta: KnowledgeDelta) -> dict[str, str]:
    """What the model calls each tensor of the delta, whose names may lack the model's prefix as its base's files do."""
    names = {}
    for name in delta.manifest.tensors:
        found = name_in(parameters, name, getattr(model, "base_model_prefix", ""))
        if found is None:
            raise MM4KEError(
                f"{delta.path}: {name} is not in the live {type(model).__name__}; "
                "give the model that the delta was taken from"
            )
        names[name] = found
    return names


def _usable(parameters: Mapping[str, torch.nn.Parameter], name: str, model: torch.nn.Module) -> torch.nn.Parameter:
    """The parameter with this name, if it holds plain numbers."""
    owner = type(model).__name__
    parameter = parameters[name]
    if parameter.is_meta:
        raise MM4KEError(
            f"the live {owner}: {name} is on the meta device: offloaded, or not loaded; "
            "load the model with its weights on a CPU or GPU"
        )
    # Quantizers put their numbers into integers, or into tensors of a class of their own.
    if type(parameter) is not torch.nn.Parameter or parameter.dtype not in FLOATS.values():
        raise MM4KEError(
            f"the live {owner}: {name} is quantized ({type(parameter).__name__}, {parameter.dtype}); "
            "load the model without quantization"
        )
    return parameter
