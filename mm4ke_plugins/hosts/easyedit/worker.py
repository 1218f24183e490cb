"""One method of EasyEdit on one model, in a process of its own: `python -m mm4ke_plugins.hosts.easyedit.worker JOB PIPE`.

`benchmark.py` starts it with EasyEdit on PYTHONPATH. JOB is a JSON file with the fields of `Job`; PIPE is the
number of a file descriptor, on which the worker writes a line with what it does, a tab and how many it has done.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import MM4KEError, report_in_one_line
from ...knowedit.dataset import read_facts
from ...knowedit.metrics import predict, questions_of
from ...knowedit.prompts import encode
from ...knowedit.records import Record, read_records
from ...knowedit.scorer import Scorer
from ...storage.atomic import replace_text
from ...storage.models import load_model, load_tokenizer

# Methods that need the prompts' padding on the right; editors/editor.py gives all others a padding on the left.
RIGHT_PADDED = ("ROME", "MEMIT", "EMMET", "EAMET", "R-ROME", "AlphaEdit", "CORE", "SPHERE")


@dataclasses.dataclass(frozen=True)
class Job:
    """method: as EasyEdit's folders of hparams call it. hparams, model, data, text, output: paths. records: how many.

    scratch: the folder to run in, since EasyEdit leaves logs and caches in the working directory
    text:    what covariance statistics are made from; None leaves the methods that need them to EasyEdit
    limit:   of how many records of the data the `records` are what `read_facts` keeps; None: of all
    score:   ask all that `knowedit.scorer` asks, in place of the questions in `prompt_format` alone
    """

    method: str
    hparams: str
    model: str
    data: str
    records: int
    prompt_format: str
    text: str | None
    scratch: str
    output: str
    limit: int | None = None
    score: bool = False


def run(job: Job, report: Callable[[str, int], None]) -> dict[str, Any]:
    """Edit the records into the model with one method and ask the final model all questions.

    Returns, ready for JSON:
        hparams    EasyEdit's, as they were used
        editing    "batch" or "sequential"
        seconds    spent in the method itself
        predicted  the tokens of every question's answer, as from `metrics.predict`; with `score` none
        scores     with `score`: as from `Scorer.score`
        peak       of this process's memory, in bytes
    """
    records = read_facts(Path(job.data), job.limit)
    others = [] if job.limit is None else [r for r in read_records(Path(job.data)) if r.index >= job.limit]
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    report("importing EasyEdit", 0)
    hparams = read_hparams(job)
    hparams.device = device
    os.chdir(job.scratch)
    if job.text and hasattr(hparams, "mom2_dataset"):
        hparams.mom2_dataset = offer_text(Path(job.text))

    report("loading", 0)
    model = load_model(Path(job.model), torch.float32, device)
    tokenizer = load_tokenizer(Path(job.model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right" if hparams.alg_name in RIGHT_PADDED else "left"
    asked = 0

    def advance(count: int) -> None:
        nonlocal asked
        asked += count
        report("asking", asked)

    scorer = Scorer(model, tokenizer, records) if job.score else None
    editor = make_editor(model, tokenizer, hparams)

    seconds = 0.0
    edited = 0

    def timed(model, tok, requests, *args, **kwargs):
        nonlocal seconds, edited
        begin = time.perf_counter()
        try:
            return apply(model, tok, requests, *args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds += time.perf_counter() - begin
            edited += len(requests)
            report("editing", edited)

    apply, editor.apply_algo = editor.apply_algo, timed
    report("editing", 0)
    final, editing = edit(editor, records, others)

    report("asking", 0)
    final.eval()
    batch_size = 16
    if not (isinstance(final, PreTrainedModel) or hasattr(final, "peft_config")):
        # Methods that decide by the whole input whether it concerns an edit wrap the model; one question at a time.
        final.device, final.generation_config = model.device, model.generation_config
        batch_size = 1
    predicted, scores = [], None
    if scorer:
        scores = scorer.score(final, batch_size=batch_size, advance=advance)
    else:
        codes = [encode(tokenizer, question, job.prompt_format) for question in questions_of(records)]
        predicted = predict(final, codes, batch_size=batch_size, advance=advance)
    settings = dataclasses.asdict(hparams) if dataclasses.is_dataclass(hparams) else vars(hparams)
    return {
        "hparams": settings,
        "editing": editing,
        "seconds": seconds,
        "predicted": predicted,
        "scores": scores,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def read_hparams(job: Job) -> Any:
    """The hparams file, read by EasyEdit's class for its alg_name."""
    alg_dict = import_module("easyeditor.util.alg_dict")
    hyper_params = import_module("easyeditor.util.hparams")
    alg_name = hyper_params.load_hparams_config(job.hparams).get("alg_name")
    if alg_name not in alg_dict.ALG_DICT:
        raise MM4KEError(f"{job.hparams}: alg_name: {alg_name}: EasyEdit has: {', '.join(alg_dict.ALG_DICT)}")

    def plain(name: str) -> str:
        return name.lower().replace("_", "").replace("-", "")

    # ROMEHyperParams, R_ROMEHyperParams, SERACHparams, MEMITFEHyperParams for MEMIT-FE ...
    wanted = (f"{plain(alg_name)}hyperparams", f"{plain(alg_name)}hparams")
    found = [value for name, value in vars(alg_dict).items() if plain(name) in wanted]
    if not found:
        raise MM4KEError(f"{job.hparams}: alg_name: {alg_name}: EasyEdit has no class of settings for it")
    hparams = found[0].from_hparams(job.hparams)
    if alg_name == "MM4KE":
        hparams.prompt_format = job.prompt_format
        hparams.batch_size = job.records
    elif getattr(hparams, "batch_size", 1) > job.records:
        hparams.batch_size = job.records
    return hparams


def make_editor(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hparams: Any) -> Any:
    """A BaseEditor of a model that is loaded already.

    EasyEdit chooses classes by looking for names such as "llama" and "t5" in the model's whole path. Given model and
    tokenizer it doesn't, and what it later looks up by name finds the model's real architecture.
    """
    name = model.config.model_type
    hparams.model_name = (model, tokenizer)
    editor = import_module("easyeditor").BaseEditor.from_hparams(hparams)
    editor.model_name = hparams.model_name = model.name_or_path = name
    return editor


def edit(editor: Any, records: list[Record], others: list[Record]) -> tuple[torch.nn.Module, str]:
    """Edit all records, keeping every edit. Returns the final model, and "batch" or "sequential".

    others: records that are not edited. WISE trains on their locality probes not to touch what is unrelated.
    """
    requests = {
        "prompts": [record.prompt for record in records],
        "target_new": [record.target_new for record in records],
        "ground_truth": [record.ground_truth[0] if record.ground_truth else None for record in records],
    }
    if all(record.subject and record.subject in record.prompt for record in records):
        requests["subject"] = [record.subject for record in records]
    probes = [probe for record in others for axis in record.locality.values() for probe in axis]
    if probes:
        requests["loc_prompts"] = [f"{probe.prompt} {probe.answers[0]}" for probe in probes[: len(records)]]
    in_batches = getattr(editor.hparams, "batch_size", 1) > 1
    run_edit = editor.batch_edit if in_batches else editor.edit
    _, final, _ = run_edit(**requests, sequential_edit=True, verbose=False)
    return final, "batch" if in_batches else "sequential"


def offer_text(text: Path) -> str:
    """Make `text` the data set that EasyEdit takes covariance statistics from, and return what it calls this.

    The datasets library prefers a folder of the working directory to a data set of the hub with the same name.
    """
    folder = Path("Salesforce", "wikitext")
    folder.mkdir(parents=True)
    (folder / "text.txt").write_bytes(text.read_bytes())
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-103-raw-v1\n  data_files:\n  - split: train\n    path: text.txt\n---\n"
    )
    return "wikitext"


@contextmanager
def progress_pipe(descriptor: int) -> Iterator[Callable[[str, int], None]]:
    """A function that writes to the pipe what the worker does, and how many it has done."""
    with os.fdopen(descriptor, "w", buffering=1) as pipe:
        yield lambda stage, done: print(f"{stage}\t{done}", file=pipe)


def main() -> None:
    report_in_one_line()
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with progress_pipe(int(sys.argv[2])) as report:
        result = run(job, report)
    replace_text(Path(job.output), json.dumps(result, default=str))


if __name__ == "__main__":
    main()
