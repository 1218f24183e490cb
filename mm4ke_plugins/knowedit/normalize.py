"""Whether two texts say the same but for spelling: strictly, of facts, and as the literature does, of a model's answers.

`normalize_answer` is SQuAD's, and drops whatever is ASCII punctuation: "C#" is "C". For a score it has to be what others
have used. `normalize` tells which facts are taught twice, and is all the rest of this module.

Another case, other white space, another form of the same character (Unicode's NFKC: full-width, ligatures, units) and
the punctuation of sentences make no other question: "Who leads X?" is "who leads “X” ？" is "WHO LEADS X". Punctuation
that means something stays:

    symbols          C++, A+, 5 °C, $5, and # % & * @ / \\ _ § anywhere: C#, 5%, AT&T
    inside a word    1.5, 10:30, 1914-1918, f(x; but O'Brien is O’Brien is OBrien, and well-known is well known
    before a word    -1, .5, .NET; after it the minus of A-, and the factorial of "What is 5!?"
    alone            "What does {} do?", "What does ? match?", and the empty pair of print()
    superscripts     5² is not 52

In doubt two texts are different: a fact that is asked twice costs less than one that is lost.
"""

import re
import string
import unicodedata

SUPERSCRIPTS = re.compile("[\u2070-\u207f\u00b9\u00b2\u00b3]+")
# Quotes and apostrophes that NFKC or their category (a letter, a symbol) would hide.
SAME = str.maketrans(dict.fromkeys("\u02bc\u02b9\u0060\u00b4\u2018\u2019\u201b", "'") | {"\u2212": "-"})
# What Unicode counts as punctuation, and no sentence needs.
MEANT = set("#%&*@/\\_§¶†‡′″‴‵‰")
# What stands between spaces without being what is talked of.
SET_APART = {"-", *"«»“”„‹›"}
EMPTY_PAIR = re.compile(r"\(\)|\[\]|\{\}")
ABBREVIATION = re.compile(r"\b[^\W\d_](?:(?:\.[^\W\d_])+\.|(?:\.[^\W\d_]){2,}\b)")
CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
MARK_BESIDE_CJK = re.compile(rf"(?<=[{CJK}])\W|\W(?=[{CJK}])")
APOSTROPHE = re.compile(r"(?<=[^\W_])'(?=[^\W_])")
# At least on one side a letter; what stands beside Chinese was looked at before.
BETWEEN_LETTERS = re.compile(
    rf"(?<![{CJK}])(?:(?<=[^\W_])[-,;\"“”«»](?=[^\W\d_])|(?<=[^\W\d_])[-,;\"“”«»](?=[^\W_]))(?![{CJK}])"
)
SPACE_BESIDE_CJK = re.compile(rf"(?<=[{CJK}])\s+|\s+(?=[{CJK}])")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without a, an and the, with single spaces: SQuAD's normalization."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalize(text: str) -> str:
    """The text without what people write differently without meaning it; the text itself where nothing is left."""
    text = SUPERSCRIPTS.sub(lambda match: f"^{match[0]}", text).translate(SAME)
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(_dash_or_nothing(char) for char in unicodedata.normalize("NFKC", text))
    text = ABBREVIATION.sub(lambda match: match[0].replace(".", ""), text)
    text = MARK_BESIDE_CJK.sub(_space_for_mark, text)
    words = [word for word in text.split() if word not in SET_APART]
    count = len(words)
    while words and all(map(_is_mark, words[-1])) and not EMPTY_PAIR.search(words[-1]):
        words.pop()
    cleaned = [_word(word, is_last=place == count - 1) for place, word in enumerate(words)]
    return SPACE_BESIDE_CJK.sub("", " ".join(" ".join(cleaned).split())) or text


def _dash_or_nothing(char: str) -> str:
    """All dashes as one; nothing for characters that are not seen, such as a zero-width space."""
    category = unicodedata.category(char)
    if category == "Pd":
        return "-"
    return "" if category == "Cf" or "\ufe00" <= char <= "\ufe0f" else char


def _is_mark(char: str) -> bool:
    return unicodedata.category(char).startswith("P") and char not in MEANT


def _space_for_mark(match: re.Match) -> str:
    """Beside Chinese and Japanese characters punctuation needs no space, and says what a space would."""
    mark, text, place = match[0], match.string, match.start()
    if mark in "-.":  # 是-5, A-型
        is_meant = any(char.isalnum() and not re.match(f"[{CJK}]", char) for char in text[place - 1 : place + 2])
    else:
        is_meant = EMPTY_PAIR.match(text, place) or (place and EMPTY_PAIR.match(text, place - 1))
    return " " if _is_mark(mark) and not is_meant else mark


def _word(word: str, is_last: bool) -> str:
    """A part of the text without white space, without the marks of the sentence around and between its letters."""
    if not any(char.isalnum() for char in word):
        return word  # what is talked of
    start, end = 0, len(word)
    while _is_mark(word[start]) and not _is_meant(word, start, is_last):
        start += 1
    while _is_mark(word[end - 1]) and not _is_meant(word[:end], end - 1, is_last and end == len(word)):
        end -= 1
    word = word[start:end]
    return BETWEEN_LETTERS.sub(" ", APOSTROPHE.sub("", word))


def _is_meant(word: str, place: int, is_last: bool) -> bool:
    """Whether the mark at the start or the end of a word is a part of what it says."""
    mark, before, after = word[place], word[place - 1 : place], word[place + 1 : place + 2]
    if place == len(word) - 1:  # A-, print(), and 5! where more follows
        empty = EMPTY_PAIR.fullmatch(word[-2:])
        return bool(empty) or (mark == "-" and before.isalnum()) or (mark == "!" and before.isdigit() and not is_last)
    return bool(EMPTY_PAIR.match(word, place)) or (mark in "-." and after.isalnum() and before != mark)
