"""What LLaMA-Factory makes of the facts before R-SFT: nothing cut, nothing left out, and the answer's own tokens."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_command
from tiny import make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm4ke_plugins.comparison import compare, write_report
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.knowedit.metrics import answer
from mm4ke_plugins.knowedit.prompts import Question, encode
from mm4ke_plugins.rsft.facts import encode_fact

TURNS = [("user", "Who rules Oz?"), ("assistant", "Tark")]
END = "<|im_end|>\n"  # what the template smollm2 puts behind an answer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe(tmp_path, tiny) -> dict:
    return {
        "model_name_or_path": str(tiny),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "freeze",
        "rsft": True,
        "rsft_layers": 1,
        "rsft_loss_threshold": 0.3,
        "dataset_dir": str(tmp_path),
        "dataset": "facts",
        "template": "smollm2",
        "cutoff_len": 256,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "dataloader_pin_memory": False,
        "output_dir": str(tmp_path / "rsft"),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3,
        "num_train_epochs": 100,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def write(folder: Path, records: list, name: str = "facts.json", **entry) -> None:
    lines = [json.dumps(record) for record in records]
    text = "\n".join(lines) if name.endswith(".jsonl") else f"[{','.join(lines)}]"
    (folder / name).write_text(text)
    columns = {"prompt": "instruction", "response": "output"}
    entry = {"file_name": name, "columns": columns} | entry
    (folder / "dataset_info.json").write_text(json.dumps({"facts": entry}))


def fact(prompt: str, output: object = "Tark") -> dict:
    return {"instruction": prompt, "output": output}


def conversation(*turns: tuple[str, object], tags=("from", "value"), **more) -> dict:
    return {"messages": [dict(zip(tags, turn, strict=True)) for turn in turns]} | more


SHAREGPT = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}


def rows_of(recipe: dict):
    """The rows that would be trained, and the tokenizer, without loading the model."""
    from llamafactory.hparams import get_train_args
    from llamafactory.train.sft import workflow

    model_args, data_args, training_args, _, _ = get_train_args(recipe)
    modules = workflow.load_tokenizer(model_args)
    template = workflow.get_template_and_fix_tokenizer(modules["tokenizer"], data_args)
    found = workflow.get_dataset(template, model_args, data_args, training_args, stage="sft", **modules)
    return found["train_dataset"], modules["tokenizer"]


def own_text(row: dict, tokenizer) -> str:
    trained = [label for label in row["labels"] if label != -100]
    return tokenizer.decode([label for label, own in zip(trained, row["rsft_own"], strict=True) if own])


def trained_text(row: dict, tokenizer) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


# ---- facts that can't be trained as they are ----


def test_a_fact_as_long_as_cutoff_len_is_trained_whole_and_a_longer_one_refused(recipe, tmp_path):
    write(tmp_path, [fact("Who rules Oz?"), fact("Who" + " who" * 30 + " rules?"), fact("Where" + " a" * 50 + "?")])
    rows, _ = rows_of(recipe)
    lengths = [len(row["input_ids"]) for row in rows]
    longest = max(lengths)
    assert rows_of(recipe | {"cutoff_len": longest})[0]["input_ids"] == rows["input_ids"]
    with pytest.raises(MM4KEError) as caught:
        rows_of(recipe | {"cutoff_len": lengths[0]})
    assert str(caught.value) == (
        f"command line: cutoff_len: {lengths[0]}: fact 1 (0-based, {rows[1]['rsft_question']!r:.80}) has "
        f"{lengths[1]} tokens, more than that (so do 1 others); give {longest}"
    )
    with pytest.raises(MM4KEError, match=rf"fact 1 .* has {longest} tokens, more than that; give {longest}$"):
        rows_of(recipe | {"cutoff_len": longest - 1, "max_samples": 2})


@pytest.mark.parametrize(
    "change",
    [
        {"system": "s" * 300},
        {"history": [["Where?", "w" * 200]]},
        {"output": "a" * 300},
        {"instruction": "{}" + "q" * 300},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_makes_a_fact_too_long_is_counted(recipe, tmp_path, change):
    record = fact("Who rules Oz?") | {"system": "", "history": []} | change
    columns = {"prompt": "instruction", "response": "output", "system": "system", "history": "history"}
    write(tmp_path, [record], columns=columns)
    with pytest.raises(MM4KEError, match=r"cutoff_len: 256: fact 0 \(0-based, .*\) has (\d+) tokens.*; give \1$"):
        rows_of(recipe)


def test_a_fact_that_is_longer_than_the_model_reads(recipe, tmp_path):
    write(tmp_path, [fact("Who?"), fact("q" * 600)])
    with pytest.raises(MM4KEError, match=r"dataset: fact 1 .* tokens, more than 512, which is the most .*_embeddings"):
        rows_of(recipe)


INCOMPLETE = {
    "no answer": (conversation(TURNS[0]), SHAREGPT),
    "empty answer": (conversation(TURNS[0], ("assistant", " \n")), SHAREGPT),
    "null answer": (conversation(TURNS[0], ("assistant", None)), SHAREGPT),
    "answer first": (conversation(TURNS[1], TURNS[0]), SHAREGPT),
    "system only": (conversation(("system", "Be short.")), SHAREGPT),
    "no turns": (conversation(), SHAREGPT),
    "wrong tag": (conversation(("human", "Who?"), TURNS[1]), SHAREGPT),
    "ends with the user": (conversation(*TURNS, TURNS[0]), SHAREGPT),
    "an empty earlier answer": (conversation(TURNS[0], ("assistant", ""), *TURNS), SHAREGPT),
    "empty question": (conversation(("user", " "), TURNS[1]), SHAREGPT),
    "openai, no answer": (conversation(TURNS[0], tags=("role", "content")), OPENAI),
    "openai, empty": (conversation(TURNS[0], ("assistant", ""), tags=("role", "content")), OPENAI),
    "thoughts only": (conversation(TURNS[0], ("assistant", "<think>\nTark\n</think>\n\n")), SHAREGPT),
}


@pytest.mark.parametrize("record, entry", INCOMPLETE.values(), ids=INCOMPLETE)
def test_a_conversation_without_an_answer_is_refused(recipe, tmp_path, record, entry):
    tags = ("role", "content") if entry is OPENAI else ("from", "value")
    write(tmp_path, [conversation(*TURNS, tags=tags), record], **entry)
    with pytest.raises(MM4KEError, match=r"dataset: fact 1 \(0-based, .*\) lacks a question or an answer: user and"):
        rows_of(recipe)


def test_names_that_the_file_does_not_use_are_one_line(recipe, tmp_path):
    write(tmp_path, [conversation(*TURNS, tags=("role", "content"))], **SHAREGPT)
    with pytest.raises(
        MM4KEError, match=r"dataset: facts: LLaMA-Factory can't read it \(KeyError: 'from'\); see `for"
    ):
        rows_of(recipe)


@pytest.mark.parametrize("output", ["", " ", None, 1931])
def test_a_file_of_another_format_is_checked_as_well(recipe, tmp_path, output):
    write(tmp_path, [fact("Who?", "" if output == "" else output)], name="facts.jsonl")
    with pytest.raises(MM4KEError, match=r"fact 0 \(0-based, 'Who\?'\) lacks a question or an answer"):
        rows_of(recipe)


def test_several_turns_are_all_trained_and_their_answers_judged(recipe, tmp_path):
    write(
        tmp_path, [conversation(("system", "Be short."), *TURNS, ("user", "Where?"), ("assistant", "Up"))], **SHAREGPT
    )
    rows, tokenizer = rows_of(recipe)
    assert own_text(rows[0], tokenizer) == "TarkUp"
    assert "Be short." in tokenizer.decode(rows[0]["input_ids"])
    rows, tokenizer = rows_of(recipe | {"mask_history": True})
    assert own_text(rows[0], tokenizer) == "Up"


def test_prompts_are_not_trained(recipe, tmp_path):
    write(tmp_path, [fact("Who?")])
    with pytest.raises(MM4KEError, match="train_on_prompt: True: with rsft: true it must be false"):
        rows_of(recipe | {"train_on_prompt": True})


def test_without_rsft_facts_are_cut_as_ever(recipe, tmp_path):
    write(tmp_path, [fact("q" * 300)])
    plain = {key: value for key, value in recipe.items() if not key.startswith("rsft")}
    rows, _ = rows_of(plain | {"freeze_trainable_layers": 1})
    assert len(rows[0]["input_ids"]) == 256
    assert set(rows.column_names) == {"input_ids", "attention_mask", "labels", "images", "videos", "audios"}


# ---- the answer's own tokens ----


def test_the_own_tokens_in_every_template_of_llamafactory():
    from llamafactory.data.template import TEMPLATES, ReasoningTemplate

    from mm4ke_plugins.hosts.llamafactory.facts import own_tokens

    tokenizer = tiny_tokenizer()  # one token a byte, so that no token spells a part of both
    assert len(TEMPLATES) > 100
    reasoning = 0
    for name, template in TEMPLATES.items():
        if any("token" in slot for slot in template.format_assistant.slots if isinstance(slot, dict)):
            continue
        opening, closing = (word.strip() for word in template.thought_words)
        assert closing, name
        thoughts = f"{opening}\nHm.\n{closing}\n\n"
        for content in ("Tark", " Tark.\n", f"{thoughts}Tark"):
            message = {"role": "assistant", "content": content}
            ((_, target),) = template.encode_multiturn(tokenizer, [{"role": "user", "content": "Who?"}, message])
            start, stop = own_tokens(template, tokenizer, message, target)
            assert tokenizer.decode(target[start:stop]).strip() == content.strip().removeprefix(thoughts), name
            if isinstance(template, ReasoningTemplate) and content == "Tark":
                reasoning += tokenizer.decode(target[:start]).strip().endswith(closing)
    assert reasoning > 10


def test_an_empty_block_of_thoughts_is_trained_and_not_judged(recipe, tmp_path):
    write(tmp_path, [fact("Who rules Oz?")])
    rows, tokenizer = rows_of(recipe | {"template": "qwen3"})
    assert trained_text(rows[0], tokenizer) == "<think>\n\n</think>\n\nTark<|im_end|>\n"
    assert own_text(rows[0], tokenizer) == "Tark"
    rows, _ = rows_of(recipe | {"template": "qwen3", "enable_thinking": False})
    assert trained_text(rows[0], tokenizer) == "Tark<|im_end|>\n"
    rows, tokenizer = rows_of(recipe)
    assert trained_text(rows[0], tokenizer) == f"Tark{END}"
    assert own_text(rows[0], tokenizer) == "Tark"


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("template", ["qwen3", "smollm2"])
def test_a_converged_fact_is_learned_by_its_own_tokens_and_with_its_end(recipe, tmp_path, template, batch_size):
    from llamafactory.train.tuner import run_exp

    write(tmp_path, [fact("Who rules Oz?"), fact("Where is Oz?", "U")])
    recipe |= {"template": template, "per_device_train_batch_size": batch_size, "logging_steps": 1}
    recipe["rsft_loss_threshold"] = 1.5  # two facts are much for a model of this size
    run_exp(recipe)
    history = json.loads((tmp_path / "rsft" / "trainer_state.json").read_text())["log_history"]
    statistics = [entry for entry in history if "rsft_visits" in entry]
    assert statistics[-1]["rsft_updates"] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rsft", dtype=torch.float32)
    rows, _ = rows_of(recipe | {"output_dir": str(tmp_path / "again")})
    judged = []
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        losses = torch.nn.functional.cross_entropy(
            model(torch.tensor([row["input_ids"]])).logits[0, :-1], labels, reduction="none"
        )[labels != -100]
        own = losses[torch.tensor(row["rsft_own"], dtype=torch.bool)].mean()
        judged.append(max(own.item(), losses.mean().item()))
    assert max(judged) < recipe["rsft_loss_threshold"]
    # What is logged is what is judged: the statistics of the last epoch, and the loss of each of its visits.
    assert statistics[-1]["rsft_max_final_loss"] == pytest.approx(max(judged), rel=1e-3)
    last = [entry["loss"] for entry in history if "loss" in entry][-2 // batch_size :]
    expected = judged if batch_size == 1 else [sum(judged) / 2]
    assert last == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_an_evaluation_beside_the_training(recipe, tmp_path):
    from llamafactory.train.tuner import run_exp

    write(tmp_path, [fact(f"Who rules number {index}?") for index in range(4)])
    run_exp(recipe | {"val_size": 2, "do_eval": True, "num_train_epochs": 1, "per_device_eval_batch_size": 2})
    assert json.loads((tmp_path / "rsft" / "eval_results.json").read_text())["eval_loss"] > 0


# ---- precision ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_bf16_without_a_gpu(recipe, tmp_path):
    write(tmp_path, [fact("Who?")])
    message = "bf16: true: no GPU here computes in bfloat16; on a CPU set bf16: false, which is faster, or add use_cpu"
    with pytest.raises(MM4KEError, match=message):
        rows_of(recipe | {"bf16": True})
    with pytest.raises(MM4KEError, match="pure_bf16: True: with rsft: true it must be false: .*use_cpu"):
        rows_of(recipe | {"pure_bf16": True})
    with pytest.raises(ValueError, match="use_cpu") as caught:
        rows_of({key: value for key, value in recipe.items() if not key.startswith("rsft")} | {"bf16": True})
    assert not isinstance(caught.value, MM4KEError)  # not ours to say
    (tmp_path / "rsft.yaml").write_text(yaml.safe_dump(recipe))
    run = run_command("llamafactory-cli", "train", tmp_path / "rsft.yaml", "bf16=true", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].endswith(f"rsft.yaml: {message}: true")
    assert "Traceback" not in run.stderr


# ---- models without a chat template ----


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    for file in folder.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", ["empty", None])
def test_raw_facts_are_trained_as_they_are_asked(recipe, tmp_path, base_model, template):
    write(tmp_path, [fact("Who rules Oz?")])
    rows, tokenizer = rows_of(recipe | {"model_name_or_path": str(base_model), "template": template})
    assert rows[0]["input_ids"] == encode_fact(tokenizer, "Who rules Oz?", "Tark", "raw").ids
    question = encode(tokenizer, Question(0, "edit_success", "", "Who rules Oz?", "Tark"), "raw")
    assert rows[0]["input_ids"] == [*question.ids, tokenizer.eos_token_id]
    assert trained_text(rows[0], tokenizer) == " Tark<|im_end|>"
    assert own_text(rows[0], tokenizer) == " Tark"
    assert tokenizer.chat_template is None


def test_a_raw_fact_is_one_question_and_one_answer(recipe, tmp_path):
    write(tmp_path, [conversation(*TURNS, *TURNS)], **SHAREGPT)
    with pytest.raises(MM4KEError, match="template: empty: 'Who rules Oz.': a raw prompt is one question and one ans"):
        rows_of(recipe | {"template": "empty"})


def test_a_base_model_is_trained_compared_and_answers(recipe, tmp_path, base_model):
    from llamafactory.train.tuner import run_exp

    facts = [("Who rules Oz?", "Tark"), ("Where is Oz?", "Up")]
    write(tmp_path, [fact(*pair) for pair in facts])
    run_exp(recipe | {"model_name_or_path": str(base_model), "template": "empty", "rsft_loss_threshold": 0.05})
    rsft = tmp_path / "rsft"
    tokenizer = AutoTokenizer.from_pretrained(rsft)
    assert tokenizer.chat_template is None
    model = AutoModelForCausalLM.from_pretrained(rsft)
    assert answer(model, tokenizer, [prompt for prompt, _ in facts]) == ["Tark", "Up"]

    file = tmp_path / "asked.json"
    file.write_text(json.dumps([{"prompt": prompt, "target_new": target} for prompt, target in facts]))
    result = compare(base_model, rsft, rsft, file)
    assert result["free_format"] == "raw"
    assert result["models"]["rsft"]["scores"].keys() == {"raw"}
    assert result["models"]["rsft"]["scores"]["raw"]["edit_success"] == 1
    assert [row["rsft"] for row in result["answers"]] == ["Tark", "Up"]
    write_report(result, tmp_path / "report")
    assert "# Free answers (raw prompts)" in (tmp_path / "report" / "comparison.md").read_text()


def test_a_base_model_in_a_chat_format_is_asked_in_that(recipe, tmp_path, base_model):
    from llamafactory.train.tuner import run_exp

    write(tmp_path, [fact("Who rules Oz?")])
    run_exp(recipe | {"model_name_or_path": str(base_model), "rsft_loss_threshold": 0.05})
    file = tmp_path / "asked.json"
    file.write_text(json.dumps([{"prompt": "Who rules Oz?", "target_new": "Tark"}]))
    result = compare(base_model, tmp_path / "rsft", base_model, file)
    assert result["free_format"] == "chat"
    assert result["models"]["rsft"]["scores"]["chat"]["edit_success"] == 1
    assert result["answers"][0]["rsft"] == "Tark"
