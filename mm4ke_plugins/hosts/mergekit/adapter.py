"""`merge_method: mm4ke` in mergekit's recipes: Equations 5 and 6 on every tensor of a model.

Two seams of mergekit 0.1.5:

    mergekit.merge_methods.registry   the method, registered as mergekit registers its own
    mergekit.merge                    run_merge: recipe and models are checked first, the result is written aside

A program that imports `mergekit.merge` before torch gets the method without the second seam, since that module then
is half-imported when PyTorch calls us. So the method itself checks all that it can see: ranges, shapes, NaN.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from pydantic import Field

from ...errors import report_in_one_line
from ...merging.choice import DEFAULT_DENSITY, DEFAULT_WEIGHT
from ...merging.equations import merge
from ...storage.atomic import refused_in_one_line, replaced_folder
from ...storage.replacing import note_files
from .. import MERGEKIT
from .output import check_output

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

# Weights beyond 1 (more than the training did) and below 0 (forgetting) are known practice; 80 is a percentage.
Weight = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class KnowledgeMerge(MergeMethod):
    """base + sum over the other models of weight * Top_density(model - base), one tensor at a time.

    Both parameters may differ by model, by layer (gradients) and by tensor (filters), as in all mergekit recipes.
    The deltas of several models add up, as in `task_arithmetic`. Tensors that no model changed stay as they are;
    the others are computed in float32 and rounded once, to the dtype that the base has or the recipe asks for.
    """

    spec = MergeMethodSpec(
        name="mm4ke",
        pretty_name="MM4KE (Model Merging for Knowledge Editing)",
        reference_url="https://arxiv.org/abs/2506.12384",
        parameters=(
            ParameterSpec("weight", Weight, ParameterScope.NON_BASE, default=DEFAULT_WEIGHT),
            ParameterSpec("density", Density, ParameterScope.NON_BASE, default=DEFAULT_DENSITY),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        # An output head that only the base stores is the base's.
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )

    def _execute_resolved(self, groups, parameters, *, dtype=None, out_dtype=None, batch_options=None):
        """`dtype` is that of the result, as in recipes: to cast the inputs to it would round them before the delta."""
        result = {"out_dtype": out_dtype or dtype, "batch_options": batch_options}
        return super()._execute_resolved(groups, parameters, **result)

    # GroupMergeMethod would hand over tensors that are cast to the widest dtype already, and the base's would be lost.
    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: Sequence[Mapping[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        return tuple(
            merge(
                group.base.tensor,
                [entry.tensor for entry in group.non_base],
                values["weight"].values_for(group.non_base),
                values["density"].values_for(group.non_base),
                names=[f"{entry.id}: {group.metadata.name}" for entry in (group.base, *group.non_base)],
                dtype=out_dtype,
            )
            for group, values in zip(groups, parameters, strict=True)
        )


METHOD = KnowledgeMerge()


def register(module: ModuleType) -> None:
    """Called once for each seam, right after mergekit has executed it."""
    {
        "mergekit.merge_methods.registry": register_method,
        "mergekit.merge": replace_run_merge,
    }[module.__name__](module)


def register_method(registry: ModuleType) -> None:
    """Make the method known by its name, unless an entry point (see third_party_patches) has done so, and have
    mergekit's commands check their recipes."""
    if METHOD.spec.name not in {method.spec.name for method in registry.registered_methods()}:
        registry.register(METHOD)
    from mergekit.options import MergeOptions

    apply_global_options = MergeOptions.apply_global_options

    @functools.wraps(apply_global_options)
    def check_command_and_apply(options):
        from .commands import check_command

        check_command(options, METHOD.spec)
        return apply_global_options(options)

    # What each of the commands that read a recipe calls first.
    MergeOptions.apply_global_options = check_command_and_apply


def replace_run_merge(module: ModuleType) -> None:
    """Have recipes with our method checked first and their result written aside; all others run as before."""
    from .caches import models_as_they_are
    from .commands import check_method, for_legacy
    from .delta import deltas_as_models
    from .heads import Heads
    from .plan import Planner
    from .recipe import check_models, check_recipe, write_vocabulary_size
    from .stream import StreamingExecutor

    run_merge = module.run_merge

    @contextmanager
    def own_parts() -> Iterator[None]:
        """For as long as this is open `run_merge` works with our parts; otherwise mergekit's names are mergekit's."""
        ours = {
            "MergePlanner": functools.partial(Planner, METHOD.spec.name),
            "Executor": functools.partial(StreamingExecutor, METHOD.spec.name),
        }
        theirs = {name: getattr(module, name) for name in ours}
        vars(module).update(ours)
        try:
            yield
        finally:
            vars(module).update(theirs)

    @functools.wraps(run_merge)
    def check_and_run_merge(merge_config, out_path, options, config_source=None):
        check_method(merge_config.merge_method, METHOD.spec)
        if merge_config.merge_method != METHOD.spec.name:
            return run_merge(merge_config, out_path, options, config_source)
        report_in_one_line()
        MERGEKIT.require_supported(f"merge_method: {METHOD.spec.name}")
        merge_config = for_legacy(merge_config, METHOD.spec)
        config_source = config_source or merge_config.to_yaml()
        check_recipe(merge_config, config_source, METHOD.spec)
        check_output(out_path, merge_config)
        with models_as_they_are(), deltas_as_models(merge_config, options) as (config, names):
            check_models(config, options)
            heads = Heads(config)
            with refused_in_one_line(Path(out_path)), replaced_folder(Path(out_path).resolve()) as folder, own_parts():
                run_merge(round_at_the_end(config), str(folder), options, config_source)
                if options.unsafe_truncate_embeddings:
                    write_vocabulary_size(folder, config, options)
                heads.write(folder)
                card = folder / "README.md"
                for path, name in names.items() if card.is_file() else ():
                    card.write_text(card.read_text(encoding="utf-8").replace(path, name), encoding="utf-8")
                note_files(folder)
                check_output(out_path, merge_config)  # a merge takes minutes, in which much can be put there

    module.run_merge = check_and_run_merge


def round_at_the_end(merge_config: "MergeConfiguration") -> "MergeConfiguration":
    """The same recipe, with `dtype` meaning what it means to users: the dtype of the result.

    mergekit casts the inputs to `dtype`, which would round a float32 R-SFT tensor before its delta is taken.
    """
    if not (merge_config.dtype or merge_config.out_dtype):
        return merge_config
    out_dtype = merge_config.out_dtype or merge_config.dtype
    return merge_config.model_copy(update={"dtype": "float32", "out_dtype": out_dtype})
