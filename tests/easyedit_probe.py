"""What a clone of EasyEdit does where `third_party_patches/easyedit` changes it: prints a JSON object.

    python easyedit_probe.py CLONE MODEL DATA FT

MODEL: a folder of a Llama, with "t5" in its path above its own name. FT: settings of the method FT for ./work/base.

Each probe gives what happened, or the exception's type and text.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

clone, model_folder, data, ft_settings = sys.argv[1:]
sys.path[:0] = [clone, f"{clone}/examples"]

with contextlib.redirect_stdout(sys.stderr):
    import easyeditor
    import torch
    from easyeditor.util.generate import generate_fast
    from transformers import AutoModelForCausalLM, AutoTokenizer

    script = importlib.import_module("run_knowedit_llama2")
    alg_dict = importlib.import_module("easyeditor.util.alg_dict")


def rephrase_prompt():
    return easyeditor.KnowEditDataset(data)[0]["rephrase_prompt"]


def summary():
    post = {
        "rewrite_acc": [1.0],
        "rephrase_acc": [0.5],
        "portability": {"Reasoning_acc": [0.25]},
        "locality": {"Forgetfulness_output": [[1, 2]], "Forgetfulness_acc": [0.75]},
        "fluency": {"ngram_entropy": 4.0},
    }
    Path("results.json").write_text(json.dumps([{"post": post}]))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script.eval("results.json")
    return printed.getvalue().split()


def run_script(method, hparams, *more):
    """What the script prints and how it ends, up to the moment when it needs the model."""
    source = Path(clone, "examples", "run_knowedit_llama2.py").read_text()
    sys.argv = ["run_knowedit_llama2.py", "--editing_method", method, "--hparams_dir", hparams, "--data_dir", data]
    sys.argv += ["--datatype", "zsre", *more]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        try:
            exec(compile(source, sys.argv[0], "exec"), {"__name__": "__main__"})  # noqa: S102  (it is the clone's own)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (how it ends is what is asked)
            return printed.getvalue().splitlines(), f"{type(error).__name__}: {error}"


def method_of_the_script():
    return run_script("WISE", "missing")[1]


def unknown_method():
    return run_script("NONE", "missing")[0][-1:]


def sequential_editing():
    return run_script("FT", "missing", "--sequential_edit")[1]


def cache_names():
    """The caches of two models whose folders have the same name."""
    names = []
    for folder in ("first", "second"):
        settings = Path(ft_settings).read_text().replace("./work/base", f"./{folder}/llama")
        Path(f"{folder}.yaml").write_text(settings)
        names += [line for line in run_script("FT", folder)[0] if line.endswith("_pre_edit.json")]
    return names


def loaded_class():
    hparams = easyeditor.FTHyperParams.from_hparams(ft_settings)
    hparams.model_name = model_folder
    with contextlib.redirect_stdout(sys.stderr):
        return type(easyeditor.BaseEditor.from_hparams(hparams).model).__name__


def generated():
    """Whether generate_fast, taking the likeliest token, writes what transformers writes."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    model.name_or_path = "neutral"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    (text,) = generate_fast(model, tokenizer, ["Who rules Oz?"], top_k=1, max_out_len=40)
    ids = tokenizer("Who rules Oz?", return_tensors="pt")
    with torch.no_grad():
        expected = model.generate(**ids, max_length=40, min_length=40, do_sample=False)
    return text == tokenizer.decode(expected[0], skip_special_tokens=True)


def plugins():
    return ["MM4KE" in alg_dict.ALG_DICT, hasattr(easyeditor, "MM4KEHyperParams")]


PROBES = (
    rephrase_prompt, summary, method_of_the_script, unknown_method, sequential_editing, cache_names, loaded_class,
    generated, plugins,
)  # fmt: skip

results = {}
for probe in PROBES:
    try:
        results[probe.__name__] = probe()
    except Exception as error:  # noqa: BLE001  (a probe may end in any way)
        results[probe.__name__] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
