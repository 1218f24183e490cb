"""Write the task files of this folder: python -m mm4ke_plugins.knowedit.tasks.generate

A group asks what its data set has probes for: the fact itself, its rephrasings, and the axes of portability and
locality. Each but locality is asked twice, teacher-forced and freely, and at the end the model writes fluently. The
files whose names begin with "_" say how it is asked and scored; they and `known_facts.yaml` are written by hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .utils import AXES, OTHER, OWN_GROUP

FOLDER = Path(__file__).parent
HEADER = f"# Written by `python -m {__package__}.generate`; change that instead.\n"


@dataclass(frozen=True)
class Group:
    """What the records of a data set may have.

    free_length: tokens of a free answer, where it needs more than `_free.yaml` gives it
    """

    name: str
    locality: tuple[str, ...]
    portability: tuple[str, ...] = AXES["portability"]
    has_rephrasings: bool = False
    free_length: int | None = None


GROUPS = (
    Group("knowedit_zsre", locality=("Relation_Specificity",), has_rephrasings=True),
    Group("knowedit_wiki_recent", locality=("Relation_Specificity", "Forgetfulness")),
    Group("knowedit_wiki_counterfact", locality=("Relation_Specificity", "Forgetfulness")),
    Group("knowedit_wikibio", locality=("Relation_Specificity",), portability=(), free_length=128),  # of sentences
    Group(
        OWN_GROUP,
        locality=(*AXES["locality"], OTHER),
        portability=(*AXES["portability"], OTHER),
        has_rephrasings=True,
    ),
)


def files() -> dict[str, str]:
    """The text of each file by its name."""
    return {f"{name}.yaml": HEADER + text for group in GROUPS for name, text in _group_files(group)}


def _group_files(group: Group) -> Iterator[tuple[str, str]]:
    """(name, text) of each task of a group in the order in which lm-eval shows them, and of the group at last."""
    asked = ["edit_success", *["generalization"] * group.has_rephrasings]
    tasks = [
        *(_task(group, "forced", metric, metric) for metric in asked),
        *(_task(group, "forced", "portability", "portability", axis) for axis in group.portability),
        *(_task(group, "locality", "locality", "locality", axis) for axis in group.locality),
        *(_task(group, "free", f"{metric}_free", metric) for metric in asked),
        *(_task(group, "free", "portability_free", "portability", axis) for axis in group.portability),
        _task(group, "fluency", "fluency", "fluency"),
    ]
    yield from tasks
    lines = [f"group: {group.name}", "task:", *(f"  - {name}" for name, _ in tasks), "metadata:", "  version: 1.0"]
    yield group.name, "\n".join(lines) + "\n"


def _task(group: Group, kind: str, title: str, metric: str, axis: str = "") -> tuple[str, str]:
    """kind: the shared file. title: what the task is called, before its axis."""
    name = "_".join(filter(None, [group.name, title, axis.lower()]))
    asks = {"group": group.name, "metric": metric} | ({"axis": axis} if axis else {})
    pairs = ", ".join(f"{key}: {value}" for key, value in asks.items())
    lines = [f"include: _{kind}.yaml", f"task: {name}", f"dataset_kwargs: {{{pairs}}}"]
    if kind == "free" and group.free_length:
        lines.append(f"generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {group.free_length}}}")
    return name, "\n".join(lines) + "\n"


def write(folder: Path = FOLDER) -> None:
    """Write the files to a folder. Those of groups and tasks that are no longer there are removed."""
    texts = files()
    for path in folder.glob("knowedit_*.yaml"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
