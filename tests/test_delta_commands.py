"""`mm4ke delta` on model folders: round trips bit for bit, beside the real mergekit, and what is refused."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command
from mergekit_helpers import LAYER, edit, expect, ffn, load, recipe, run_merge
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from mm4ke_plugins.delta.folders import apply, extract, new_folder, revert
from mm4ke_plugins.delta.format import load_delta
from mm4ke_plugins.delta.live import apply_delta
from mm4ke_plugins.delta.show import compare_deltas, diff, show
from mm4ke_plugins.errors import MM4KEError

TRAINED = [f"model.layers.{LAYER}.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A bfloat16 `base` with tied embeddings, two float32 edits of it, and their deltas: unfinished and finished."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    for seed, name in enumerate(("rsft", "other"), start=1):
        edit(folder / "base", folder / name, seed=seed)
        extract(folder / "base", folder / name, folder / f"{name}.delta")
        extract(folder / "base", folder / name, folder / f"{name}-finished.delta", 0.8, 0.8)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, models) -> Path:
    """The same base in several files; only one of them has tensors of the edited layer's FFN."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    shutil.copy(models / "base" / "tokenizer.json", folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    return names == sorted(path.name for path in second.iterdir()) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


def test_the_commands_make_a_round_trip_of_what_mergekit_makes(models, tmp_path):
    base, rsft, delta = models / "base", models / "rsft", tmp_path / "facts.delta.safetensors"
    (tmp_path / "rsft.yaml").write_text("learning_rate: 5e-4\nrsft_layers: [5]\n")
    run = run_command("mm4ke", "delta", "extract", base, rsft, "-o", delta, "--recipe", tmp_path / "rsft.yaml")
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{delta}: 3 tensors, 6,144 entries, {delta.stat().st_size / 1e6:.2f} MB\n"
    run = run_command(
        "mm4ke", "delta", "apply", base, delta, "-o", tmp_path / "out", "--weight", "0.7", "--density", "0.4"
    )
    assert run.returncode == 0, run.stderr
    parameters = {"weight": 0.7, "density": 0.4}
    content = recipe(models, models=[{"model": str(rsft), "parameters": parameters}])
    merged = run_merge(content, tmp_path / "mergekit")
    applied = load(tmp_path / "out")
    assert applied.keys() == merged.keys()
    assert all(
        applied[name].dtype == merged[name].dtype and torch.equal(applied[name], merged[name]) for name in merged
    )
    run = run_command("mm4ke", "delta", "revert", tmp_path / "out", delta, "-o", tmp_path / "back")
    assert run.returncode == 0, run.stderr
    assert same_files(tmp_path / "back", base)

    run = run_command("mm4ke", "delta", "show", delta)
    assert run.returncode == 0, run.stderr
    for text in (
        "LlamaForCausalLM",
        "unfinished",
        "learning_rate: 5e-4",
        "float32 on bfloat16",
        "2,048",
        "100.0%",
        "█",
    ):
        assert text in run.stdout
    run = run_command("mm4ke", "delta", "diff", delta, models / "other.delta")
    assert run.returncode == 0, run.stderr
    assert (
        "conflicts" in run.stdout and f"model.layers.{LAYER}.mlp.*.weight" in run.stdout and "down_proj" in run.stdout
    )

    run = run_command("mm4ke", "delta", "apply", models / "rsft", delta, "-o", tmp_path / "wrong")
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith(
        f"mm4ke: error: {models / 'rsft'}: {TRAINED[0]} is float32, {delta} was"
    )
    assert not (tmp_path / "wrong").exists()


def test_the_result_is_the_base_with_three_other_tensors(models, tmp_path):
    apply(models / "base", [models / "rsft.delta"], tmp_path / "out")
    applied, base = load(tmp_path / "out"), load(models / "base")
    for name, tensor in applied.items():
        assert torch.equal(tensor, expect(models, name) if name in TRAINED else base[name])
    others = {path.name for path in (models / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == others
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["rsft.delta", "rsft-finished.delta"])
@pytest.mark.parametrize("link", [False, True])
def test_files_of_which_nothing_changes_are_copied_or_linked(models, sharded, tmp_path, name, link):
    apply(sharded, [models / name], tmp_path / "out", link=link)
    for file in sharded.glob("*.safetensors"):
        changed = bool(load_file(file).keys() & set(TRAINED))
        target = tmp_path / "out" / file.name
        assert (file.read_bytes() == target.read_bytes()) is not changed
        assert target.samefile(file) is (link and not changed)
    apply(models / "base", [models / name], tmp_path / "whole")
    parts, whole = load(tmp_path / "out"), load(tmp_path / "whole")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[key], whole[key]) for key in whole)
    revert(tmp_path / "out", models / name, tmp_path / "back", link=link)
    assert same_files(tmp_path / "back", sharded)


def test_several_deltas_add_up_as_in_mergekit(models, tmp_path):
    apply(models / "base", [models / "rsft.delta", models / "other.delta"], tmp_path / "out", [0.8, 0.5], [0.3])
    applied = load(tmp_path / "out")
    for name in TRAINED:
        assert torch.equal(applied[name], expect(models, name, ("rsft", "other"), (0.8, 0.5), (0.3, 0.3)))
    with pytest.raises(MM4KEError, match="--weight: given 3 times for 2 deltas; give it once, or for each"):
        apply(models / "base", [models / "rsft.delta"] * 2, tmp_path / "x", [1, 1, 1])


def test_a_live_model_has_the_same_numbers(models, tmp_path):
    apply(models / "base", [models / "rsft.delta"], tmp_path / "out", [0.6], [0.5])
    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.bfloat16)
    with apply_delta(model, models / "rsft.delta", 0.6, 0.5):
        for name, tensor in load(tmp_path / "out").items():
            assert torch.equal(model.get_parameter(name), tensor)


def test_a_merged_model_taken_as_it_is(models, tmp_path):
    apply(models / "base", [models / "rsft.delta"], tmp_path / "out")
    extract(models / "base", tmp_path / "out", tmp_path / "d", 1, 1)
    apply(models / "base", [tmp_path / "d"], tmp_path / "again")
    assert same_files(tmp_path / "again", tmp_path / "out")
    finished, found = load_delta(models / "rsft-finished.delta"), load_delta(tmp_path / "d")
    assert all(torch.equal(found.arrays[name], array) for name, array in finished.arrays.items())
    assert (tmp_path / "d").stat().st_size < (models / "rsft.delta").stat().st_size / 2


def test_the_model_of_the_training_is_reverted_too(models, tmp_path):
    revert(models / "rsft", models / "rsft.delta", tmp_path / "back")
    restored, base = load(tmp_path / "back"), load(models / "base")
    assert all(torch.equal(restored[name], base[name]) and restored[name].dtype == base[name].dtype for name in base)


def test_other_weights_in_the_base_folder_are_not_the_new_model(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "base")
    for name in ("pytorch_model.bin", "model-q4.gguf", "old.safetensors"):
        (tmp_path / "base" / name).write_bytes(b"x")
    (tmp_path / "base" / "checkpoint-5").mkdir()
    apply(tmp_path / "base", [models / "rsft.delta"], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (models / "base").iterdir()}


# ---- show and diff ----


def test_diff(models, tmp_path):
    row = compare_deltas(models / "rsft.delta", models / "rsft.delta")[TRAINED[0]]
    assert row["kept_both"] == row["kept_first"] == 2048 and row["sign_conflicts"] == 0
    assert row["cosine"] == pytest.approx(1)

    base, first, second = (load(models / name) for name in ("base", "rsft", "other"))
    rows = compare_deltas(models / "rsft.delta", models / "other.delta")
    exact = compare_deltas(models / "rsft.delta", models / "other.delta", models / "base")
    for name in TRAINED:
        deltas = [model[name] - base[name].float() for model in (first, second)]
        conflicts = int((deltas[0].sign() * deltas[1].sign() < 0).sum())
        cosine = float(torch.nn.functional.cosine_similarity(deltas[0].flatten(), deltas[1].flatten(), dim=0))
        for row in (rows[name], exact[name]):
            assert row["sign_conflicts"] == conflicts > 500
            assert row["cosine"] == pytest.approx(cosine, abs=1e-5)


def test_diff_of_finished_deltas(models, tmp_path):
    """They overlap in part; their signs are known without the base, their magnitudes are not."""
    paths = [tmp_path / "1", tmp_path / "2"]
    for name, path in zip(("rsft", "other"), paths):
        extract(models / "base", models / name, path, 1.0, 0.3)
    base, rows = load(models / "base"), compare_deltas(*paths)
    exact = compare_deltas(*paths, models / "base")
    for name in TRAINED:
        deltas = [load_delta(path).edited(name, base[name]).float() - base[name].float() for path in paths]
        assert rows[name]["kept_both"] == int(((deltas[0] != 0) & (deltas[1] != 0)).sum()) > 50
        assert rows[name]["sign_conflicts"] == int((deltas[0] * deltas[1] < 0).sum()) > 10
        assert rows[name]["cosine"] is None
        cosine = float(torch.nn.functional.cosine_similarity(deltas[0].flatten(), deltas[1].flatten(), dim=0))
        assert exact[name] == rows[name] | {"cosine": pytest.approx(cosine, abs=1e-5)}


# ---- what is refused ----


def expect_error(function, *arguments, match: str, out: Path | None = None) -> None:
    before = sorted(out.parent.iterdir()) if out else None
    with pytest.raises(MM4KEError, match=match) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    assert out is None or sorted(out.parent.iterdir()) == before


def changed_copy(folder: Path, target: Path, change) -> Path:
    shutil.copytree(folder, target)
    tensors = load(target)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_bases_that_the_delta_is_not_of(models, tmp_path):
    delta, out = models / "rsft.delta", tmp_path / "out"
    up = TRAINED[2]

    def other_number(tensors):
        tensors[up][3, 4] += 1

    other = changed_copy(models / "base", tmp_path / "other", other_number)
    expect_error(apply, other, [delta], out, match=f"^{other}: {up} holds other numbers than the base that", out=out)
    short = changed_copy(models / "base", tmp_path / "short", lambda tensors: tensors.pop(up))
    expect_error(apply, short, [delta], out, match=f"^{short}: {up} is missing; give the base", out=out)
    wide = changed_copy(models / "base", tmp_path / "wide", lambda tensors: tensors.update({up: torch.ones(80, 32)}))
    expect_error(apply, wide, [delta], out, match=f"^{wide}: {up} is 80x32, in {delta} 64x32", out=out)
    qwen = make_tiny_model(tmp_path / "qwen", "qwen2", dtype=torch.bfloat16)
    expect_error(apply, qwen, [delta], out, match=f"^{delta}: is for LlamaForCausalLM, {qwen} is a Qwen2For", out=out)
    expect_error(apply, tmp_path / "none", [delta], out, match="^.*/none/config.json: ", out=out)
    expect_error(apply, models / "base", [delta], models / "rsft", match=f"^{models / 'rsft'}: exists; remove it")


def test_deltas_of_conflicting_bases(models, tmp_path):
    def shift(tensors):
        for name in TRAINED:
            tensors[name] += 1

    base = changed_copy(models / "base", tmp_path / "base", shift)
    extract(base, models / "rsft", tmp_path / "d")
    message = f"^{tmp_path}/d: {TRAINED[0]}: was taken from another base than that of {models}/rsft.delta"
    expect_error(apply, models / "base", [models / "rsft.delta", tmp_path / "d"], tmp_path / "out", match=message)


def test_models_that_can_not_be_reverted(models, tmp_path):
    out, delta = tmp_path / "back", models / "rsft-finished.delta"
    message = f"^{models / 'base'}: {TRAINED[0]}: without {delta} it is not the base's; give the model to which"
    expect_error(revert, models / "base", delta, out, match=message, out=out)
    apply(models / "base", [models / "rsft.delta", models / "other.delta"], tmp_path / "both")
    expect_error(revert, tmp_path / "both", delta, out, match="without .* it is not the base's", out=out)


def test_edited_models_that_are_not_of_the_base(models, tmp_path):
    base, out = models / "base", tmp_path / "d"
    expect_error(extract, base, base, out, match=f"^{base}: equals {base}, so there is no delta", out=out)
    qwen = make_tiny_model(tmp_path / "qwen", "qwen2")
    expect_error(extract, base, qwen, out, match=f"^{qwen}: is a Qwen2ForCausalLM, {base} a LlamaFor", out=out)
    more = changed_copy(models / "rsft", tmp_path / "more", lambda tensors: tensors.update(extra=torch.ones(2)))
    expect_error(extract, base, more, out, match=f"^{more}: extra: not in {base}", out=out)
    untied = make_tiny_model(tmp_path / "untied")
    short = changed_copy(untied, tmp_path / "short", lambda tensors: tensors.pop("lm_head.weight"))
    expect_error(extract, untied, short, out, match=f"^{short}: lm_head.weight is missing", out=out)
    (tmp_path / "r.yaml").write_text("[1, 2]")
    message = f"^{tmp_path}/r.yaml: no settings in it; give the YAML recipe"
    expect_error(extract, base, models / "rsft", out, None, None, tmp_path / "r.yaml", match=message, out=out)
    expect_error(extract, base, models / "rsft", out, 0.8, 20, match="^density: 20.*: give a share", out=out)


def test_a_damaged_model_or_delta(models, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(models / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    expect_error(apply, tmp_path / "base", [models / "rsft.delta"], out, match=f"^{file}: not a readable", out=out)
    shutil.copy(models / "rsft.delta", tmp_path / "d")
    os.truncate(tmp_path / "d", 1000)
    for function, arguments in ((show, (tmp_path / "d", None)), (diff, (tmp_path / "d", tmp_path / "d", None, None))):
        expect_error(function, *arguments, match=f"^{tmp_path}/d: not a readable safetensors file")
    expect_error(apply, models / "base", [tmp_path / "d"], out, match=f"^{tmp_path}/d: not a readable", out=out)


@pytest.mark.parametrize("command", ["apply", "extract"])
def test_a_full_disk(models, tmp_path, command):
    """As a limit on the size of files, which fails in the middle of a write as a full disk does."""
    code = "from mm4ke_plugins.cli import main; main()"
    source = models / ("rsft.delta" if command == "apply" else "rsft")
    arguments = ["delta", command, models / "base", source, "-o", tmp_path / "out"]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(
        f"mm4ke: error: {tmp_path / 'out'}: can't be written: File too large"
    )
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_an_edited_model_may_store_the_tied_head_twice(models, tmp_path):
    """And a base may lack it: what is stored once counts."""
    tensors = load(models / "rsft")
    assert "lm_head.weight" not in tensors
    both = changed_copy(
        models / "base",
        tmp_path / "both",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    extract(both, models / "rsft", tmp_path / "d")
    assert sorted(load_delta(tmp_path / "d").manifest.tensors) == TRAINED
    assert json.loads((both / "config.json").read_text())["tie_word_embeddings"] is True
    assert ffn() in TRAINED


def test_extract_replaces_nothing_but_a_delta(models, tmp_path):
    expect_error(extract, models / "base", models / "rsft", tmp_path, match=f"^{tmp_path}: exists and is no knowledge")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(models / "rsft" / name, tmp_path)
        before = (tmp_path / name).read_bytes()
        message = f"^{tmp_path / name}: exists and is no knowledge delta, so it is kept; give another name"
        expect_error(extract, models / "base", models / "rsft", tmp_path / name, match=message, out=tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    shutil.copy(models / "other.delta", tmp_path / "d")
    extract(models / "base", models / "rsft", tmp_path / "d")
    assert load_delta(tmp_path / "d").manifest.tensors == load_delta(models / "rsft.delta").manifest.tensors


def test_two_runs_that_make_one_folder(models, tmp_path):
    """The second to finish is refused; nothing is replaced, and nothing is mixed."""
    out = tmp_path / "out"
    with pytest.raises(MM4KEError, match=f"^{out}: exists; remove it or give another folder"), new_folder(out) as slow:
        (slow / "model.safetensors").touch()
        apply(models / "base", [models / "rsft.delta"], out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert out.joinpath("model.safetensors").stat().st_size
