"""The names that LLaMA-Factory has for chat formats."""

from difflib import get_close_matches

from llamafactory.data.template import TEMPLATES

from ...errors import MM4KEError


def require_template(name: str, option: str) -> None:
    """Refuse what is no name of a chat format, with the names that are most like it. `option` is what it came from."""
    if name in TEMPLATES:
        return
    close = get_close_matches(name.lower(), TEMPLATES, n=3)
    others = (
        f"did you mean {' or '.join(close)}?" if close else "there are smollm2, qwen, llama3, gemma and many more;"
    )
    raise MM4KEError(
        f"{option}: LLaMA-Factory knows no chat format of this name; {others} Give the one that the model was made for, "
        "or empty for a base model without one"
    )
