"""What the rows of fact files mean: from the keys of each format to the fields of `Record`. The table is in records.py.

What the fields of the public benchmarks are for was read from their own code: EasyEdit's easyeditor/dataset/*.py and
examples/run_*.py, edit_all_method.py of HalluEditBench, edit.py of QAEdit, the README of MQuAKE.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import MM4KEError

FORMATS = (
    "KnowEdit, zsRE (MEND, LocFT), CounterFact (ROME, EasyEdit), MQuAKE, QAEdit, HalluEditBench, WikiBigEdit, "
    "CKnowEdit, or prompt and target_new"
)
# The keys of what is not read, as people know it.
UNREAD = {
    "KnowEdit's ConvSent": {"ent", "pos", "neg"},
    "KnowEdit's trivia (Sanitation)": {"success", "locality"},
    "SQuAD": {"data", "version"},
    "ShareGPT": {"conversations"},
    "a list of chat messages": {"messages"},
    "Alpaca, as `mm4ke facts` writes it,": {"instruction", "output"},
    "UnKE": {"question", "para_question"},
}

# By field, the keys that say it; of several the first that is there.
PROMPT = ("prompt", "src", "update")
TARGET = ("target_new", "alt", "target", "ans")
SUBJECT = ("subject",)
TRUTH = ("ground_truth", "target_true", "answers", "target_old")
REPHRASE = ("rephrase_prompt", "rephrase_prompts", "rephrase", "paraphrase_prompts")
# Where WikiBio's keys differ from those of the other KnowEdit files.
WIKIBIO = {PROMPT: ("text",), TARGET: ("labels",), SUBJECT: ("concept",)}
PROBES = ("portability", "locality", "locality_prompt", "locality_ground_truth", "loc", "loc_ans",
          "neighborhood_prompts", "questions", "new_answer", "new_answer_alias", "mhop", "mhop_ans", "personas")  # fmt: skip
HALLUEDIT = ("question", "object", "paraphrased_question", "yes_question", "no_question", "locality_question",
             "multiple_choice_with_letters", "multiple_choice_labels", "reversed_relation_question",
             *(f"{part}_{hops}hop" for hops in range(2, 7) for part in ("question", "answer")))  # fmt: skip

# What EasyEdit and ROME call the locality probes of CounterFact; here also those that come without an axis.
NEIGHBORHOOD = "neighborhood"
# HalluEditBench gives no answers to its locality questions: whatever the model says shall stay. Teacher forcing needs
# a token at which the models are compared. They don't see it before they say theirs, so it may be any.
ANY_ANSWER = "The"

BRACES = re.compile(r"\{(\{(?:subject)?\})\}|\{(?:subject)?\}")


def _squashed(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


KEYS = {*PROMPT, *TARGET, *SUBJECT, *TRUTH, *REPHRASE, *PROBES, *HALLUEDIT, "requested_rewrite"}
KEYS |= {name for names in WIKIBIO.values() for name in names}
KEY_OF = {_squashed(name): name for name in KEYS}


def known_name(name: str) -> str:
    """The key that a key or a column means: "Target_new", "Target New" and "targetNew" are target_new."""
    return KEY_OF.get(_squashed(name), name)


def missing(names: Collection[str]) -> list[str]:
    """Of "prompt" and "target_new" what a row or a table with these keys does not have under any of its names."""
    if "requested_rewrite" in names or {"question", "object"} <= set(names):
        return []
    keys = _keys(names)
    return [keys_of[0] for keys_of in (keys[PROMPT], keys[TARGET]) if not any(name in names for name in keys_of)]


def is_known(names: Collection[str]) -> bool:
    """Whether keys are those of a record, a faulty one included."""
    names = [known_name(name) for name in names]
    lacks = missing(names)
    return not lacks or "prompt" in names or "target_new" in names or (len(lacks) == 1 and "concept" in names)


def unread(names: Collection[str]) -> str:
    """What the keys of no record are known as, and that it is not read; "" where they are known as nothing."""
    known = next((title for title, keys in UNREAD.items() if keys <= set(names)), None)
    return f": {known} is not read" if known else ""


def _keys(names: Collection[str]) -> dict[tuple[str, ...], tuple[str, ...]]:
    is_wikibio = not any(name in names for name in PROMPT) and ("text" in names or "labels" in names)
    return {name: WIKIBIO.get(name, name) if is_wikibio else name for name in (PROMPT, TARGET, SUBJECT)}


@dataclass(frozen=True)
class Probe:
    """A question that is asked before and after an edit.

    answers: the acceptable ones, at least one; the first is the main one, which EasyEdit scores
    """

    prompt: str
    answers: list[str]


Axes = dict[str, list[Probe]]


@dataclass
class Row:
    """One row of a file. place: what messages call it. notes: what its reader should know, without the place."""

    place: str
    notes: list[str] = field(default_factory=list)
    filled: int = 0

    def facts(self, raw: Any) -> list[dict[str, Any]]:
        """The fields of a Record for each fact of a row: one, none (zsRE's without `alt`), or MQuAKE's several."""
        if not isinstance(raw, dict):
            raise self.error("", f"{described(raw)}; give an object with prompt and target_new")
        raw = self._with_known_keys(raw)
        if not is_known(raw):
            keys = ", ".join(map(str, raw))
            raise self.error("", f"the keys {keys:.80}{unread(raw) or ' are of no format'}; give {FORMATS}")
        self._note_missing_values(raw)
        rewrites = raw.get("requested_rewrite")
        if isinstance(rewrites, list):
            if not rewrites:
                raise self.error("requested_rewrite", "empty; give at least one fact")
            keys = [f"requested_rewrite[{number}]." for number in range(len(rewrites))]
            facts = [self._rewrite(rewrite, key) for rewrite, key in zip(rewrites, keys)]
            self._add_probes(facts[-1], raw)  # they follow from all facts of the case
            return facts
        if rewrites is not None:
            fact = self._rewrite(rewrites, "requested_rewrite.")
            fact["rephrase_prompts"] = self._questions(raw, REPHRASE, "", fact["subject"]) + fact["rephrase_prompts"]
        elif "question" in raw and "object" in raw:
            return [self._halluedit(raw)]
        elif "src" in raw and raw.get("alt") == "":
            self.notes.append("alt: empty: left out, as EasyEdit does")
            return []
        else:
            fact = self._fact(raw, "")
        self._add_probes(fact, raw)
        return [fact]

    # ---- formats ----

    def _fact(self, raw: dict, key: str) -> dict[str, Any]:
        """Everything but the probes, from any of the names that the formats have for it."""
        keys = _keys(raw)
        name, subject = _first(raw, keys[SUBJECT])
        subject = self._optional_text(subject, f"{key}{name}")
        name, prompt = _first(raw, keys[PROMPT])
        prompt = self._question(prompt, f"{key}{name}", subject)
        name, targets = _first(raw, keys[TARGET])
        if isinstance(targets, list | dict):
            targets = (self._answers(targets, f"{key}{name}") or [None])[0]
        truth_name, truth = _first(raw, TRUTH)
        return {
            "subject": subject,
            "prompt": prompt,
            "target_new": self._text(targets, f"{key}{name}"),
            "ground_truth": self._answers(truth, f"{key}{truth_name}"),
            "rephrase_prompts": self._questions(raw, REPHRASE, key, subject),
            "portability": {},
            "locality": {},
        }

    def _rewrite(self, rewrite: Any, key: str) -> dict[str, Any]:
        """A fact as ROME nests it; MQuAKE's has its prompt as a question, too."""
        rewrite = self._object(rewrite, key.rstrip("."))
        fact = self._fact(rewrite, key)
        fact["rephrase_prompts"] += self._questions(rewrite, ("question",), key, fact["subject"])
        return fact

    def _halluedit(self, raw: dict) -> dict[str, Any]:
        names = {"question": "prompt", "object": "target_new", "paraphrased_question": "rephrase_prompt"}
        fact = self._fact({new: raw.get(old) for old, new in names.items()} | {"subject": raw.get("subject")}, "")
        choices = raw.get("multiple_choice_with_letters")
        asked = [
            ("yes_no", raw.get("yes_question"), "Yes"),
            ("yes_no", raw.get("no_question"), "No"),
            ("multiple_choice", choices and f"{raw['question']} {choices}", raw.get("multiple_choice_labels")),
            ("reversed", raw.get("reversed_relation_question"), fact["subject"]),
        ]
        asked += [
            (f"{hops}_hop", raw.get(f"question_{hops}hop"), raw.get(f"answer_{hops}hop")) for hops in range(2, 7)
        ]
        for axis, prompt, answer in asked:
            self._add(fact, "portability", axis, prompt, answer)
        self._add(fact, "locality", NEIGHBORHOOD, raw.get("locality_question"), ANY_ANSWER)
        return fact

    def _add_probes(self, fact: dict[str, Any], raw: dict) -> None:
        """The probes of all formats but HalluEditBench."""
        subject = fact["subject"]
        for name, axis in (("portability", "portability"), ("locality", NEIGHBORHOOD)):
            fact[name] |= self._axes(raw.get(name), name, axis, subject)
        hops = raw.get("new_single_hops") or raw.get("single_hops")
        axis = f"{len(hops)}_hop" if isinstance(hops, list) else "multi_hop"
        for number, question in enumerate(self._list(raw.get("questions"), "questions")):
            answers = [raw.get("new_answer"), raw.get("new_answer_alias")]
            self._add(fact, "portability", axis, question, answers, f"questions[{number}]")
        self._add(fact, "portability", "personas", raw.get("personas"), fact["target_new"], "personas")
        self._add(fact, "portability", "mhop", raw.get("mhop"), raw.get("mhop_ans"), "mhop")
        for prompt, truth in (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans")):
            if raw.get(prompt) is not None and not self._answers(raw.get(truth), truth):
                raise self.error(truth, f"missing; give the answer to {prompt}")
            self._add(fact, "locality", NEIGHBORHOOD, raw.get(prompt), raw.get(truth), prompt)
        for number, entry in enumerate(self._list(raw.get("neighborhood_prompts"), "neighborhood_prompts")):
            key, truth = f"neighborhood_prompts[{number}]", fact["ground_truth"][:1] or ANY_ANSWER
            if isinstance(entry, dict):
                fact["locality"].setdefault(NEIGHBORHOOD, []).extend(self._probes_of_entry(entry, key, subject))
            else:
                self._add(fact, "locality", NEIGHBORHOOD, entry, truth, key)

    def _add(self, fact: dict[str, Any], part: str, axis: str, prompt: Any, truth: Any, key: str = "") -> None:
        """Add a probe, unless it has no question or, as some of KnowEdit's, no answer."""
        key = key or axis
        if prompt not in (None, "") and (answers := self._answers(truth, key)):
            fact[part].setdefault(axis, []).append(Probe(self._question(prompt, key, fact["subject"]), answers))

    def _axes(self, value: Any, key: str, unnamed: str, subject: str | None) -> Axes:
        """KnowEdit's probes: axis -> list of {prompt, ground_truth}, where axis, list and all of it may be null.

        A list without an axis, as QAEdit and CKnowEdit have it, gets `unnamed`. EasyEdit's zsRE and CounterFact with
        portability have one question by GPT-4, which EasyEdit calls "one_hop".
        """
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            value = {unnamed: value}
        axes = {}
        for axis, entries in ({} if value is None else self._object(value, key)).items():
            if axis == "New Question":
                axis, entries = "one_hop", [{"prompt": entries, "ground_truth": value.get("New Answer")}]
            elif "New Question" in value:
                continue
            if isinstance(entries, dict):
                entries = [entries]
            if not isinstance(entries, list | None):
                raise self.error(f"{key}.{axis}", f"{described(entries)}; give a list of prompt and ground_truth")
            found = []
            for number, entry in enumerate(entries or []):
                found += self._probes_of_entry(entry, f"{key}.{axis}[{number}]", subject)
            if found:
                axes[axis] = found
        return axes

    def _probes_of_entry(self, entry: Any, key: str, subject: str | None) -> Iterator[Probe]:
        """One probe, or several where `prompt` and `ground_truth` are lists side by side, as EasyEdit's editors take."""
        entry = self._object(entry, key)
        name, prompts = _first(entry, ("prompt", "loc", "question"))
        truth_name, truths = _first(entry, ("ground_truth", "loc_ans", "answer", "target"))
        if not isinstance(prompts, list):
            prompts, truths = [prompts], [truths]
        elif not isinstance(truths, list) or len(truths) != len(prompts):
            raise self.error(f"{key}.{truth_name}", "give a list with one answer for each of the prompts")
        for prompt, truth in zip(prompts, truths):
            if answers := self._answers(truth, f"{key}.{truth_name}"):
                yield Probe(self._question(prompt, f"{key}.{name}", subject), answers)

    # ---- values ----

    def error(self, key: str, message: str) -> MM4KEError:
        return MM4KEError(": ".join(part for part in (self.place, key, message) if part))

    def _with_known_keys(self, raw: dict) -> dict:
        known: dict[str, Any] = {}
        for key, value in raw.items():
            name = known_name(key)
            if name in known:
                raise self.error(key, f"the record has {name} already; keep one of them")
            known[name] = value
        return known

    def _note_missing_values(self, raw: dict) -> None:
        for key, value in raw.items():
            if key in KEYS and isinstance(value, str) and value.strip() in MISSING:
                self.notes.append(
                    f"{key}: {value.strip()!r} is taken as text; leave it empty if it stands for nothing"
                )

    def _question(self, value: Any, key: str, subject: str | None) -> str:
        """A prompt, with the subject in the place of `{}`; `{{}}` stands for braces that are meant."""
        text = self._text(value, key)
        if not BRACES.search(text):
            return text
        places = [match[0] for match in BRACES.finditer(text) if not match[1]]
        if places and subject is None:
            raise self.error(
                key, f"{text!r:.80} has {places[0]} and the record no subject for its place; give it, "
                "or write {{}} for braces that are meant"
            )  # fmt: skip
        if places and re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", BRACES.sub("", text), re.IGNORECASE):
            raise self.error(
                key, f"{text!r:.80} has {places[0]} and its subject {subject!r:.40} as well; put the subject into its "
                "place yourself, or write {{}} for braces that are meant"
            )  # fmt: skip
        self.filled += bool(places)
        return BRACES.sub(lambda match: match[1] or subject, text)

    def _questions(self, raw: dict, names: tuple[str, ...], key: str, subject: str | None) -> list[str]:
        name, value = _first(raw, names)
        texts = self._answers(value, f"{key}{name}")
        return [self._question(text, f"{key}{name}", subject) for text in dict.fromkeys(texts)]

    def _list(self, value: Any, key: str) -> list:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list | None):
            raise self.error(key, f"{described(value)}; give a list")
        return value or []

    def _answers(self, value: Any, key: str) -> list[str]:
        """The texts in a text, in ROME's {"str": ...}, or in lists nested to any depth, without the empty ones."""
        if isinstance(value, list):
            return [answer for entry in value for answer in self._answers(entry, key)]
        if isinstance(value, dict):
            return [self._text(value.get("str"), f"{key}.str")]
        if value is None or value == "" or (isinstance(value, str) and value.isspace()):
            return []
        return [self._text(value, key)]

    def _optional_text(self, value: Any, key: str) -> str | None:
        return None if value is None or value == "" else self._text(value, key)

    def _text(self, value: Any, key: str) -> str:
        if value is None:
            raise self.error(key, "missing; give it as a string")
        if not isinstance(value, str):
            raise self.error(key, f"{described(value)}; give it as a string")
        if not (text := value.strip()):
            raise self.error(key, "empty; give it as a string")
        if any("\ud800" <= char <= "\udfff" for char in text):  # JSON can spell half a character, no tokenizer can
            raise self.error(key, f"{text!a:.80} has half of a surrogate pair; give valid Unicode")
        return text

    def _object(self, value: Any, key: str) -> dict:
        if not isinstance(value, dict):
            raise self.error(key, f"{'missing' if value is None else described(value)}; give an object")
        return value


# What pandas, and those who write tables with it, take for a missing value.
MISSING = {"#N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


def _first(raw: dict, names: tuple[str, ...]) -> tuple[str, Any]:
    """(name, value) of the first name that has a value, else the first name and what it has."""
    found = next((name for name in names if raw.get(name) not in (None, "")), names[0])
    return found, raw.get(found)


def described(value: Any) -> str:
    """A value as a message shows it: short, in JSON's words."""
    kind = {list: "a list", dict: "an object", str: "a string", bool: "a truth value"}.get(type(value), "a number")
    return "null" if value is None else f"{json.dumps(value)[:60]} is {kind}"
