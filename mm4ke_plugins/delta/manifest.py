"""What a knowledge delta's file says of itself: the manifest, JSON in the file's metadata.

A delta may come from a stranger, so every entry is checked when it is read: unknown keys, numbers out of
range, text that would steer a terminal.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .. import __version__
from ..storage.tensors import FLOATS

# The upper ends of the histogram's classes of |difference|; the last class is open.
MAGNITUDES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def _printable(text: str) -> str:
    # A terminal would obey control characters.
    if not text.isprintable():
        raise ValueError("control characters are not allowed")
    return text


Name = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_printable)]
Line = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=1 << 48)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Scalar = bool | int | Annotated[float, Field(allow_inf_nan=False)] | Line | None


class Strict(BaseModel):
    """A part of the manifest. Nothing is converted, and nothing is there that isn't declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorInfo(Strict):
    """One changed tensor.

    base_sha256:    of the base's tensor, as `tensor_sha256` takes it
    count:          how many entries are kept
    norm:           the Frobenius norm of edited - base, float32; base_norm: that of the base
    magnitudes:     how many kept entries have |edited - base| below each of MAGNITUDES (and not in an earlier class)
    """

    shape: Annotated[list[Size], Field(max_length=8)]
    base_dtype: Literal["float32", "bfloat16", "float16"]
    edited_dtype: Literal["float32", "bfloat16", "float16"]
    base_sha256: Sha256
    positions: Literal["all", "bitmap", "gaps"]
    count: Size
    norm: Measure
    base_norm: Measure
    magnitudes: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(min_length=len(MAGNITUDES) + 1, max_length=len(MAGNITUDES) + 1)
    ]

    @property
    def numel(self) -> int:
        """How many entries the tensor has, kept or not."""
        return math.prod(self.shape)

    @property
    def common_dtype(self) -> torch.dtype:
        """The dtype of which the steps are: both the base's and the edited numbers fit into it."""
        return torch.promote_types(FLOATS[self.base_dtype], FLOATS[self.edited_dtype])


class Applied(Strict):
    """What a finished delta was made with; 1 and 1 is an edited model as it was."""

    weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
    density: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class UntiedHead(Strict):
    """What an edit made of a base that ties two tensors, when they became two.

    name:      the one of the delta that is its own now, as a rule the output head; its `base_sha256` is the tied one's
    embedding: the base's tensor that it was tied to
    stored:    whether the base's files have it all the same
    ties:      what the base's config.json says of tying, at every place where it does
    """

    name: Name
    embedding: Name
    stored: bool
    ties: Annotated[list[bool], Field(max_length=8)]


class Manifest(Strict):
    """What is known of a delta besides its numbers.

    architecture: the class in the base's config.json; empty where not known
    applied:      None in an unfinished delta
    recipe:       the settings that it was trained with; facts: how many it was trained on. Both None if not known
    created:      ISO 8601, in UTC
    untied_head:  None unless the edit unties what the base ties
    """

    format: Literal[1] = 1
    mm4ke_version: Line = __version__
    created: Line
    architecture: Line
    applied: Applied | None
    recipe: dict[Name, Scalar | list[Scalar]] | None = None
    facts: Annotated[int, Field(ge=0)] | None = None
    untied_head: UntiedHead | None = None
    tensors: Annotated[dict[Name, TensorInfo], Field(min_length=1)]


def setting(value: Any) -> Any:
    """A recipe's value as a manifest may hold it."""
    if isinstance(value, (list, tuple)):
        return [setting(entry) if isinstance(entry, (bool, int, float, str)) else line(entry) for entry in value]
    if value is None or isinstance(value, (bool, int)) or isinstance(value, float) and math.isfinite(value):
        return value
    return line(value)


def line(value: Any) -> str:
    """A text that is safe to print, of whatever a stranger wrote."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))[:500]
