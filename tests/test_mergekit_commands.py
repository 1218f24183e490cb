"""`merge_method: mm4ke` in all of mergekit's commands: recipes are checked before the first merge, dtypes mean one
thing, and mergekit's options have their effect."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import run_command
from mergekit_helpers import edit, expect, ffn, load, recipe, refuses, run_merge, save
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

import mergekit.merge_methods.api  # isort: skip  # after torch, which brings the plugin
from mergekit.scripts import legacy, merge_raw_pytorch, multimerge, run_yaml

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.merging.equations import merge


def run(script, *arguments: str | Path) -> Result:
    return CliRunner().invoke(script.main, list(map(str, arguments)), catch_exceptions=True)


def refused(result: Result) -> str:
    assert isinstance(result.exception, MM4KEError), result.exception
    assert "\n" not in str(result.exception)
    return str(result.exception)


def write(folder: Path, *documents: dict | str) -> Path:
    texts = [text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False) for text in documents]
    (folder / "merge.yaml").write_text("---\n".join(texts))
    return folder / "merge.yaml"


# ---- keys and values, in every command that reads a recipe ----


def commands(folder: Path) -> dict[str, tuple]:
    return {
        "mergekit-yaml": (run_yaml, folder / "merge.yaml", folder / "out"),
        "mergekit-multi": (multimerge, folder / "merge.yaml", "--out-path", folder / "out", "-I", folder / "parts"),
        "mergekit-pytorch": (merge_raw_pytorch, folder / "merge.yaml", folder / "out"),
    }


BAD = {
    "unknown key": ({"out_dtpye": "float32"}, "out_dtpye: unknown key; there are: .*out_dtype"),
    "parameter outside": ({"weight": 0.5}, "weight: 0.5: mergekit would ignore it here; write it under parameters"),
    "misspelt parameter": ({"parameters": {"wieght": 0.5}}, "parameters.wieght: unknown; mm4ke has: weight, density"),
    "out of range": ({"parameters": {"density": [0.2, 20]}}, r"parameters.density\[1\]: 20: Input should be less"),
    "parameters no mapping": ({"parameters": 0.8}, "parameters: 0.8: give names and numbers"),
    "models no list": ({"models": "rsft"}, "models: rsft: give a list"),
    "model no mapping": ({"models": ["rsft"]}, r"models\[0\]: rsft: give keys and values; there are: model, param"),
    "key of a model": ({"models": [{"modle": "x"}]}, r"models\[0\].modle: unknown key; there are: model, parameters"),
    "model missing": ({"models": [{"parameters": {}}]}, "models.0.model: Field required"),
    "dtype": ({"dtype": "bf16"}, "dtype: bf16: give bfloat16, float16 or float32"),
    "no base": ({"base_model": None}, "base_model: missing; give the model before the edit"),
    "method": ({"merge_method": "mm4k"}, "merge_method: mm4k: no such method; write mm4ke"),
    "method in capitals": ({"merge_method": "MM4KE"}, "merge_method: MM4KE: no such method; write mm4ke"),
    "key of the method": (
        {"merge_method": None, "merge_mehtod": "mm4ke"},
        "merge_method: missing; merge_mehtod is not it",
    ),
}


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-multi", "mergekit-pytorch"])
@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_a_bad_recipe(merge_models, tmp_path, command, changes, message):
    write(tmp_path, recipe(merge_models, **changes))
    line = refused(run(*commands(tmp_path)[command]))
    place = "document 1: " if command == "mergekit-multi" else ""
    assert re.match(f"{tmp_path}/merge.yaml: {place}{message}", line), line
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "parts") == ["merge.yaml"]


BROKEN = {
    "indentation": ("merge_method: mm4ke\nmodels:\n- model: a\n   parameters: {}\n", "line 4, column 14: not YAML: "),
    "bracket": ("merge_method: mm4ke\nparameters: {weight: 0.8\n", "line 3, column 1: not YAML: "),
    "tab": ("merge_method: 'mm4ke'\nparameters:\n\tweight: 1\n", "line 3, column 1: not YAML: "),
    "inline": ("{merge_method: mm4ke, models: [}", "line 1, column 32: not YAML: "),
}


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-multi", "mergekit-pytorch"])
@pytest.mark.parametrize("text, message", BROKEN.values(), ids=BROKEN)
def test_broken_yaml(tmp_path, command, text, message):
    write(tmp_path, text)
    assert refused(run(*commands(tmp_path)[command])).startswith(f"{tmp_path}/merge.yaml: {message}")


def test_recipes_of_other_methods_are_mergekits_business(merge_models, tmp_path):
    stock = {"merge_method": "linear", "models": [{"model": str(merge_models / "rsft"), "parameters": {"weight": 1}}]}
    for document in (
        stock | {"merge_method": "liner"},
        "merge_method: linear\nmodels: {",
        stock | {"models": "mm4ke"},
    ):
        write(tmp_path, document)
        for command in commands(tmp_path).values():
            assert not isinstance(run(*command).exception, MM4KEError)
    write(tmp_path, stock | {"misspelt": 1})
    assert run(*commands(tmp_path)["mergekit-yaml"]).exit_code == 0


# ---- several merges ----


def stages(folder: Path, **changes) -> list[dict]:
    """A merge of mergekit's own, one of ours, and one of ours that reads what these two leave."""
    entry = {"model": str(folder / "other"), "parameters": {"weight": 1}}
    first = {"name": "first", "merge_method": "linear", "models": [entry]}
    second = {"name": "second"} | recipe(folder)
    last = recipe(folder, models=[{"model": "first"}, {"model": "second"}]) | changes
    return [first, second, {key: value for key, value in last.items() if value is not None}]


def test_several_merges(merge_models, tmp_path):
    write(tmp_path, *stages(merge_models))
    command = commands(tmp_path)["mergekit-multi"]
    done = run(*command)
    assert done.exit_code == 0, done.exception
    base, parts = load(merge_models / "base"), tmp_path / "parts"
    expected = merge(
        base[ffn()], [load(parts / name)[ffn()] for name in ("first", "second")], [0.8] * 2, [0.8] * 2, names="abc"
    )
    assert torch.equal(load(tmp_path / "out")[ffn()], expected)
    assert run(*command).exit_code == 0, "merges that are there are skipped"
    assert run(*command, "--no-lazy").exit_code == 0


LATE = {
    "unknown key": ({"out_dtpye": "float32"}, r"document 3: out_dtpye: unknown key"),
    "value": ({"parameters": {"weight": 80}}, r"document 3: parameters.weight: 80: Input should be less"),
    "method": ({"merge_method": "lineer"}, "document 3: merge_method: lineer: no such method; mergekit has: "),
    "no such model": ({"base_model": "./nowhere"}, "document 3: base_model: ./nowhere: no such folder"),
    "no such stage": (
        {"models": [{"model": "secnod"}]},
        "document 3: models: secnod: no merge of this name (first, second) and no model: ",
    ),
    "a LoRA": ({"models": [{"model": "LORA"}]}, "document 3: models: LORA: is a LoRA, not a model; write "),
    "misspelt name": ({"name": "second"}, "Duplicate merge name second"),
    "circle": ({"name": "third", "models": [{"model": "third"}]}, "Circular dependency detected involving third"),
}


@pytest.mark.parametrize("changes, message", LATE.values(), ids=LATE)
def test_a_bad_last_document_shows_before_the_first_merge(
    merge_models,
    tmp_path,
    monkeypatch,
    changes,
    message,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LORA").mkdir()
    (tmp_path / "LORA" / "adapter_config.json").write_text("{}")
    write(tmp_path, *stages(merge_models, **changes))
    line = refused(run(*commands(tmp_path)["mergekit-multi"], "--no-write-model-card"))
    assert line.startswith(f"{tmp_path}/merge.yaml: {message}"), line
    assert not list((tmp_path / "parts").glob("*"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "mm4ke\n"])
def test_a_document_that_is_no_recipe(merge_models, tmp_path, text):
    write(tmp_path, recipe(merge_models) | {"name": "a"}, text + "\n")
    assert "document 2: no recipe; give keys" in refused(run(*commands(tmp_path)["mergekit-multi"]))


def test_the_output_is_looked_at_before_the_first_merge(merge_models, tmp_path):
    write(tmp_path, *stages(merge_models))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    line = refused(run(*commands(tmp_path)["mergekit-multi"]))
    assert f"document 3: {tmp_path}/out: exists and is no earlier result of mergekit: notes.txt would be lost" in line
    assert not list((tmp_path / "parts").glob("*"))


def test_several_documents_for_one_merge(merge_models, tmp_path):
    write(tmp_path, *stages(merge_models))
    message = "merge.yaml: 3 documents, separated by ---; give one, or merge them with mergekit-multi"
    assert message in refused(run(*commands(tmp_path)["mergekit-yaml"]))


def test_the_real_commands(merge_models, tmp_path):
    """There torch, and with it the plugin, is imported in the middle of mergekit's import."""
    write(tmp_path, *stages(merge_models, parameters={"weight": 80}))
    done = run_command("mergekit-multi", "merge.yaml", "--out-path", "out", "-I", "parts", cwd=tmp_path)
    line = "mm4ke: error: merge.yaml: document 3: parameters.weight: 80: Input should be less than or equal to 10"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, line)
    assert "Traceback" not in done.stderr and not list((tmp_path / "parts").glob("*"))

    flat(merge_models, tmp_path, dtype="bfloat16", parameters={"wieght": 1})
    done = run_command("mergekit-pytorch", "merge.yaml", "out", cwd=tmp_path)
    line = "mm4ke: error: merge.yaml: parameters.wieght: unknown; mm4ke has: weight, density"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, line)
    flat(merge_models, tmp_path, dtype="bfloat16")
    done = run_command("python", "-m", "mergekit.scripts.merge_raw_pytorch", "merge.yaml", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr  # that module has no main, so nothing is written
    done = run_command("mergekit-pytorch", "merge.yaml", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load(tmp_path / "out")[ffn()], expect(merge_models, ffn()))


# ---- files of tensors ----


def flat(folder: Path, tmp_path: Path, **changes) -> Path:
    entries = [{"model": str(folder / "rsft/model.safetensors")}]
    files = {"base_model": str(folder / "base/model.safetensors"), "models": entries}
    return write(tmp_path, recipe(folder, **files | changes))


@pytest.mark.parametrize("dtypes", [{}, {"dtype": "bfloat16"}, {"out_dtype": "float16"}, {"dtype": "float32"}])
def test_files_are_rounded_once(merge_models, tmp_path, dtypes):
    """R-SFT's float32 numbers would be bfloat16 before their delta is taken."""
    flat(merge_models, tmp_path, **dtypes)
    done = run(merge_raw_pytorch, tmp_path / "merge.yaml", tmp_path / "out")
    assert done.exit_code == 0, done.exception
    dtype = getattr(torch, next(iter(dtypes.values()), "bfloat16"))
    merged = load(tmp_path / "out")
    assert torch.equal(merged[ffn()], expect(merge_models, ffn(), dtype=dtype))
    assert {tensor.dtype for tensor in merged.values()} == {dtype}


def test_files_are_opened_anew_for_each_merge(merge_models, tmp_path):
    for name in ("base", "rsft"):
        shutil.copytree(merge_models / name, tmp_path / name)
    flat(tmp_path, tmp_path)
    run(merge_raw_pytorch, tmp_path / "merge.yaml", tmp_path / "out")
    shutil.rmtree(tmp_path / "rsft")
    edit(tmp_path / "base", tmp_path / "rsft", seed=7)
    run(merge_raw_pytorch, tmp_path / "merge.yaml", tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")[ffn()], expect(tmp_path, ffn()))
    assert not torch.equal(load(tmp_path / "again")[ffn()], load(tmp_path / "out")[ffn()])


def test_other_methods_still_cast_their_files(merge_models, tmp_path):
    flat(merge_models, tmp_path, dtype="bfloat16")
    run(merge_raw_pytorch, tmp_path / "merge.yaml", tmp_path / "ours")
    flat(merge_models, tmp_path, merge_method="task_arithmetic", parameters={"weight": 1.0}, dtype="bfloat16")
    run(merge_raw_pytorch, tmp_path / "merge.yaml", tmp_path / "out")
    base = load(merge_models / "base")[ffn()]
    assert torch.equal(load(tmp_path / "out")[ffn()], base + (load(merge_models / "rsft")[ffn()].bfloat16() - base))


def test_files_of_other_tensors(merge_models, tmp_path):
    shutil.copytree(merge_models / "rsft", tmp_path / "rsft")
    entries = [{"model": str(tmp_path / "rsft/model.safetensors")}]
    tensors = load(merge_models / "rsft")
    tensors.pop(ffn())
    save(tensors, tmp_path / "rsft")
    flat(merge_models, tmp_path, models=entries)
    command = [merge_raw_pytorch, tmp_path / "merge.yaml", tmp_path / "out"]
    message = (
        f"merge.yaml: base_model: {merge_models}/base/model.safetensors: {ffn()} is in no other file; give files that"
    )
    assert message in refused(run(*command))
    assert run(*command, "--tensor-intersection").exit_code == 0
    shutil.rmtree(tmp_path / "out")
    save(load(merge_models / "rsft") | {"another": torch.zeros(1)}, tmp_path / "rsft")
    assert "merge.yaml: Missing tensors; give files that hold the same" in refused(run(*command))
    (tmp_path / "rsft" / "model.safetensors").write_bytes(b"1234567890")
    assert "give files that hold the same tensors" in refused(run(*command))
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(merge_models, tmp_path):
    flat(merge_models, tmp_path, base_model=str(merge_models / "base"))
    message = f"base_model: {merge_models}/base: no such file; give a file of tensors, such as {merge_models}/base/model.safetens"
    assert message in refused(run(merge_raw_pytorch, tmp_path / "merge.yaml", tmp_path / "out"))
    flat(merge_models, tmp_path)
    before = (merge_models / "rsft" / "model.safetensors").stat().st_mtime_ns
    message = "rsft/model.safetensors: is in the folder for the result; give another folder"
    assert message in refused(run(merge_raw_pytorch, tmp_path / "merge.yaml", merge_models / "rsft"))
    assert (merge_models / "rsft" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_state_dicts(merge_models, dtype, out_dtype):
    """`dtype` is that of the result here too."""
    state_dicts = {name: load(merge_models / name) for name in ("base", "rsft")}
    merged = mergekit.merge_methods.api.merge_state_dicts(
        state_dicts, "mm4ke", base="base", parameters={"weight": 0.5}, dtype=dtype, out_dtype=out_dtype
    )
    expected = expect(merge_models, ffn(), weights=[0.5], dtype=out_dtype or dtype)
    assert merged[ffn()].dtype == expected.dtype and torch.equal(merged[ffn()], expected)


# ---- mergekit-legacy ----


def test_legacy(merge_models, tmp_path):
    options = ["--merge", merge_models / "rsft", "--base-model", merge_models / "base", "--method", "mm4ke"]
    done = run(legacy, tmp_path / "out", *options, "--weight", "0.5", "--density", "0.3")
    assert done.exit_code == 0, done.exception
    assert torch.equal(load(tmp_path / "out")[ffn()], expect(merge_models, ffn(), weights=[0.5], densities=[0.3]))
    assert "normalize" not in (tmp_path / "out" / "mergekit_config.yml").read_text()
    assert run(legacy, tmp_path / "out", *options, "--no-normalize", "--bf16").exit_code == 0
    for option in ("--normalize", "--int8-mask", "--naive-count"):
        line = refused(run(legacy, tmp_path / "other", *options, option))
        assert line == f"{option}: not an option of mm4ke, which has: --weight, --density"
    assert ": mm4k: no such method; write mm4ke" in refused(run(legacy, tmp_path / "other", *options[:-1], "mm4k"))
    assert "models[0].parameters.weight: 80.0: Input should be" in refused(
        run(legacy, tmp_path / "other", *options, "--weight", "80")
    )
    assert not (tmp_path / "other").exists()


# ---- options for models that differ ----


@pytest.fixture(scope="module")
def larger(merge_models, tmp_path_factory) -> Path:
    """`rsft` with eight more tokens than `base`, and a base with eight more than that."""
    folder = tmp_path_factory.mktemp("larger")
    shutil.copytree(merge_models / "base", folder / "base")
    shutil.copytree(merge_models / "rsft", folder / "smaller")
    for name in ("base", "rsft"):
        model = AutoModelForCausalLM.from_pretrained(merge_models / name, dtype="auto")
        model.resize_token_embeddings(272)
        shutil.copytree(merge_models / name, folder / f"large-{name}")
        model.save_pretrained(folder / f"large-{name}")
    return folder


@pytest.mark.parametrize("base, edited", [("base", "large-rsft"), ("large-base", "smaller")])
def test_truncated_embeddings(larger, tmp_path, base, edited):
    content = recipe(larger, (edited,), base_model=str(larger / base))
    refuses(content, "merge recipe: models: .*: vocab_size is 2", tmp_path)
    merged = run_merge(content, tmp_path / "out", unsafe_truncate_embeddings=True)
    assert merged["model.embed_tokens.weight"].shape[0] == 264
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 264 and model.get_input_embeddings().weight.shape[0] == 264


def test_the_message_names_what_helps(larger, tmp_path):
    content = recipe(larger, ("large-rsft",))
    remedy = "add `tokenizer: {source: base}` to the recipe, which takes the base's vocabulary"
    refuses(content, f"merge recipe: models: .*: vocab_size is 272.*{remedy}", tmp_path)
    merged = run_merge(content | {"tokenizer": {"source": "base"}}, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(merged[ffn()], expect(larger, ffn(), ("large-rsft",)))


def test_other_architectures(tmp_path):
    """Mistral's tensors are Llama's."""
    make_tiny_model(tmp_path / "base", "llama")
    make_tiny_model(tmp_path / "rsft", "mistral")
    save(load(edit(tmp_path / "base", tmp_path / "edited")), tmp_path / "rsft")
    content = recipe(tmp_path)
    refuses(content, "merge recipe: models: .*: architectures is .*; merge only like models, or try --allow", tmp_path)
    merged = run_merge(content, tmp_path / "out", allow_crimes=True)
    assert torch.equal(merged[ffn()], expect(tmp_path, ffn()))


def test_a_lora_without_a_cache(merge_models, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    entries = [{"model": f"{merge_models}/base+{tmp_path}/lora"}]
    message = "merge recipe: models: .*: the LoRA has to be merged into its model first; give --lora-merge-cache FOLD"
    refuses(recipe(merge_models, models=entries), message, tmp_path)
    entries = [{"model": f"{tmp_path}/lora"}]
    message = (
        rf"merge recipe: models: {tmp_path}/lora: is a LoRA, not a model; write {merge_models}/base\+{tmp_path}/lora "
    )
    refuses(recipe(merge_models, models=entries), message, tmp_path)
