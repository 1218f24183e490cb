"""From facts to the data set that LLaMA-Factory trains on.

LLaMA-Factory (0.9.5) finds data sets through `dataset_info.json` in the recipe's `dataset_dir`. Ours is in its
alpaca format: the prompt exactly as a user types it, the answer, and, for us, the subject that the facts name. The
template adds the chat format and the end-of-sequence token.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import click

from ..errors import MM4KEError
from ..storage.atomic import locked_folder, refused_in_one_line, replace_text
from .normalize import normalize
from .records import Axes, Record, read_records


@dataclass(frozen=True)
class Consistency:
    """What `check_consistency` found.

    kept:           one record for each prompt, in order, with the probes of its duplicates; the latest one where
                    records contradict each other
    duplicates:     (kept, left out): the same prompt and answer
    contradictions: (earlier, later): the same prompt with another answer; the earlier is not in `kept`
    """

    kept: list[Record]
    duplicates: list[tuple[Record, Record]]
    contradictions: list[tuple[Record, Record]]


def check_consistency(records: list[Record]) -> Consistency:
    """Find the records that say the same, and those that contradict each other.

    Prompts and answers are compared after `normalize`. R-SFT would train a duplicated fact for nothing, and would
    learn and unlearn two contradicting ones in every epoch.
    """
    latest: dict[str, Record] = {}
    duplicates, contradictions = [], []
    for record in records:
        question = normalize(record.prompt)
        earlier = latest.get(question)
        if earlier and normalize(earlier.target_new) == normalize(record.target_new):
            duplicates.append((earlier, record))
            latest[question] = _with_probes_of(earlier, record)
            continue
        if earlier:
            contradictions.append((earlier, record))
            del latest[question]  # so that the later record keeps its own place in the order
        latest[question] = record
    return Consistency(list(latest.values()), duplicates, contradictions)


def _with_probes_of(record: Record, duplicate: Record) -> Record:
    """The record, asked also what is asked of its duplicate: cases of MQuAKE share facts, not questions."""

    def both(axes: Axes, more: Axes) -> Axes:
        names = dict.fromkeys([*axes, *more])
        return {name: _each_once(axes.get(name, []) + more.get(name, [])) for name in names}

    return replace(
        record,
        rephrase_prompts=_each_once(record.rephrase_prompts + duplicate.rephrase_prompts),
        portability=both(record.portability, duplicate.portability),
        locality=both(record.locality, duplicate.locality),
    )


def _each_once(entries: list) -> list:
    return [entry for place, entry in enumerate(entries) if entry not in entries[:place]]


def read_facts(path: Path, limit: int | None = None) -> list[Record]:
    """The records of a file, or of its first `limit`, that `mm4ke facts --allow-contradictions` keeps.

    Whoever asks a model what it was taught reads the facts by this function. What is left out is said on stderr.

    Raises MM4KEError: what `read_records` raises.
    """
    read = read_records(path, limit)
    kept = consistent_records(read, allow_contradictions=True)
    if len(kept) < len(read):
        click.echo(f"{path}: {len(kept)} of {len(read)} facts are asked, as `mm4ke facts` keeps them", err=True)
    return kept


def consistent_records(records: list[Record], allow_contradictions: bool = False) -> list[Record]:
    """The records without duplicates and contradictions; each one that is left out is a line on stderr.

    The order is that of the later ones. Probes of duplicates are asked with the record that is kept.

    Raises MM4KEError where records contradict each other, unless `allow_contradictions`: then the later one counts.
    """
    found = check_consistency(records)
    for kept, left_out in found.duplicates:
        click.echo(f"duplicate: {left_out.place}: {left_out.prompt!r:.200}: left out, {kept.place} says it", err=True)
    for earlier, later in found.contradictions:
        click.echo(
            f"contradiction: {earlier.place} and {later.place}: {later.prompt!r:.200}: "
            f"{earlier.target_new!r:.100} or {later.target_new!r:.100}",
            err=True,
        )
    if found.contradictions and not allow_contradictions:
        raise MM4KEError(
            f"{found.contradictions[0][1].source}: facts contradict each other ({len(found.contradictions)}, listed "
            "above); correct target_new, or keep the later record of each with --allow-contradictions"
        )
    return found.kept


def dataset_text(records: list[Record]) -> str:
    """The data set of the records, as `write_dataset` writes it.

    A JSON list, not JSONL: the datasets library reads "2019-05-01" in a JSONL column of dates as a datetime, and
    LLaMA-Factory drops answers that are not strings.
    """
    facts = [
        {"instruction": record.prompt, "output": record.target_new}
        | ({"subject": record.subject} if record.subject else {})
        for record in records
    ]
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def write_dataset(records: list[Record], folder: Path, name: str = "facts") -> Path:
    """Write `folder/name.json` and register it as `name` in `folder/dataset_info.json`. Returns the former's path.

    Other entries of an existing dataset_info.json stay as they are. Each file is replaced as a whole or not at all.

    Raises MM4KEError: `name` is not one LLaMA-Factory can list; there is a file or an entry of this name that this
    function did not write; dataset_info.json is not a JSON object; the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "dataset_info":
        raise MM4KEError(f"--name: {name!r} cannot name a data set; use letters, digits, - and _")
    info_path, facts_path = folder / "dataset_info.json", folder / f"{name}.json"
    entry = {"file_name": facts_path.name, "columns": {"prompt": "instruction", "response": "output"}}
    # Another run may register a data set of another name: neither entry may be lost.
    with refused_in_one_line(folder, "give a folder that can be written with --output"), locked_folder(folder):
        info = _read_info(info_path)
        # Without this check, `--output recipes` would replace recipes/facts.json, the source, by what came out of it.
        if info.get(name, entry) != entry or (facts_path.exists() and name not in info):
            raise MM4KEError(
                f"{facts_path}: not replaced, because mm4ke did not write it; choose another --name or --output"
            )
        # dataset_info.json is in ASCII because LLaMA-Factory opens it in the locale's encoding.
        replace_text(info_path, json.dumps(info | {name: entry}, indent=2) + "\n")
        replace_text(facts_path, dataset_text(records))
    return facts_path


def _read_info(path: Path) -> dict:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # what is wrong with the folder, if it is, mkdir will say
        return {}
    except (OSError, ValueError) as error:
        raise MM4KEError(f"{path}: not readable as JSON ({error}); repair it or choose another --output") from None
    if not isinstance(info, dict):
        raise MM4KEError(f"{path}: not a JSON object; repair it or choose another --output")
    return info
