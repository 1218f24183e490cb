"""lm-eval finds the model type `mm4ke` and the KnowEdit tasks by name.

Two seams of lm-eval 0.4.13, neither of which imports torch:

    lm_eval.models         the registry of models, which lm-eval fills right before it looks a model up
    lm_eval.tasks._index   TaskIndex.build, which collects the tasks of the harness and of `--include_path`

`lm_eval run` looks up the names of `--tasks` before anything imports torch, and thereby us; so do `ls` and `validate`.
They need `--include_path` (`mm4ke tasks` prints it; a recipe may say it as well). The model type needs nothing, since
lm-eval seeds torch before it looks for a model. A program that calls `simple_evaluate` without a task manager of its
own gets both.
"""

import functools
from pathlib import Path
from types import ModuleType

MODEL = "mm4ke"

PACKAGE = Path(__file__).parents[2]
# KnowEdit, and the tasks of general ability.
TASK_FOLDERS = (PACKAGE / "knowedit" / "tasks", PACKAGE / "general" / "tasks")


def register(module: ModuleType) -> None:
    """Called once for each seam, right after lm-eval has executed it."""
    {"lm_eval.models": register_model, "lm_eval.tasks._index": add_tasks}[module.__name__](module)


def register_model(models: ModuleType) -> None:
    """Make the model type known by its name, unless an entry point (see third_party_patches) has done so."""
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="mm4ke_plugins.hosts.lm_eval.model:MM4KELM")


def add_tasks(index_module: ModuleType) -> None:
    """Have our folders scanned right after the harness's own, so that those of `--include_path` still win."""
    build = index_module.TaskIndex.build
    own = Path(index_module.__file__).parent

    @functools.wraps(build)
    def build_with_ours(paths, **options):
        paths = [Path(path) for path in paths]
        if own in paths:  # not where a program asks for its own tasks alone
            at = paths.index(own) + 1
            given = [path.resolve() for path in paths]
            paths[at:at] = [
                folder
                for folder in TASK_FOLDERS
                if folder.is_dir() and not any(folder.resolve().is_relative_to(path) for path in given)
            ]
        return build(paths, **options)

    index_module.TaskIndex.build = staticmethod(build_with_ours)
