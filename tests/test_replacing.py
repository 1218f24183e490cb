"""What a user keeps in a folder is never lost when a command writes there."""

import os
import shutil
from pathlib import Path

import pytest
from mergekit_helpers import recipe, refuses, run_merge

from mm4ke_plugins.delta.folders import apply, extract, revert
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.general import prepare
from mm4ke_plugins.general.sources import Table
from mm4ke_plugins.hosts.mergekit.stream import StreamingExecutor
from mm4ke_plugins.storage.replacing import RECORD, note_files, users_files

# ---- merges ----


def put(out: Path, name: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")


def edit_card(out: Path) -> None:
    (out / "README.md").write_text((out / "README.md").read_text() + "\nWhat I found out about it.\n")


def retrain(out: Path) -> None:
    """Other weights, of the same size."""
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)


USERS_FILES = {
    "quantized": (lambda out: put(out, "model-q4_k_m.gguf"), "model-q4_k_m.gguf"),
    "notes": (lambda out: put(out, "notes.txt"), "notes.txt"),
    "hidden": (lambda out: put(out, ".env"), ".env"),
    "subfolder": (lambda out: put(out, "gguf/q4/model.gguf"), "gguf/q4/model.gguf"),
    "subfolder with our names": (lambda out: put(out, "old/config.json"), "old/config.json"),
    "repository": (lambda out: put(out, ".git/HEAD"), ".git/HEAD"),
    "empty folder": (lambda out: (out / "plans").mkdir(), "plans"),
    "adapter": (lambda out: put(out, "adapter_model.safetensors"), "adapter_model.safetensors"),
    "other shards": (lambda out: put(out, "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"),
    "link to a file": (lambda out: (out / "big.bin").symlink_to(out / "config.json"), "big.bin"),
    "link to a folder": (lambda out: (out / "data").symlink_to(out.parent), "data"),
    "card with notes": (edit_card, "README.md"),
    "retrained in place": (retrain, "model.safetensors"),
}


@pytest.fixture(scope="module")
def results(merge_models, tmp_path_factory) -> Path:
    """A result with all files, and one without the model card, tokenizer and safetensors."""
    folder = tmp_path_factory.mktemp("results")
    run_merge(recipe(merge_models), folder / "full")
    run_merge(recipe(merge_models), folder / "bare", write_model_card=False, copy_tokenizer=False)
    return folder


@pytest.mark.parametrize("change, name", USERS_FILES.values(), ids=USERS_FILES)
def test_a_merge_keeps_what_is_not_its_own(merge_models, results, tmp_path, change, name):
    out = tmp_path / "out"
    shutil.copytree(results / "full", out, copy_function=shutil.copy2)
    change(out)
    message = f"{out}: exists and is more than an earlier result of mergekit: {name} would be lost; move it away or"
    refuses(recipe(merge_models), message, tmp_path)


def test_a_broken_link(merge_models, results, tmp_path):
    shutil.copytree(results / "full", tmp_path / "out", copy_function=shutil.copy2)
    (tmp_path / "out" / "gone").symlink_to("nowhere")
    with pytest.raises(MM4KEError, match=": gone would be lost"):
        run_merge(recipe(merge_models), tmp_path / "out")
    assert (tmp_path / "out" / "gone").is_symlink()


def test_one_line_for_many_files(merge_models, results, tmp_path):
    shutil.copytree(results / "full", tmp_path / "out", copy_function=shutil.copy2)
    for index in range(6):
        put(tmp_path / "out", f"note{index}.txt")
    refuses(recipe(merge_models), ".*: note0.txt, note1.txt, note2.txt and 3 more would be lost", tmp_path)


@pytest.mark.parametrize("first", ["full", "bare"])
@pytest.mark.parametrize(
    "options",
    [
        {"write_model_card": False},
        {"write_model_card": False, "copy_tokenizer": False, "out_shard_size": 20_000},
        {"safe_serialization": False},
        {"safe_serialization": False, "out_shard_size": 20_000, "async_write": True},
    ],
)
def test_a_result_is_replaced_whatever_its_options(merge_models, results, tmp_path, first, options):
    """By one with these options, which then is replaced as well."""
    out = tmp_path / "out"
    shutil.copytree(results / first, out, copy_function=shutil.copy2)
    for options_now in (options, options, {}):
        run_merge(recipe(merge_models), out, **options_now)
        assert len(list(out.glob("model*.safetensors*"))) == 0 or options_now.get("safe_serialization", True)
    assert {path.name for path in out.iterdir()} == {path.name for path in (results / "full").iterdir()}


def test_a_result_of_mergekit_alone(merge_models, tmp_path):
    """It has no record of its files, so their names decide."""
    stock = recipe(merge_models, merge_method="linear", parameters={"weight": 0.5}, tokenizer={"source": "base"})
    for options in ({}, {"safe_serialization": False}, {"out_shard_size": 20_000}):
        run_merge(stock, tmp_path / "out", **options)
        assert not (tmp_path / "out" / RECORD).exists()
        put(tmp_path / "out", "model.gguf")
        refuses(recipe(merge_models), f"{tmp_path}/out: .*: model.gguf would be lost", tmp_path)
        (tmp_path / "out" / "model.gguf").unlink()
        run_merge(recipe(merge_models), tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


def test_a_model_is_no_result(merge_models, tmp_path):
    """What a merge without a card writes looks like any model; only the record tells them apart."""
    shutil.copytree(merge_models / "base", tmp_path / "out")
    refuses(recipe(merge_models), f"{tmp_path}/out: exists and is no earlier result of mergekit: ", tmp_path)


def test_what_is_put_there_while_the_merge_runs(merge_models, results, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(results / "full", out, copy_function=shutil.copy2)
    execute = StreamingExecutor._stream
    monkeypatch.setattr(StreamingExecutor, "_stream", lambda *args: (put(out, "late.txt"), execute(*args))[1])
    with pytest.raises(MM4KEError, match="late.txt would be lost"):
        run_merge(recipe(merge_models), out)
    assert (out / "late.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_record(merge_models, results, tmp_path):
    shutil.copytree(results / "full", tmp_path / "out")
    for content in ("{", "[]", '{"files": 1}'):
        (tmp_path / "out" / RECORD).write_text(content)
        refuses(recipe(merge_models), f"{tmp_path}/out/{RECORD}: can't be read", tmp_path)


def test_names_decide_where_there_is_no_record(tmp_path):
    for name in ("ours", "sub/ours", "theirs"):
        put(tmp_path, name)
    assert users_files(tmp_path, {"ours", "sub/ours"}.__contains__) == ["theirs"]
    note_files(tmp_path)
    assert users_files(tmp_path, set().__contains__) == []
    later = (tmp_path / RECORD).stat().st_mtime_ns + 1_000_000_000
    os.utime(tmp_path / "ours", ns=(later, later))
    assert users_files(tmp_path, set().__contains__) == ["ours"]


# ---- deltas ----


def test_a_restored_base_is_no_result(merge_models, results, tmp_path):
    """`revert` takes over neither the recipe nor the model card nor the record of the merge."""
    extract(merge_models / "base", merge_models / "rsft", tmp_path / "d")
    revert(results / "full", tmp_path / "d", tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        path.name for path in (merge_models / "base").iterdir()
    }
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        merge_models / "base" / "model.safetensors"
    ).read_bytes()
    refuses(recipe(merge_models), f"{tmp_path}/again: exists and is no earlier result", tmp_path, out="again")


def test_a_card_that_is_the_bases_own_stays(merge_models, results, tmp_path):
    shutil.copytree(merge_models / "base", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("# About the base\n")
    extract(tmp_path / "base", merge_models / "rsft", tmp_path / "d")
    apply(tmp_path / "base", [tmp_path / "d"], tmp_path / "out")
    revert(tmp_path / "out", tmp_path / "d", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "# About the base\n"


def test_a_merges_card_without_its_recipe(merge_models, results, tmp_path):
    shutil.copytree(results / "full", tmp_path / "full")
    (tmp_path / "full" / "mergekit_config.yml").unlink()
    extract(merge_models / "base", merge_models / "rsft", tmp_path / "d")
    revert(tmp_path / "full", tmp_path / "d", tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()


def test_a_delta_takes_the_place_of_deltas_only(merge_models, tmp_path):
    shutil.copytree(merge_models / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    before = file.read_bytes()
    for place in (file, tmp_path / "base" / "config.json", tmp_path / "base"):
        with pytest.raises(MM4KEError, match=f"^{place}: exists and is no knowledge delta, so it is kept; give anot"):
            extract(tmp_path / "base", merge_models / "rsft", place)
    assert file.read_bytes() == before
    extract(tmp_path / "base", merge_models / "rsft", tmp_path / "d")
    size = (tmp_path / "d").stat().st_size
    extract(tmp_path / "base", merge_models / "rsft", tmp_path / "d", 1, 0.5)
    assert (tmp_path / "d").stat().st_size < size


# ---- prepared data ----


def test_prepared_data_takes_the_place_of_prepared_data_only(tmp_path):
    pytest.importorskip("lm_eval")
    record = {"sentence1": "a", "sentence2": "b", "idx": 0, "label": 0}
    tables = [Table("super_glue", "rte", "validation", [record], Path("rte.jsonl"))]
    prepare.write_benchmarks(tables, tmp_path)
    prepare.write_benchmarks(tables, tmp_path)
    folder = tmp_path / "super_glue"
    put(folder, "raw/RTE.jsonl")
    with pytest.raises(MM4KEError, match=f"^{folder}: holds more than prepared data: raw/RTE.jsonl would be lost"):
        prepare.write_benchmarks(tables, tmp_path)
    (folder / "README.md").write_text("mine")
    with pytest.raises(MM4KEError, match=f"^{folder}: exists and was not prepared by mm4ke; remove it or choose"):
        prepare.write_benchmarks(tables, tmp_path)
    assert (folder / "raw" / "RTE.jsonl").exists() and [path.name for path in tmp_path.iterdir()] == ["super_glue"]
