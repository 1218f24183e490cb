"""Facts to edit into a model, read from the files that knowledge editing and its users have.

Which format a file has is seen from its content, not from its name. Beside a field of `Record` are the keys that it
is read from; of several in one record the first counts.

    subject             subject; WikiBio: concept
    prompt              prompt, src (zsRE of MEND and LocFT), update (WikiBigEdit); WikiBio: text;
                        HalluEditBench: question
    target_new          target_new, alt (zsRE), target (QAEdit), ans (WikiBigEdit); WikiBio: labels;
                        HalluEditBench: object
    ground_truth        ground_truth, target_true (ROME), answers (zsRE), target_old (CKnowEdit)
    rephrase_prompts    rephrase_prompt, rephrase_prompts, rephrase, paraphrase_prompts (ROME): one, or a list;
                        MQuAKE: question of each rewrite; HalluEditBench: paraphrased_question
    portability         portability: KnowEdit's axes; a list without axes is "portability" (CKnowEdit), and
                        "New Question" with "New Answer" is "one_hop" (EasyEdit's zsRE and CounterFact);
                        questions with new_answer (MQuAKE): "2_hop" to "4_hop" by the single_hops, else "multi_hop";
                        personas, mhop with mhop_ans (WikiBigEdit);
                        HalluEditBench: "yes_no", "multiple_choice", "reversed", "2_hop" to "6_hop"
    locality            locality: KnowEdit's axes; all others are "neighborhood": a list without axes (QAEdit, CKnowEdit),
                        locality_prompt with locality_ground_truth (EasyEdit's CounterFact), loc with loc_ans (zsRE),
                        neighborhood_prompts, answered by ground_truth (ROME), locality_question (HalluEditBench)

ROME's CounterFact has the keys of the fact under `requested_rewrite`. MQuAKE has a list there: each of its rewrites is
a fact, and the multi-hop questions belong to the last one, as they follow from all of them.

`{}` (or `{subject}`) in a prompt, of a probe too, is the place of the subject, wherever it occurs, as EasyEdit and ROME
write requests. Braces that are meant are written `{{}}`: {"prompt": "What does {{}} mean in Python?"}. Refused are `{}`
without a subject, and `{}` in a prompt that has the subject as well.

HalluEditBench's multiple choice is asked as its authors do, question and choices with their letters, and answered by
the letter; its yes and no questions by "Yes" and "No", and the reversed one by the subject. (They tell the model in a
system message to answer shortly; that is not sent.) Its locality questions have no answer, as neighborhood_prompts
without a target_true: there the first token that the models say is compared.

An answer may be a text, {"str": ...} as ROME writes it, or a list; of target_new the first one is trained. CSV, JSON
and JSONL may use all these keys, in any case and with spaces for underscores. A CSV file has a header and is separated
by commas, semicolons or tabs; an empty cell is an absent key. What reads as pandas' missing value, such as `nan`, is
taken as text, and mentioned.

All text is stripped of surrounding white space. Other keys (`cond`, `case_id`, ...) are ignored.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click

from ..errors import MM4KEError
from .formats import Axes, Probe, Row
from .rows import rows

__all__ = ["Axes", "Probe", "Record", "read_records"]

NOTES_SHOWN = 5


@dataclass(frozen=True)
class Record:
    """One fact, and the probes that measure what editing it did. The probes are keyed by KnowEdit's axes.

    subject:          what the fact is about; None where the file does not say
    prompt:           the question, exactly as it is trained
    target_new:       the answer that the model shall learn
    ground_truth:     the answers from before the edit; may be empty
    rephrase_prompts: the same question in other words; all are asked, and their mean counts
    portability:      axis ("Reasoning", "Subject_Aliasing", "Logical_Generalization", ...) -> questions whose answer
                      follows from the fact
    locality:         axis ("Relation_Specificity", "Forgetfulness", "neighborhood", ...) -> questions whose answer
                      must stay what it was
    source, index:    the file, and the record's place in it counted from 0
    line:             the line it starts on in a JSONL or CSV file, counted from 1; None in a JSON list
    part:             which of the facts of one case (MQuAKE), counted from 0; None elsewhere
    """

    subject: str | None
    prompt: str
    target_new: str
    ground_truth: list[str]
    rephrase_prompts: list[str]
    portability: Axes
    locality: Axes
    source: Path
    index: int
    line: int | None = None
    part: int | None = None

    @property
    def place(self) -> str:
        """The record's place as messages name it, such as "facts.json: record 3 (0-based)"."""
        return _place(self.source, self.index, self.line, self.part)

    @property
    def rephrase_prompt(self) -> str | None:
        """The first of the rephrased prompts, the one that EasyEdit knows; None where there is none."""
        return self.rephrase_prompts[0] if self.rephrase_prompts else None

    @property
    def id(self) -> str:
        """File name and place as results name the record, such as "facts.json:3", or "facts.json:3.1" of a case."""
        return f"{self.source.name}:{self.index}{'' if self.part is None else f'.{self.part}'}"


def read_records(path: Path, limit: int | None = None) -> list[Record]:
    """All records of a file, or the first `limit` of them, in the file's order. One of MQuAKE's gives several.

    Lists of lists of aliases are flattened. Probes without an answer, which KnowEdit's wiki files contain, are left
    out, as EasyEdit does. What is likely to surprise is a line on stderr.

    Raises MM4KEError, naming file, record and key: the file cannot be read, is not UTF-8, neither JSON, JSONL nor
    CSV, of no format above, or has no records; a record has no prompt or answer, or a value of a wrong type.
    """
    path = Path(path)
    records, notes, filled = [], [], []
    for index, (line, raw) in enumerate(islice(rows(path), limit)):
        row = Row(_place(path, index, line))
        facts = row.facts(raw)
        for part, fact in enumerate(facts):
            records.append(Record(**fact, source=path, index=index, line=line, part=part if len(facts) > 1 else None))
        notes += [f"{row.place}: {note}" for note in row.notes]
        if row.filled:
            filled.append(records[-1])
    if not records:
        raise MM4KEError(f"{path}: no records; give at least one with prompt and target_new")
    for note in notes[:NOTES_SHOWN]:
        click.echo(f"warning: {note}", err=True)
    if len(notes) > NOTES_SHOWN:
        click.echo(f"warning: {path}: {len(notes) - NOTES_SHOWN} more of this kind", err=True)
    if filled:
        example = f"{filled[0].prompt!r:.100} ({filled[0].place})"
        click.echo(f"{path}: the subject is put for {{}}, records: {len(filled)}, such as {example}", err=True)
    return records


def _place(source: Path, index: int, line: int | None, part: int | None = None) -> str:
    line_text, part_text = ("" if line is None else f", line {line}"), ("" if part is None else f", fact {part}")
    return f"{source}: record {index} (0-based{line_text}{part_text})"
