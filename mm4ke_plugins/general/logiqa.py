"""LogiQA's text files, for the task `mm4ke_logiqa`. The data set of lm-eval's `logiqa` is a script that no longer runs.

A file is a sequence of blocks of eight lines: an empty one, the answer's letter in lower case, the context, the
question, and four options that begin with their letter and a full stop.
"""

from pathlib import Path

from ..errors import MM4KEError, first_line

# The authors' repository, which the script on the hub read too.
AUTHORS = "https://raw.githubusercontent.com/lgw863/LogiQA-dataset/master"
FILES = {"train": "Train.txt", "validation": "Eval.txt", "test": "Test.txt"}


def parse_blocks(text: str, name: str | Path) -> list[dict]:
    """The records of one file: {"label": "a".."d", "context", "question", "options": [4 strings]}.

    As in the script on the hub, so that scores stay comparable: a space goes behind every full stop, the first two
    characters of an option are its letter, and the options keep the file's order (in 21 of the 651 test blocks the
    letters are not A, B, C, D from top to bottom; the label counts lines there too).

    Raises MM4KEError, with the line's number, for a block that is cut off or whose answer is not a letter from a to d.
    """
    records, lines = [], text.split("\n")
    number = 0
    while number < len(lines):
        if not lines[number].strip():
            number += 1
            continue
        block = [line.strip() for line in lines[number : number + 7]]
        where = f"{name}: line {number + 1}"
        if block[0] not in ("a", "b", "c", "d"):
            raise MM4KEError(f"{where}: answer: {block[0][:40]!r} is not a letter; a block begins with a, b, c or d")
        if len(block) < 7 or not all(block):
            raise MM4KEError(f"{where}: block: cut off; give answer, context, question and 4 options, a line each")
        label, context, question, *options = block
        records.append(
            {
                "label": label,
                "context": _spaced(context),
                "question": _spaced(question),
                "options": [_spaced(option[2:]) for option in options],
            }
        )
        number += 7
    return records


def _spaced(text: str) -> str:
    return text.replace(".", ". ").strip()


def load(logiqa_folder: str = AUTHORS, **_):
    """The data set for lm-eval's `custom_dataset`: a DatasetDict of train, validation and test.

    `--metadata logiqa_folder=DIR` reads DIR/Train.txt, Eval.txt and Test.txt instead of the authors' files.
    Raises MM4KEError when they can't be read.
    """
    from datasets import Dataset, DatasetDict, load_dataset

    splits = {}
    for split, file in FILES.items():
        source = f"{logiqa_folder}/{file}"
        try:
            document = load_dataset("text", data_files=source, sample_by="document", split="train")
        except Exception as error:
            raise MM4KEError(
                f"{source}: {first_line(error)}; offline: `mm4ke prepare-data`, or --metadata logiqa_folder=DIR"
            ) from error
        splits[split] = Dataset.from_list(parse_blocks("\n".join(document["text"]), source))
    return DatasetDict(splits)
