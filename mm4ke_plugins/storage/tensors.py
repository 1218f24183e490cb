"""What one asks of a tensor: is it equal to another, is it finite, what are its bits, its hash, its dtype's name.

On whatever device the tensor is, and a piece at a time where that spares a copy of a large one.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

from ..errors import MM4KEError

# What safetensors calls the dtypes, in the order in which a file has tensors of them: the widest first, so that every
# tensor is aligned.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Those that a model is edited and merged in: the integers of the same width, and the dtypes by what torch calls them.
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in BITS}
# Entries that a CPU works on at once: few enough to stay in its cache from one operation to the next.
CHUNK = 1 << 17


def pieces(flat: torch.Tensor) -> Sequence[torch.Tensor]:
    """A tensor of one dimension in pieces: many for a CPU's cache, one for a GPU."""
    return flat.split(CHUNK) if flat.device.type == "cpu" else (flat,)


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, whatever their dtypes."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    pairs = zip(pieces(first.reshape(-1)), pieces(second.reshape(-1)), strict=True)
    return all(torch.equal(part.to(dtype), other.to(dtype)) for part, other in pairs)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite. `tensor`: floating point of 16 bits or more."""
    # A NaN or an infinite number always shows in the sum, which is the fastest to take; so may finite but large ones.
    # The extremes show a NaN as well, and need neither a copy nor a mask as isfinite().all() does.
    return math.isfinite(tensor.sum()) or all(extreme.isfinite() for extreme in tensor.aminmax())


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise MM4KEError for a NaN or infinite entry. `name`: what the error calls the tensor."""
    if not is_finite(tensor):
        found = "NaN" if tensor.isnan().any() else "an infinite number"
        raise MM4KEError(f"{name}: holds {found}; numbers like this can't be merged, train or copy it again")


def bits_of(tensor: torch.Tensor, dtype: torch.dtype, copy: bool = False) -> torch.Tensor:
    """The bits of a tensor's numbers as flat integers, after a cast to `dtype`; a view where `copy` allows it."""
    return tensor.detach().to(dtype, copy=copy).contiguous().reshape(-1).view(BITS[dtype])


def identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; where they have one dtype, the same bits."""
    if first.dtype == second.dtype in BITS:
        return torch.equal(bits_of(first, first.dtype), bits_of(second, second.dtype))
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(dtype), second.to(dtype))


def tensor_sha256(tensor: torch.Tensor) -> str:
    """The hash of a tensor's dtype, shape and bytes in row-major order, on whatever device it is."""
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """As torch and config.json call it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[int]) -> str:
    """A shape as messages show it, such as "576x1536"."""
    return "x".join(map(str, shape)) or "a single number"
