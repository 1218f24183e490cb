"""Output heads that one of the models ties to its embedding and another does not, in a merge.

mergekit takes the embedding for a head that is not stored, which is right. But it gives the result the base's
configuration, which still says that the two are tied, and a head to a model that has lost its own.
"""

from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

from ...errors import MM4KEError
from ...storage.names import ModelNames, model_names, untied


def names_in(model: ModelReference) -> ModelNames | None:
    """The tensors of a model that mergekit has opened before; None where they are pickled."""
    index = LoaderCache().get(model).index
    return model_names(Path(index.base_path)) if index.is_safetensors else None


def differ_in_the_head(base: ModelReference, edited: ModelReference) -> bool:
    """Whether one of two models ties what the other does not, though their tensors of one name are alike."""
    names = [names_in(base), names_in(edited)]
    if None in names:
        return False
    pairs = {pair for one in names for pair in one.tied.items() if all({*pair} <= two.stored.keys() for two in names)}
    return any(names[0].same(*pair) != names[1].same(*pair) for pair in pairs)


class Heads:
    """The output heads of the models of a merge.

    Raises MM4KEError for an edited model that has none: not tied and not stored.
    """

    def __init__(self, config: MergeConfiguration) -> None:
        models = [config.base_model, *(set(config.referenced_models()) - {config.base_model})]
        self.untied: list[tuple[str, str]] = []  # what the base ties and an edited model does not
        if config.base_model is None or None in (names := [names_in(model) for model in models]):
            return
        base, *others = names
        for model, other in zip(models[1:], others):
            if lost := sorted((base.stored.keys() & other.needed) - other.stored.keys()):
                raise MM4KEError(f"models: {model}: {lost[0]} is missing; copy or save the model again")
        self.untied = [
            pair
            for pair in base.tied.items()
            if any({*pair} <= other.stored.keys() and not other.same(*pair) for other in others)
        ]

    def write(self, folder: Path) -> None:
        """Have the result's configuration say what it no longer ties.

        Raises MM4KEError where mergekit left out the head.
        """
        if not self.untied or not any(folder.glob("*.safetensors")):
            return
        names, file = model_names(folder), folder / "config.json"
        for name, other in self.untied:
            if name not in names.stored or not names.is_stored(name):
                raise MM4KEError(
                    f"{name}: is not tied to {other} in an edited model, and this version of mergekit would leave it "
                    "out; merge by `mm4ke delta extract` and `apply`"
                )
            if not names.same(name, other):
                file.write_text(untied(file.read_text(encoding="utf-8")), encoding="utf-8")
                return
