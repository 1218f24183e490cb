"""`mm4ke prepare-data`: a folder that lm-eval reads, with `--include_path`, instead of the hub.

Each benchmark gets a folder of its own: parquet files in the form of the hub's data set, with the README that the
`datasets` library reads, and lm-eval's own tasks under their own names, pointed to these files. So
`lm_eval run --include_path OUTPUT --tasks drop` has lm-eval's prompts and metrics, and needs no hub. SQuAD 2.0 and
LogiQA are `mm4ke_squadv2` and `mm4ke_logiqa`, as in the package.
"""

import importlib.util
import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from ..errors import MM4KEError
from ..storage.atomic import locked_folder, refused_in_one_line, replaced_folder
from ..storage.replacing import refuse_to_replace, users_files
from .sources import BENCHMARKS, SUFFIXES, Table, UnknownFile, read_source

OWN_TASKS = Path(__file__).parent / "tasks"
MADE_BY = "Made by `mm4ke prepare-data` from:"


def find_files(sources: Iterable[Path], output: Path) -> list[tuple[Path, bool]]:
    """The files given by name (True) and those in the folders given (False), sorted; never those in `output`."""
    found: dict[Path, bool] = {}
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file())
            for path in inside:
                hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
                if not hidden and not path.resolve().is_relative_to(output.resolve()):
                    found.setdefault(path, False)
        elif source.exists():
            found[source] = True
        else:
            raise MM4KEError(f"{source}: does not exist; give a raw benchmark file or a folder of them")
    return list(found.items())


def read_sources(files: Iterable[tuple[Path, bool]]) -> tuple[list[Table], list[Path]]:
    """The tables of all benchmark files, and the files in folders that are none.

    Raises MM4KEError for a damaged file, for a file given by name that is no benchmark's, for two files with the
    same part of a benchmark, and for a benchmark without the split that lm-eval scores.
    """
    tables: dict[tuple[str, str, str], Table] = {}
    left_out = []
    for path, by_name in files:
        try:
            table = read_source(path)
        except UnknownFile:
            if by_name:
                raise
            left_out.append(path)
            continue
        part = (table.benchmark, table.config, table.split)
        if part in tables:
            raise MM4KEError(f"{path}: {_name(table)}: {tables[part].source} holds that too; give one of the two")
        tables[part] = table
    for benchmark, config, _ in tables:
        scored = next(iter(BENCHMARKS[benchmark].splits))
        if (benchmark, config, scored) not in tables:
            table = next(table for part, table in tables.items() if part[:2] == (benchmark, config))
            raise MM4KEError(f"{table.source}: {_name(table)}: lm-eval scores {scored}; give that file too")
    return list(tables.values()), left_out


def _name(table: Table) -> str:
    return " ".join(part for part in (table.benchmark, table.config, table.split) if part != "default")


def write_benchmarks(tables: list[Table], output: Path) -> None:
    """Write a folder for each benchmark, replacing an older one; nothing is replaced before all are complete.

    Raises MM4KEError where lm_eval is not installed: the tasks are its own; where a folder has other files.
    """
    lm_eval = importlib.util.find_spec("lm_eval")
    if lm_eval is None:
        raise MM4KEError(
            "lm_eval: not installed here; the prepared tasks are its own: pip install 'lm-eval[hf]==0.4.13'"
        )
    lm_eval_tasks = Path(lm_eval.submodule_search_locations[0]) / "tasks"
    output = output.absolute()
    by_benchmark: dict[str, list[Table]] = {}
    for table in tables:
        by_benchmark.setdefault(table.benchmark, []).append(table)
    for name in by_benchmark:
        _check_replaceable(output / name)
    with (
        refused_in_one_line(output, "give a folder that can be written to"),
        locked_folder(output),
        ExitStack() as stack,
    ):
        folders = {name: stack.enter_context(replaced_folder(output / name)) for name in by_benchmark}
        for name, parts in by_benchmark.items():
            _write_tables(parts, folders[name])
            for file, text in _task_files(name, parts, output / name, lm_eval_tasks).items():
                (folders[name] / file).write_text(text, encoding="utf-8")


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but what we write there, such as the raw files."""
    if not folder.exists():
        return
    readme = folder / "README.md"
    is_ours = readme.is_file() and MADE_BY in readme.read_text(encoding="utf-8", errors="replace")
    if not folder.is_dir() or (not is_ours and any(folder.iterdir())):
        raise MM4KEError(f"{folder}: exists and was not prepared by mm4ke; remove it or choose another --output")
    known = re.compile(r"README\.md|[^/]+\.yaml|[^/]+/[^/]+\.parquet")
    refuse_to_replace(
        folder, "holds more than prepared data", users_files(folder, lambda name: bool(known.fullmatch(name)))
    )


def _write_tables(tables: list[Table], folder: Path) -> None:
    """Parquet files and the README whose head tells `datasets` which of them is which config and split."""
    import pyarrow
    import pyarrow.parquet

    configs: dict[str, list[str]] = {}
    for table in tables:
        file = folder / table.config / f"{table.split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table.records, _schema(table.benchmark)), file)
        line = f"  - split: {table.split}\n    path: {file.relative_to(folder)}\n"
        configs.setdefault(table.config, []).append(line)
    head = "".join(f"- config_name: {name}\n  data_files:\n{''.join(lines)}" for name, lines in configs.items())
    sources = "".join(f"- {table.source}\n" for table in tables)
    text = f"---\nconfigs:\n{head}---\n{MADE_BY}\n\n{sources}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _schema(benchmark: str):
    """Where lists may be empty in every record of a small file, their type has to be said; else pyarrow finds it."""
    import pyarrow

    string, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    if benchmark == "squadv2":
        answers = pyarrow.struct({"text": texts, "answer_start": pyarrow.list_(pyarrow.int64())})
        return pyarrow.schema({key: string for key in ("id", "title", "context", "question")} | {"answers": answers})
    if benchmark == "drop":
        date = pyarrow.struct({key: string for key in ("day", "month", "year")})
        answer = {"number": string, "date": date, "spans": texts}
        validated = pyarrow.struct({key: pyarrow.list_(kind) for key, kind in answer.items()})
        columns = {key: string for key in ("query_id", "passage", "question")}
        return pyarrow.schema(columns | {"answer": pyarrow.struct(answer), "validated_answers": validated})
    return None


def _task_files(benchmark: str, tables: list[Table], folder: Path, lm_eval_tasks: Path) -> dict[str, str]:
    """lm-eval's own YAML files of the benchmark, included, with this data and the splits that there are."""
    keys = BENCHMARKS[benchmark].splits
    configs = sorted({table.config for table in tables})
    missing = {key: None for split, key in keys.items() if split not in {table.split for table in tables}}
    if benchmark == "ceval":
        subjects = {table.config: table.source for table in tables}
        changes = {"task": _parts(lm_eval_tasks / "ceval", "ceval-valid", subjects)} | missing
        return {"ceval-valid.yaml": _task_file(lm_eval_tasks / "ceval/_ceval-valid.yaml", folder, changes)}
    if benchmark == "mmlu_pro":
        scored = (table for table in tables if table.split == "test")
        categories = {row["category"].replace(" ", "_"): table.source for table in scored for row in table.records}
        changes = {"task": _parts(lm_eval_tasks / "mmlu_pro", "mmlu_pro", categories)} | missing
        if "fewshot_split" in missing:
            changes["num_fewshot"] = 0
        return {"mmlu_pro.yaml": _task_file(lm_eval_tasks / "mmlu_pro/_mmlu_pro.yaml", folder, changes)}
    if benchmark == "super_glue":
        files = {}
        for config in configs:
            splits = {table.split for table in tables if table.config == config}
            changes = {key: None for split, key in keys.items() if split not in splits}
            name = config.removesuffix(".fixed")
            files[f"{name}.yaml"] = _task_file(lm_eval_tasks / "super_glue" / name / "default.yaml", folder, changes)
        return files
    if benchmark == "squadv2":
        return {"mm4ke_squadv2.yaml": _task_file(OWN_TASKS / "mm4ke_squadv2.yaml", folder, {})}
    if benchmark == "logiqa":
        changes = {"task": BENCHMARKS[benchmark].task} | missing
        return {"mm4ke_logiqa.yaml": _task_file(lm_eval_tasks / "logiqa/logiqa.yaml", folder, changes)}
    return {f"{benchmark}.yaml": _task_file(lm_eval_tasks / benchmark / "default.yaml", folder, missing)}


def _parts(folder: Path, group: str, sources: dict[str, Path]) -> list[str]:
    """lm-eval's tasks for the parts of a group that there are; `sources` says which file each part came from."""
    tasks = {name: f"{group}_{name}" for name in sorted(sources)}
    for name, task in tasks.items():
        if not (folder / f"{task}.yaml").exists():
            known = ", ".join(sorted(file.stem.removeprefix(f"{group}_") for file in folder.glob(f"{group}_*.yaml")))
            raise MM4KEError(f"{sources[name]}: {name}: no part of lm-eval's {group}; its parts are {known}")
    return list(tasks.values())


def _task_file(include: Path, folder: Path, changes: dict) -> str:
    """A task of lm-eval with another data set. JSON values are YAML values too."""
    values = {"include": str(include), "dataset_path": str(folder)} | changes
    head = "# lm-eval's task on prepared data. After moving this folder or lm-eval run `mm4ke prepare-data` again.\n"
    return head + "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
