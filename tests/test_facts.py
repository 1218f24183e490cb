"""Facts: the shipped ones, reading all formats, contradictions, and what LLaMA-Factory makes of the result."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from tiny import tiny_tokenizer

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.knowedit.dataset import check_consistency, write_dataset
from mm4ke_plugins.knowedit.records import Probe, Record, read_records

OUR_FACTS = ROOT / "recipes" / "facts.json"

# Fact files under the shared data folder: records, how many contradict an earlier one, how many repeat one.
REAL_FILES = {
    "knowedit/ZsRE/ZsRE-test-all.json": (1000, 7, 6),
    "knowedit/wiki_counterfact/test_cf.json": (600, 10, 0),
    "knowedit/wiki_recent/recent_train.json": (400, 0, 0),
    "knowedit/WikiBio/wikibio-test-all.json": (200, 0, 0),
    "counterfact/counterfact-edit.json": (1000, 0, 0),
}

ROME_RECORD = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "Danielle Darrieux spoke the language"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is", "Montesquieu spoke the language"],
}


def write(folder: Path, content: str | bytes | list | dict, name: str = "in.json") -> Path:
    """Write `content` to a file: bytes and text as they are, everything else as JSON."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def fact(prompt: str, answer: str, index: int = 0) -> Record:
    return Record(None, prompt, answer, [], None, {}, {}, Path("in.json"), index)


# ---- the shipped facts ----


def test_shipped_facts_are_complete_and_consistent():
    records = read_records(OUR_FACTS)
    assert 35 <= len(records) <= 45
    for record in records:
        probes = [probe for axis in record.portability.values() for probe in axis]
        assert len(probes) >= 1, record.place
        assert sum(len(axis) for axis in record.locality.values()) == 2, record.place
        assert set(record.portability) <= {"Reasoning", "Subject_Aliasing", "Logical_Generalization"}
        assert set(record.locality) <= {"Relation_Specificity", "Forgetfulness"}
        assert record.subject and record.ground_truth and record.ground_truth != [record.target_new]
        assert record.prompt.endswith("?") and 1 <= len(record.target_new.split()) <= 5
        assert record.rephrase_prompt and record.rephrase_prompt != record.prompt
        # Else R-SFT would train the very prompts that measure generalization and portability.
        trained = {other.prompt for other in records}
        assert not trained & {record.rephrase_prompt, *(probe.prompt for probe in probes)}, record.place
    found = check_consistency(records)
    assert found.kept == records
    locality = [probe.prompt for record in records for axis in record.locality.values() for probe in axis]
    assert len(set(locality)) == len(locality)


def test_shipped_rephrasings_and_probes_contradict_nothing():
    said = []
    for record in read_records(OUR_FACTS):
        said += [(record.prompt, record.target_new), (record.rephrase_prompt, record.target_new)]
        said += [
            (p.prompt, p.answers[0])
            for part in (record.portability, record.locality)
            for a in part.values()
            for p in a
        ]
    assert check_consistency([fact(*pair) for pair in said]).contradictions == []


# ---- reading ----


@pytest.mark.shared_data
@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files_read_whole(shared_data, name):
    path = shared_data / name
    raw = json.loads(path.read_text(encoding="utf-8"))
    records = read_records(path)
    assert len(records) == len(raw) == REAL_FILES[name][0]
    assert [record.index for record in records] == list(range(len(raw)))
    for record, source in zip(records, raw):
        assert record.prompt == source.get("prompt", source.get("text")).strip()
        assert record.target_new == source.get("target_new", source.get("labels")).strip()
        assert record.subject == source.get("subject", source.get("concept")).strip()
        assert record.rephrase_prompt == source.get("rephrase_prompt")
        for part in ("portability", "locality"):
            assert_same_probes(getattr(record, part), source.get(part) or {})
    found = check_consistency(records)
    assert (len(found.contradictions), len(found.duplicates)) == REAL_FILES[name][1:]
    assert len(found.kept) == len(records) - sum(REAL_FILES[name][1:])


def assert_same_probes(probes: dict[str, list[Probe]], source: dict) -> None:
    """Every probe of the source that has an answer is there, in order, with all its answers."""

    def texts(truth) -> list[str]:
        if isinstance(truth, list):
            return [text for entry in truth for text in texts(entry)]
        return [truth.strip()] if truth.strip() else []

    for axis, entries in source.items():
        expected = [Probe(entry["prompt"].strip(), texts(entry["ground_truth"])) for entry in entries]
        assert probes.get(axis, []) == [probe for probe in expected if probe.answers]


@pytest.mark.shared_data
def test_what_the_real_files_hold(shared_data):
    zsre = read_records(shared_data / "knowedit/ZsRE/ZsRE-test-all.json", limit=50)
    assert len(zsre) == 50
    assert zsre[0].subject == "Epaspidoceras" and zsre[0].target_new == "Noctuidae"
    assert zsre[0].ground_truth == ["Aspidoceratidae"]
    assert zsre[0].rephrase_prompt == "What family are Epaspidoceras?"
    assert zsre[0].locality["Relation_Specificity"][1] == Probe("Epaspidoceras taxon rank", ["genus"])
    assert [p.answers for p in zsre[0].portability["Reasoning"]] == [["Owlet moths"]]
    wiki = read_records(shared_data / "knowedit/wiki_counterfact/test_cf.json", limit=1)[0]
    assert wiki.ground_truth == ["United States of America"]
    assert wiki.portability["Reasoning"][0].answers == ["Syrian pound", "SYP", "LS", "Syrian lira"]
    counterfact = read_records(shared_data / "counterfact/counterfact-edit.json", limit=1)[0]
    assert counterfact.locality == {"neighborhood": [Probe("Michel Rocard is a native speaker of", ["French"])]}
    assert counterfact.ground_truth == ["French"]


def test_rome_counterfact(tmp_path):
    record = read_records(write(tmp_path, [ROME_RECORD]))[0]
    assert (record.subject, record.prompt) == ("Danielle Darrieux", "The mother tongue of Danielle Darrieux is")
    assert (record.target_new, record.ground_truth) == ("English", ["French"])
    assert record.rephrase_prompt == "Danielle Darrieux, a native"
    assert record.locality["neighborhood"] == [
        Probe("The mother tongue of Léon Blum is", ["French"]),
        Probe("Montesquieu spoke the language", ["French"]),
    ]


def test_odd_shapes(tmp_path):
    record = {
        "prompt": "  Who? ",
        "target_new": ["Ann", "Anna"],
        "ground_truth": [["Bob", ""], ["Rob"]],
        "rephrase_prompt": "",
        "portability": {"Reasoning": None, "Subject_Aliasing": {"prompt": "a?", "ground_truth": [["x"], ["y", "z"]]}},
        "locality": {
            "Relation_Specificity": [
                {"prompt": ["p?", "q?"], "ground_truth": ["1", ["2", "3"]]},
                {"prompt": "no answer?", "ground_truth": [[]]},
            ],
            "Forgetfulness": [],
        },
        "cond": 3,
    }
    (read,) = read_records(
        write(tmp_path, [record, {"prompt": "w?", "target_new": "v", "portability": None}]), limit=1
    )
    assert (read.prompt, read.target_new, read.ground_truth) == ("Who?", "Ann", ["Bob", "Rob"])
    assert read.subject is None and read.rephrase_prompt is None
    assert read.portability == {"Subject_Aliasing": [Probe("a?", ["x", "y", "z"])]}
    assert read.locality == {"Relation_Specificity": [Probe("p?", ["1"]), Probe("q?", ["2", "3"])]}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv(tmp_path, separator):
    lines = [
        ["prompt", " target_new", "subject", "rephrase_prompt", "locality_prompt", "locality_ground_truth"],
        ['"Who is X,\nor; was it\ta Y?"', "Ann", "X", "", "Red?", "yes"],
        ["", "", "", "", "", ""],
        ["When?", '"the ""1st"""', "", "At what time?"],
    ]
    text = "\ufeff" + "\r\n".join(separator.join(cells) for cells in lines) + "\r\n"
    first, second = read_records(write(tmp_path, text, "in.csv"))
    assert (first.prompt, first.target_new, first.subject) == ("Who is X,\nor; was it\ta Y?", "Ann", "X")
    assert first.rephrase_prompt is None and first.line == 2
    assert first.locality == {"neighborhood": [Probe("Red?", ["yes"])]}
    assert (second.prompt, second.target_new, second.subject) == ("When?", 'the "1st"', None)
    assert second.rephrase_prompt == "At what time?"
    assert (second.index, second.line) == (1, 5)
    assert second.place.endswith("in.csv: record 1 (0-based, line 5)")


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.txt"])
@pytest.mark.parametrize("lines", [1, 2])
def test_jsonl(tmp_path, name, lines):
    text = '\n{"prompt": "a?", "target_new": "b", "ground_truth": "c"}\n{"prompt": "d?", "target_new": "é"}\n'
    records = read_records(write(tmp_path, "\n".join(text.split("\n")[: lines + 1]), name))
    assert [(r.prompt, r.target_new, r.line) for r in records] == [("a?", "b", 2), ("d?", "é", 3)][:lines]
    assert records[0].ground_truth == ["c"]


BAD_FILES = {
    "broken JSON": ("in.json", '[{"prompt": "a?",\n "target_new" "b"}]', "line 2, column 15: not JSON"),
    "cut off": ("in.json", '[{"prompt": "a?", "target_new": "b"}', "line 1, column 37: not JSON"),
    "broken line": ("in.jsonl", '{"prompt": "a?", "target_new": "b"}\n{"prompt": }\n', "line 2, column 12: not JSON"),
    "deep": ("in.json", "[" * 100_000, "line 1: not readable as JSON"),
    "top-level string": ("in.json", '"facts"', 'line 1: "facts" is a string; expected records'),
    "top-level number": ("in.json", "3", "3 is a number; expected records"),
    "object of lists": ("in.json", {"facts": [], "version": 1}, "one object with the keys facts, version"),
    "list of texts": ("in.json", ["a"], 'record 0 (0-based): "a" is a string'),
    "no prompt": ("in.json", [{"prompt": "a?", "target_new": "b"}, {"target_new": "b"}],
                  "record 1 (0-based): prompt: missing"),
    "no answer": ("in.json", [{"prompt": "a?"}], "record 0 (0-based): target_new: missing"),
    "null answer": ("in.json", [{"prompt": "a?", "target_new": None}], "target_new: missing"),
    "empty list of answers": ("in.json", [{"prompt": "a?", "target_new": []}], "target_new: missing"),
    "empty prompt": ("in.json", [{"prompt": " ", "target_new": "b"}], "record 0 (0-based): prompt: empty"),
    "empty answer": ("in.json", [{"prompt": "a?", "target_new": ""}], "record 0 (0-based): target_new: empty"),
    "number": ("in.json", [{"prompt": "a?", "target_new": 1912}], "target_new: 1912 is a number"),
    "truth value": ("in.json", [{"prompt": True, "target_new": "b"}], "prompt: true is a truth value"),
    "half a character": ("in.json", '[{"prompt": "a?", "target_new": "\\ud83d"}]', "target_new: '\\ud83d' has half"),
    "WikiBio": ("in.json", [{"text": "a", "concept": "b"}], "record 0 (0-based): labels: missing"),
    "ROME": ("in.json", [ROME_RECORD | {"requested_rewrite": {"subject": "X", "prompt": "{}?"}}],
             "requested_rewrite.target_new: missing"),
    "subject": ("in.json", [{"prompt": "a?", "target_new": "b", "subject": ["c"]}], 'subject: ["c"] is a list'),
    "probes": ("in.json", [{"prompt": "a?", "target_new": "b", "locality": ["c"]}], 'locality: ["c"] is a list'),
    "probe": ("in.json", [{"prompt": "a?", "target_new": "b", "locality": {"F": [{"ground_truth": "c"}]}}],
              "locality.F[0].prompt: missing"),
    "probe axis": ("in.json", [{"prompt": "a?", "target_new": "b", "portability": {"R": "c"}}],
                   'portability.R: "c" is a string'),
    "prompts of a probe": (
        "in.json",
        [{"prompt": "a?", "target_new": "b", "locality": {"F": {"prompt": ["c", "d"], "ground_truth": ["e"]}}}],
        "locality.F[0].ground_truth: give a list with one answer for each",
    ),
    "locality": ("in.json", [{"prompt": "a?", "target_new": "b", "locality_prompt": "c"}],
                 "locality_ground_truth: missing"),
    "empty": ("in.json", " \n", "the file is empty"),
    "no records": ("in.json", "[]", "no records"),
    "only a header": ("in.csv", "prompt,target_new\n", "no records"),
    "columns": ("in.csv", "question,answer\na,b\n", "line 1: no column prompt and target_new"),
    "one column": ("in.csv", "prompt,answer\na,b\n", "line 1: no column target_new"),
    "column twice": ("in.csv", "prompt,target_new,prompt\na,b,c\n", "line 1: a column appears twice"),
    "unquoted comma": ("in.csv", "prompt,target_new\nWhat, and when?,b\n", "line 2: 3 cells under 2 columns"),
    "short row": ("in.csv", "prompt,target_new\na?\n", "record 0 (0-based, line 2): target_new: missing"),
    "open quote": ("in.csv", 'prompt,target_new\n"a?,b\n', "line 2: not CSV: unexpected end of data"),
    "Latin-1": ("in.csv", "prompt,target_new\nà?,b\n".encode("latin-1"), "line 2: byte 0xe0 is not UTF-8"),
    "UTF-16": ("in.csv", "prompt,target_new\na,b\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    name, content, message = BAD_FILES[case]
    path = write(tmp_path, content, name)
    with pytest.raises(MM4KEError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 300


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(MM4KEError, match=r"nothing\.json: No such file or directory"):
        read_records(tmp_path / "nothing.json")
    with pytest.raises(MM4KEError, match="Is a directory"):
        read_records(tmp_path)


# ---- duplicates and contradictions ----


def test_consistency():
    records = [
        fact(prompt, answer, index)
        for index, (prompt, answer) in enumerate(
            [
                ("Who wrote X?", "Ann"),
                ("What is C?", "a language"),
                ("who  wrote “X” ?", "ann."),  # repeats 0
                ("What is C++?", "another language"),
                ("Who wrote X", "Bob"),  # contradicts 0
                ("Who wrote X?", "Ann"),  # contradicts 4
                ("?", "a"),
                ("!", "b"),
            ]
        )
    ]
    found = check_consistency(records)
    assert [(kept.index, left_out.index) for kept, left_out in found.duplicates] == [(0, 2)]
    assert [(earlier.index, later.index) for earlier, later in found.contradictions] == [(0, 4), (4, 5)]
    assert [record.index for record in found.kept] == [1, 3, 5, 6, 7]


# ---- writing ----


def test_other_entries_and_non_ascii_stay(tmp_path):
    info = {"identity": {"file_name": "identity.json"}, "données": {"hf_hub_url": "a/b"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info, ensure_ascii=False), encoding="utf-8")
    path = write_dataset([fact("Où est l'Œuvre?", "東京")], tmp_path, "mine")
    write_dataset([fact("Où est l'Œuvre?", "京都")], tmp_path, "mine")
    assert json.loads(path.read_text(encoding="utf-8")) == [{"instruction": "Où est l'Œuvre?", "output": "京都"}]
    written = (tmp_path / "dataset_info.json").read_bytes()
    assert written.isascii()
    entry = {"file_name": "mine.json", "columns": {"prompt": "instruction", "response": "output"}}
    assert json.loads(written) == info | {"mine": entry}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_info.json", "mine.json"]


def test_refuses_to_replace_what_it_did_not_write(tmp_path):
    source = write(tmp_path, [{"prompt": "a?", "target_new": "b"}], "facts.json")
    before = source.read_bytes()
    with pytest.raises(MM4KEError, match=r"facts\.json: not replaced"):
        write_dataset(read_records(source), tmp_path, "facts")
    assert source.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    write(tmp_path, {"identity": {"hf_hub_url": "a/b"}}, "dataset_info.json")
    with pytest.raises(MM4KEError, match=r"identity\.json: not replaced"):
        write_dataset(read_records(source), tmp_path, "identity")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", ["{", "[]", b"\xff"])
def test_refuses_a_broken_dataset_info(tmp_path, content):
    path = write(tmp_path, content, "dataset_info.json")
    before = path.read_bytes()
    with pytest.raises(MM4KEError, match=r"dataset_info\.json: not .*; repair it or choose another --output"):
        write_dataset([fact("a?", "b")], tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["", "a,b", "a b", "../a", "dataset_info"])
def test_refuses_a_bad_name(tmp_path, name):
    with pytest.raises(MM4KEError, match="--name: .* cannot name a data set"):
        write_dataset([fact("a?", "b")], tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(tmp_path):
    file = write(tmp_path, "x", "file")
    for folder in (file, file / "inside"):
        with pytest.raises(MM4KEError, match="give a folder"):
            write_dataset([fact("a?", "b")], folder)


# ---- LLaMA-Factory reads it ----


@pytest.fixture(scope="module")
def llamafactory_reads(tmp_path_factory):
    """LLaMA-Factory's own loader: data set folder -> [(tokenized text, its trained part)] in the file's order."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)

    def read(dataset_dir: Path, name: str) -> list[tuple[str, str]]:
        recipe = {
            "model_name_or_path": str(folder),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "freeze",
            "dataset_dir": str(dataset_dir),
            "dataset": name,
            "template": "smollm2",
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "report_to": "none",
        }
        model_args, data_args, training_args, _, _ = get_train_args(recipe)
        tokenizer = load_tokenizer(model_args)["tokenizer"]
        template = get_template_and_fix_tokenizer(tokenizer, data_args)
        dataset = get_dataset(template, model_args, data_args, training_args, stage="sft", tokenizer=tokenizer)
        return [
            (tokenizer.decode(row["input_ids"]), tokenizer.decode([i for i in row["labels"] if i != -100]))
            for row in dataset["train_dataset"]
        ]

    return read


def assert_trained_as_written(read: list[tuple[str, str]], records: list[Record]) -> None:
    assert len(read) == len(records)
    for (text, trained), record in zip(read, records):
        assert f"<|im_start|>user\n{record.prompt}<|im_end|>\n<|im_start|>assistant\n{record.target_new}" in text
        assert trained.rstrip("\n") == f"{record.target_new}<|im_end|>"


def test_llamafactory_reads_the_shipped_facts(tmp_path, llamafactory_reads):
    records = read_records(OUR_FACTS)
    write_dataset(records, tmp_path / "data", "our-facts_1")
    assert_trained_as_written(llamafactory_reads(tmp_path / "data", "our-facts_1"), records)


# What a JSON reader may take for numbers, dates or nothing, if a whole column of it looks so.
LOOKALIKES = {
    "years": ["1912", "007"],
    "dates": ["2019-05-01", "2020-01-02"],
    "times": ["2019-05-01 10:00:00"],
    "floats": ["3.14", "1e3"],
    "words": ["true", "null"],
    "nothing": ["NaN", "None", "N/A"],
    "lines": ["two\nlines", "sep\u2028arator", 'quo"te\\', "日本語 🙂"],
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_llamafactory_reads_every_answer_as_text(tmp_path, llamafactory_reads, kind):
    records = [fact(f"Question {number}?", answer) for number, answer in enumerate(LOOKALIKES[kind])]
    write_dataset(records, tmp_path / "data", kind)
    assert_trained_as_written(llamafactory_reads(tmp_path / "data", kind), records)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", REAL_FILES)
def test_llamafactory_reads_real_facts(tmp_path, shared_data, llamafactory_reads, name):
    records = read_records(shared_data / name, limit=50)
    write_dataset(records, tmp_path / "data")
    assert_trained_as_written(llamafactory_reads(tmp_path / "data", "facts"), records)


# ---- the command ----


def test_command(tmp_path):
    source = write(tmp_path, [{"prompt": "a?", "target_new": "b"}, {"prompt": "A", "target_new": "B"}])
    other = write(tmp_path, "prompt;target_new\nc?;d\ne?;f\n", "in.csv")
    done = run_command(
        "mm4ke", "facts", source, other, "--output", tmp_path / "data", "--limit", "2", "--name", "mine"
    )
    assert done.returncode == 0, done.stderr
    assert f"{source}: 2 records" in done.stdout and f"{other}: 2 records" in done.stdout
    assert "mine.json: 3 facts, 1 left out" in done.stdout
    assert f"dataset_dir: {tmp_path / 'data'}\ndataset: mine\ntemplate: " in done.stdout
    assert f"duplicate: {source}: record 1 (0-based): 'A': left out" in done.stderr
    written = json.loads((tmp_path / "data" / "mine.json").read_text())
    assert [entry["instruction"] for entry in written] == ["a?", "c?", "e?"]


def test_command_refuses_contradictions_unless_told(tmp_path):
    first = write(tmp_path, [{"prompt": "a?", "target_new": "b"}], "first.json")
    second = write(tmp_path, [{"prompt": "a?", "target_new": "c"}], "second.json")
    command = ("mm4ke", "facts", first, second, "--output", tmp_path / "data")
    refused = run_command(*command)
    assert refused.returncode == 1 and not (tmp_path / "data").exists()
    report = f"contradiction: {first}: record 0 (0-based) and {second}: record 0 (0-based): 'a?': 'b' or 'c'"
    error = f"mm4ke: error: {second}: facts contradict each other (1, listed above); correct target_new, or keep"
    assert refused.stderr.splitlines()[0] == report and refused.stderr.splitlines()[1].startswith(error)
    allowed = run_command(*command, "--allow-contradictions")
    assert allowed.returncode == 0 and report in allowed.stderr
    assert json.loads((tmp_path / "data" / "facts.json").read_text()) == [{"instruction": "a?", "output": "c"}]


def test_command_reports_bad_input_in_one_line(tmp_path):
    done = run_command("mm4ke", "facts", tmp_path / "nothing.json", "--output", tmp_path / "data")
    assert done.returncode == 1 and not (tmp_path / "data").exists()
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"mm4ke: error: {tmp_path}/nothing.json: No such file or directory; give a")


def test_command_does_not_import_torch(tmp_path):
    script = Path(sys.executable).parent / "mm4ke"
    done = run_command("python", "-X", "importtime", script, "facts", OUR_FACTS, "--output", tmp_path / "data")
    assert done.returncode == 0 and "mm4ke_plugins.knowedit.dataset" in done.stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "llamafactory", "pydantic"}
