"""A merge planned by the tensors that the models store, where mergekit's list of the architecture's does not fit them.

mergekit 0.1.5 lists tensors by architecture: for gpt_neox buffers that transformers no longer saves, for falcon the
norms of one of its kinds, for many the output head that tied embeddings have not, for a quantized model the weights
that it no longer has. And it saves experts that were stored one by one as one tensor. None of this matters where whole
models are merged tensor by tensor: every tensor of the base gets its delta, under its own name.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.architecture.base import ConfiguredModelArchitecture
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

LAYER = re.compile(r"\.(\d+)\.")


def listed(model: ModelReference, config: MergeConfiguration, options: MergeOptions) -> list[WeightInfo]:
    """The tensors that mergekit would merge, as its description of the architecture names them for this model."""
    info = get_architecture_info(config, options)
    found = ConfiguredModelArchitecture(info=info, config=model.config(options.trust_remote_code))
    return found.all_weights()


def not_stored(weights: Iterable[WeightInfo], stored: Iterable[str]) -> list[str]:
    """Those of the listed tensors that have to be there and are not, under none of their names."""
    stored = set(stored)
    return [weight.name for weight in weights if not weight.optional and not names_of(weight) & stored]


def not_loadable(names: Iterable[str], stored: Iterable[str], model_type: str) -> list[str]:
    """Those of these that mergekit can't make from stored tensors of other names either."""
    stored = set(stored)
    return [name for name in names if not can_convert_checkpoint_keys(model_type, stored, name)]


def names_of(weight: WeightInfo) -> set[str]:
    return {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}


def takes_models_as_they_are(config: MergeConfiguration, options: MergeOptions) -> bool:
    """Whether a recipe leaves layers and vocabularies as they are, so that tensors of one name belong together."""
    changes = config.slices or config.modules or config.tokenizer or config.tokenizer_source
    return not (changes or options.unsafe_truncate_embeddings)


class Planner(MergePlanner):
    """mergekit's planner, but for a recipe of ours whose models don't store what mergekit lists."""

    def __init__(self, method_name: str, config: MergeConfiguration, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._names: list[str] = []  # of the tensors to merge, where mergekit's list is not used
        if config.merge_method == method_name and takes_models_as_they_are(config, self.options):
            models = config.referenced_models()
            if any(not_stored(listed(model, config, self.options), self._stored(model)) for model in models):
                self._names = list(self._stored(config.base_model))

    @staticmethod
    def _stored(model: ModelReference) -> dict[str, str]:
        return LoaderCache().get(model).index.tensor_paths

    def _plan(self) -> None:
        if not self._names:
            super()._plan()
            return
        # Settings of a model are read from a slice, as mergekit itself makes one of each list of models.
        self.normalize_config()
        module = next(iter(self.config.modules.values()))
        (all_layers,) = module.slices
        models = [source.model for source in all_layers.sources]
        reader = ConfigReader(config=self.config, t=0, slice_out=all_layers, module=module)
        for name in self._names:
            weight = WeightInfo(name=name, optional=any(name not in self._stored(model) for model in models))
            self.plan_tensor(weight, [weight] * len(models), models, reader.with_t(self._place(name)))

    def _place(self, name: str) -> float:
        """From 0 for the first to 1 for the last layer, for gradients; 0 for what is in no layer."""
        layer = LAYER.search(name)
        if layer is None:
            return 0
        last = self._last_layers[name[: layer.start()]]
        return int(layer[1]) / last if last else 1

    @cached_property
    def _last_layers(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for layer in filter(None, map(LAYER.search, self._names)):
            prefix = layer.string[: layer.start()]
            last[prefix] = max(last.get(prefix, 0), int(layer[1]))
        return last
