"""Equations 5 and 6 against a transcription in float64 that sorts."""

import pytest
import torch
from paper import assert_within_one_rounding, reference_mask

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.merging.equations import merge
from mm4ke_plugins.merging.top_p import top_p_by_sorting, top_p_mask
from mm4ke_plugins.storage.tensors import CHUNK


def pair(shape, dtype=torch.float32, edited_dtype=None, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    change = torch.randn(shape, generator=generator) * 1e-3
    return base, (base.float() + change).to(edited_dtype or dtype)


def merge_one(base, edited, weight, density, **options):
    return merge(base, [edited], [weight], [density], names=["base", "edited"], **options)


DENSITIES = [0, 0.0001, 0.2, 0.5, 0.8, 0.9999, 1]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask_is_that_of_a_stable_sort(dtype, density):
    base, edited = pair((96, 173), dtype)
    delta = edited.float() - base.float()
    mask = top_p_mask(delta, density)
    assert mask.sum() == round(density * delta.numel())
    assert torch.equal(mask, reference_mask(delta, density))


def test_bfloat16_deltas_are_full_of_ties():
    """Without this the test above would not test ties, where `>= threshold` keeps too many entries."""
    base, edited = pair((96, 173), torch.bfloat16)
    delta = (edited.float() - base.float()).abs()
    threshold = delta.flatten().sort(descending=True).values[round(0.5 * delta.numel())]
    assert (delta == threshold).sum() > 20


@pytest.mark.parametrize("delta", [torch.ones(7, 9), -torch.ones(7, 9), torch.zeros(7, 9)])
def test_of_equal_entries_the_first_are_kept(delta):
    mask = top_p_mask(delta, 0.3)
    assert mask.flatten().tolist() == [True] * round(0.3 * 63) + [False] * (63 - round(0.3 * 63))


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1.0, 3e38])
def test_mask_of_neighbouring_floats(value):
    """Numbers that differ in their last bits only, from the smallest denormal to nearly the largest float."""
    steps = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    delta = (torch.tensor(value).view(torch.int32) + steps).view(torch.float32) * (1 - 2 * (steps % 2))
    assert torch.equal(top_p_mask(delta, 0.42), steps >= 50 - 21)


MISLEADING = {
    "sample too small": lambda index: (index % 64 != 0) * 1.0 + (index % 7) * 1e-3,
    "sample too large": lambda index: (index % 64 == 0) * 1.0 + (index % 7) * 1e-3,
    "sample all equal": lambda index: (index % 64 != 0) * (1.0 + index * 1e-6),
    "sorted": lambda index: index * 1.0,
    "two values": lambda index: (index % 3 == 0) * 1.0,
}


@pytest.mark.parametrize("density", [0.01, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("values", MISLEADING.values(), ids=MISLEADING)
def test_mask_of_entries_of_which_a_sample_misleads(values, density):
    """The sample is every 64th entry. Several chunks, the last of which is shorter."""
    delta = values(torch.arange(3 * CHUNK + 1000)).float().view(-1, 1)
    assert torch.equal(top_p_mask(delta, density), reference_mask(delta, density))


def random_delta(seed: int) -> torch.Tensor:
    """Of a random dtype, shape, scale and share of zeros; with many ties, signed zeros and denormals among them."""
    generator = torch.Generator().manual_seed(seed)

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    shape = one_of((1, 1), (1, 7), (64, 3), (40, 97), (3, 50, 11), (0, 4), (CHUNK // 500 + 1, 511))
    values = torch.randn(shape, generator=generator)
    if steps := one_of(0, 0, 1, 4, 100):
        values = (values * steps).round() / steps  # rounded to zero, they keep their signs
    values *= one_of(1.0, 1e-3, 1e-39, 3e-45, 1e30)
    values *= torch.rand(shape, generator=generator) < one_of(1.0, 0.5, 0.01)
    values = values.to(one_of(torch.float32, torch.bfloat16, torch.float16)).nan_to_num()
    return values.mT if one_of(False, True) else values


@pytest.mark.parametrize("seed", range(0, 1000, 50))
def test_mask_is_that_of_the_specification(seed):
    for number in range(seed, seed + 50):
        delta = random_delta(number)
        for density in (number % 101 / 100, 0.8, 1e-3):
            assert torch.equal(top_p_mask(delta, density), top_p_by_sorting(delta, density)), (number, density)


def test_the_random_deltas_are_of_all_kinds():
    """Without this the test above might not test what it says."""
    deltas = [random_delta(number) for number in range(100)]
    assert {delta.dtype for delta in deltas} == {torch.float32, torch.bfloat16, torch.float16}
    tiny = torch.finfo(torch.float32).tiny
    kinds = {
        "ties": lambda delta: len(delta.abs().unique()) < delta.numel() / 2,
        "denormal": lambda delta: ((delta.float().abs() < tiny) & (delta != 0)).any(),
        "negative zero": lambda delta: ((delta == 0) & delta.signbit()).any(),
        "no entry": lambda delta: not delta.numel(),
        "not contiguous": lambda delta: not delta.is_contiguous(),
        "several pieces": lambda delta: delta.numel() > CHUNK,
    }
    assert not [kind for kind, is_of_kind in kinds.items() if sum(bool(is_of_kind(delta)) for delta in deltas) < 3]


def test_half_an_entry_is_rounded_to_the_even_number():
    assert top_p_mask(torch.rand(1, 5), 0.5).sum() == 2
    assert top_p_mask(torch.rand(1, 7), 0.5).sum() == 4


def test_mask_of_a_transposed_tensor_is_in_row_major_order():
    base, edited = pair((40, 30), torch.bfloat16)
    delta = (edited.float() - base.float()).T
    assert torch.equal(top_p_mask(delta, 0.5), reference_mask(delta, 0.5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_is_the_same_on_a_gpu(dtype):
    base, edited = pair((1024, 777), dtype)
    delta = edited.float() - base.float()
    for density in DENSITIES:
        assert torch.equal(top_p_mask(delta.cuda(), density).cpu(), top_p_mask(delta, density))


@pytest.mark.parametrize("density", [-0.1, 1.1, 20, float("nan")])
def test_density_out_of_range(density):
    with pytest.raises(MM4KEError, match="density: .*: give a share from 0 to 1"):
        top_p_mask(torch.rand(3, 3), density)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weight", [0.8, 1.0, 1.5, -1.0])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_merge_is_equation_6_rounded_once(dtypes, weight, density):
    base, edited = pair((64, 97), *dtypes)
    merged = merge_one(base, edited, weight, density)
    assert merged.dtype == base.dtype and merged.shape == base.shape
    assert_within_one_rounding(merged, base, [edited], [weight], [density])
    assert density == 0 or not torch.equal(merged, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_result_dtype(dtype):
    base, edited = pair((64, 97), torch.bfloat16, torch.float32)
    merged = merge_one(base, edited, 0.8, 0.8, dtype=dtype)
    assert merged.dtype == dtype
    assert_within_one_rounding(merged, base, [edited], [0.8], [0.8])


def test_deltas_of_several_models_add_up():
    base, first = pair((64, 97))
    second = pair((64, 97), seed=1)[1] - pair((64, 97), seed=1)[0] + base
    merged = merge(base, [first, second], [0.8, -0.5], [0.2, 0.6], names=["base", "first", "second"])
    assert_within_one_rounding(merged, base, [first, second], [0.8, -0.5], [0.2, 0.6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_of_several_chunks(dtype):
    """Ties are taken from the first chunks only, of which there are three and a half."""
    base, edited = pair((7, CHUNK // 2), dtype)
    merged = merge_one(base, edited, 0.8, 0.3)
    assert_within_one_rounding(merged, base, [edited], [0.8], [0.3])
    assert torch.equal(merge_one(base.T, edited.T, 0.8, 1).T, merge_one(base, edited, 0.8, 1))


@pytest.mark.parametrize("shape", [(), (1,), (50,)])
def test_vectors_are_kept_whole(shape):
    base, edited = pair(shape)
    assert torch.allclose(merge_one(base, edited, 0.5, 0.01), (base + edited) / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("edited_dtype", [torch.bfloat16, torch.float32])
def test_an_unchanged_tensor_is_passed_through(edited_dtype):
    base = pair((64, 97), torch.bfloat16)[0]
    assert merge_one(base, base.to(edited_dtype, copy=True), 0.8, 0.8) is base


def test_weight_zero_leaves_a_tensor_out():
    base, edited = pair((64, 97))
    assert merge_one(base, edited, 0, 0.8) is base


def test_inputs_are_not_modified():
    base, edited = pair((64, 97))
    before = base.clone(), edited.clone()
    merge_one(base, edited, 0.8, 0.8)
    assert torch.equal(base, before[0]) and torch.equal(edited, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value, word", [("nan", "NaN"), ("inf", "infinite"), ("-inf", "infinite")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_not_a_number_in_any_input(place, value, word, dtype):
    """Also where base and edited agree on it, and where the weight is 0."""
    tensors = [pair((8, 9), dtype, seed=seed)[0] for seed in range(3)]
    tensors[place][3, 4] = float(value)
    with pytest.raises(MM4KEError, match=f"^name{place}: holds .*{word}"):
        merge(tensors[0], tensors[1:], [0.8, 0], [0.8, 0.8], names=["name0", "name1", "name2"])


def test_an_infinite_number_that_base_and_edited_share():
    base = torch.full((3, 3), float("inf"))
    with pytest.raises(MM4KEError, match="^base: holds an infinite number"):
        merge_one(base, base.clone(), 0.8, 0.8)
