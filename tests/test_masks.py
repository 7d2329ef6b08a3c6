"""Masks: every constructor against a plain loop, the algebra against dense matrices, and no value read on the host."""

import itertools
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import Tensor

from crossattn_kernels import Mask
from crossattn_kernels.problem import canonical

B, H, M, N = 2, 2, 5, 7


def bits(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


LENGTHS, LONG = [3, 0], [N + 4, 1]
KEEP, PER_QUERY, PER_HEAD, COARSE, TALL, BLOCKS = (
    bits(*shape, seed=i) for i, shape in enumerate([(B, N), (M, N), (H, M, 2), (B, 1, 3, 2), (B, 1, 3, 1), (2, 2)])
)
ODD_KEYS = torch.arange(N)[None] % 2 == 1
CU_Q, CU_K = [0, 2, 2, 4], [0, 3, 4, N]
LOCATIONS = [[False, True, False, True, True], [True, False, False, False, True]]


def in_segment(cu_q: list[int], cu_k: list[int], i: int, j: int) -> bool:
    return any(cu_q[s] <= i < cu_q[s + 1] and cu_k[s] <= j < cu_k[s + 1] for s in range(len(cu_q) - 1))


def sees_media(locations: list[bool], tokens: int, latest: bool, i: int, j: int) -> bool:
    before = [m for m, at in enumerate(i for i, mentioned in enumerate(locations) if mentioned) if at <= i]
    return j // tokens in (before[-1:] if latest else before)


# name: (constructor on a device, what query i of head h of entry b may see)
MASKS = {
    "nothing said": (lambda d: Mask(), lambda b, h, i, j: True),
    "lengths": (lambda d: Mask.lengths(torch.tensor(LENGTHS, device=d)), lambda b, h, i, j: j < LENGTHS[b]),
    "lengths past N": (lambda d: Mask.lengths(torch.tensor(LONG, device=d)), lambda b, h, i, j: j < LONG[b]),
    "key_padding": (lambda d: Mask.key_padding(KEEP.to(d)), lambda b, h, i, j: KEEP[b, j]),
    "key_padding of all": (lambda d: Mask.key_padding(ODD_KEYS.to(d)), lambda b, h, i, j: ODD_KEYS[0, j]),
    "packed": (
        lambda d: Mask.packed(torch.tensor(CU_Q, device=d), torch.tensor(CU_K, device=d), M),
        lambda b, h, i, j: in_segment(CU_Q, CU_K, i, j),
    ),
    "media latest": (
        lambda d: Mask.media(torch.tensor(LOCATIONS, device=d), 2),
        lambda b, h, i, j: sees_media(LOCATIONS[b], 2, True, i, j),
    ),
    "media all": (
        lambda d: Mask.media(torch.tensor(LOCATIONS, device=d), 2, latest=False),
        lambda b, h, i, j: sees_media(LOCATIONS[b], 2, False, i, j),
    ),
    "groups dense": (lambda d: Mask.groups(PER_QUERY.to(d)), lambda b, h, i, j: PER_QUERY[i, j]),
    "groups (1, 4) by head": (
        lambda d: Mask.groups(PER_HEAD.to(d), 1, 4),
        lambda b, h, i, j: PER_HEAD[h, i, j // 4],
    ),
    "groups (2, 4) by batch": (
        lambda d: Mask.groups(COARSE.to(d), 2, 4),
        lambda b, h, i, j: COARSE[b, 0, i // 2, j // 4],
    ),
    "groups all keys": (lambda d: Mask.groups(TALL.to(d), 2, 1), lambda b, h, i, j: TALL[b, 0, i // 2, 0]),
    "groups all queries": (lambda d: Mask.groups(KEEP[0].to(d)), lambda b, h, i, j: KEEP[0, j]),
    "blocks": (lambda d: Mask.blocks(BLOCKS.to(d), 4, 4), lambda b, h, i, j: BLOCKS[i // 4, j // 4]),
    "causal top-left": (lambda d: Mask.causal(M, N, device=d), lambda b, h, i, j: j <= i),
    "causal bottom-right": (lambda d: Mask.causal(M, N, "bottom-right", d), lambda b, h, i, j: j <= i + N - M),
    "window": (lambda d: Mask.window(M, N, 2, 1, d), lambda b, h, i, j: i - 2 <= j <= i + 1),
    "window left open": (lambda d: Mask.window(M, N, None, -2, d), lambda b, h, i, j: j <= i - 2),
    "window right open": (lambda d: Mask.window(M, N, 1, None, d), lambda b, h, i, j: j >= i - 1),
    "window open": (lambda d: Mask.window(M, N, None, None, d), lambda b, h, i, j: True),
}
by_name = pytest.mark.parametrize("name", MASKS)


def make(name: str, device: str = "cpu") -> Mask:
    return MASKS[name][0](device)


def dense(mask: Mask, rows: int = M, columns: int = N) -> Tensor:
    return mask.as_dense(B, H, rows, columns)


def loop(sees, rows: int = M, columns: int = N) -> Tensor:
    indices = itertools.product(range(B), range(H), range(rows), range(columns))
    return torch.tensor([bool(sees(*index)) for index in indices]).reshape(B, H, rows, columns)


def canonical_dense(mask: Mask) -> Tensor:
    """The mask as the backends get it: through the shape checks of a call."""
    q, k = torch.zeros(B, H, M, 4), torch.zeros(B, H, N, 4)
    x, options = canonical(q, k, k, mask)
    return dense(options.mask(x))


@by_name
def test_constructor_is_its_loop(name):
    expected = loop(MASKS[name][1])
    assert torch.equal(dense(make(name)), expected)
    assert torch.equal(canonical_dense(make(name)), expected)


@pytest.mark.parametrize(("rows", "columns"), [(6, 3), (1, 4), (4, 1), (0, 3), (3, 0)])
@pytest.mark.parametrize("align", ["top-left", "bottom-right"])
def test_causal_of_any_size(align, rows, columns):
    shift = columns - rows if align == "bottom-right" else 0
    expected = loop(lambda b, h, i, j: j <= i + shift, rows, columns)
    assert torch.equal(dense(Mask.causal(rows, columns, align), rows, columns), expected)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "rows"),
    [
        ([0, 0, 2, 4], [0, 3, 5, 7], 4),
        ([0, 2, 2, 4], [0, 3, 5, 7], 4),
        ([0, 2, 4, 4], [0, 3, 5, 7], 4),
        ([0, 1, 2, 4], [0, 0, 5, 7], 4),
        ([0, 1, 2, 4], [0, 5, 5, 7], 4),
        ([0, 1, 2, 4], [0, 5, 7, 7], 4),
        ([0, 0, 0, 3], [0, 4, 4, 7], 3),
        ([0, 2, 4], [0, 3, 5], 7),
        ([0, 2, 2], [0, 3, 7], 4),
        ([0, 0, 0], [0, 3, 7], 2),
        ([0], [0], 2),
    ],
    ids=[
        "no queries first", "no queries middle", "no queries last", "no keys first", "no keys middle", "no keys last",
        "two empty", "rows and keys past the end", "empty last, rows past the end", "no queries at all", "no segments",
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_with_empty_segments(cu_q, cu_k, rows, dtype):
    mask = Mask.packed(torch.tensor(cu_q, dtype=dtype), torch.tensor(cu_k, dtype=dtype), rows)
    expected = loop(lambda b, h, i, j: in_segment(cu_q, cu_k, i, j), rows, 7)
    assert torch.equal(dense(mask, rows, 7), expected)


def test_packed_counts_queries_itself_only_on_the_cpu():
    cu = torch.tensor([0, 2, 5])
    assert Mask.packed(cu, cu).start.shape == (1, 1, 5)
    with pytest.raises(ValueError, match="num_queries"):
        Mask.packed(cu.to("meta"), cu.to("meta"))


@pytest.mark.parametrize("latest", [True, False], ids=["latest", "all"])
@pytest.mark.parametrize(
    ("locations", "columns"),
    [([0, 0, 1, 0, 1], 6), ([1, 0, 0, 0, 0], 6), ([0, 0, 0, 0, 0], 6), ([1, 1, 0, 1, 0], 6), ([1, 1, 0, 1, 0], 7)],
    ids=["text first", "medium first", "no medium", "more media than keys", "a medium cut short"],
)
def test_media(locations, columns, latest):
    mask = Mask.media(torch.tensor([locations] * B), 3, latest)
    expected = loop(lambda b, h, i, j: sees_media([bool(x) for x in locations], 3, latest, i, j), 5, columns)
    assert torch.equal(dense(mask, 5, columns), expected)


@by_name
@pytest.mark.parametrize("other", MASKS)
def test_and_is_the_and_of_dense_matrices(name, other):
    both = make(name) & make(other)
    expected = dense(make(name)) & dense(make(other))
    assert torch.equal(dense(both), expected)
    assert torch.equal(canonical_dense(both), expected)


@pytest.mark.parametrize("axis", ["query", "key"])
@pytest.mark.parametrize(("one", "two"), [*itertools.product([1, 2, 3, 6], repeat=2)])
def test_and_of_groups(one, two, axis):
    """M = 5 and N = 7 are multiples of no group."""
    size, which = {"query": (M, "query_group"), "key": (N, "key_group")}[axis]

    def grouped(group: int, seed: int) -> Mask:
        visible = bits(-(-size // group), seed=seed)
        return Mask.groups(visible if axis == "key" else visible[:, None], **{which: group})

    a, b = grouped(one, 1), grouped(two, 2)
    if max(one, two) % min(one, two) and min(-(-size // one), -(-size // two)) > 1:
        with pytest.raises(ValueError, match=f"{min(one, two)} and {max(one, two)} combine only if one divides"):
            a & b
    else:
        assert torch.equal(canonical_dense(a & b), dense(a) & dense(b))


def test_and_of_groups_for_different_sizes():
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 7\).*\(1, 1, 1, 3\)") as error:
        Mask.groups(bits(7)) & Mask.groups(bits(3), 1, 2)
    assert "\n" not in str(error.value)


def test_and_wants_a_mask():
    with pytest.raises(TypeError):
        Mask() & bits(M, N)


@by_name
@pytest.mark.parametrize(("first", "last"), [(0, N), (0, 3), (2, 6), (3, 5), (4, N), (1, 2), (6, 6)])
def test_slice_keys_is_the_slice(name, first, last):
    mask = make(name)
    assert torch.equal(dense(mask.slice_keys(first, last), M, last - first), dense(mask)[..., first:last])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_slice_keys_of_ranges_in_small_integers(dtype):
    low = torch.tensor([[[0, 100, torch.iinfo(dtype).min, 127]]], dtype=dtype)
    for mask in (Mask(start=low), Mask(end=low)):
        assert torch.equal(dense(mask.slice_keys(200, 300), 4, 100), dense(mask, 4, 300)[..., 200:])


@pytest.mark.parametrize(("first", "last", "group"), [(12, 20, 12), (18, 30, 6), (15, 40, 3), (13, 20, 1), (30, 30, 6)])
def test_slice_keys_keeps_groups_as_large_as_they_may_be(first, last, group):
    mask = Mask.groups(bits(M, 4), 1, 12)
    part = mask.slice_keys(first, last)
    assert part.key_group == group
    assert part.visible.shape[-1] == -(-(last - first) // group)
    assert torch.equal(dense(part, M, last - first), dense(mask, M, 48)[..., first:last])


@by_name
def test_no_value_is_read_on_the_host(name):
    """A meta tensor has no values: reading one raises."""
    mask = make(name, "meta")
    for result in (mask, mask & make("packed", "meta"), mask.slice_keys(1, 4), make(name).to("meta")):
        assert all(t.is_meta for f in fields(result) if isinstance(t := getattr(result, f.name), Tensor))
        result.is_trivial(), result.lead()
    q, k = torch.zeros(B, H, M, 4, device="meta"), torch.zeros(B, H, N, 4, device="meta")
    canonical(q, k, k, mask)


@by_name
def test_a_file_holds_a_mask(name, tmp_path):
    torch.save({"mask": make(name)}, tmp_path / "mask.pt")
    loaded = torch.load(tmp_path / "mask.pt", weights_only=True)["mask"]
    assert isinstance(loaded, Mask) and torch.equal(dense(loaded), dense(make(name)))


def test_frozen():
    mask = Mask.lengths(torch.tensor(LENGTHS))
    for field in fields(mask):
        with pytest.raises(FrozenInstanceError):
            setattr(mask, field.name, None)


@pytest.mark.parametrize(
    ("mask", "lead", "trivial"),
    [
        (Mask(), (1, 1), True),
        (Mask.causal(M, N), (1, 1), False),
        (Mask.lengths(torch.tensor(LENGTHS)), (B, 1), False),
        (Mask.key_padding(KEEP), (B, 1), False),
        (Mask.groups(PER_HEAD, 1, 4), (1, H), False),
        (Mask.groups(PER_HEAD, 1, 4) & Mask.key_padding(KEEP), (B, H), False),
        (Mask.causal(M, N) & Mask.key_padding(KEEP[:0]), (0, 1), False),
    ],
    ids=["none", "range", "range by batch", "keys", "heads", "batch and heads", "B = 0"],
)
def test_lead_and_trivial(mask, lead, trivial):
    assert (mask.lead(), mask.is_trivial()) == (lead, trivial)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Mask.lengths(torch.tensor([1.0])), r"lengths .*\(1,\) of torch.float32"),
        (lambda: Mask.lengths(torch.tensor([True])), r"lengths .*\(1,\) of torch.bool"),
        (lambda: Mask.lengths(torch.tensor([[1, 2]])), r"lengths .*\(1, 2\)"),
        (lambda: Mask.packed(torch.tensor([0, 1]), torch.tensor([0, 1, 2])), r"cu_q and cu_k .*\(2,\) and \(3,\)"),
        (lambda: Mask.packed(torch.tensor([[0]]), torch.tensor([0])), r"cu_q .*\(1, 1\)"),
        (lambda: Mask.media(torch.tensor([True]), 4), r"locations .*\(1,\)"),
        (lambda: Mask.groups(bits(1, 1, 1, 1, 1)), r"visible .*\(1, 1, 1, 1, 1\)"),
        (lambda: Mask.causal(2, 3, "left"), "align .*'left'"),
        (lambda: Mask.key_padding(bits(2, 1, N)), r"keep must be \(B, N\), got \(2, 1, 7\)"),
        (lambda: Mask.media(torch.tensor([[True]]), 0), "tokens_per_media must be positive, got 0"),
        (lambda: Mask.media(torch.tensor([[True]]), -3), "tokens_per_media must be positive, got -3"),
        (lambda: Mask.packed(torch.tensor([]).long(), torch.tensor([]).long()), "cu_q and cu_k must begin with 0"),
        (lambda: Mask.packed(torch.tensor([0]), torch.tensor(0)), r"cu_k .*\(\)"),
        (lambda: Mask.groups(bits(6, 8), 0), "query_group must be positive, got 0"),
        (lambda: Mask.groups(bits(6, 8), 1, -1), "key_group must be positive, got -1"),
        (lambda: Mask.causal(-1, 8), "num_queries must be at least 0, got -1"),
        (lambda: Mask.packed(torch.tensor([0, 1]), torch.tensor([0, 1]), -1), "num_queries must be at least 0, got -1"),
        (lambda: Mask.lengths(torch.tensor([1, 2])) & Mask.lengths(torch.tensor([1, 2, 3])), r"end .*\(2, 1, 1\) and"),
        (lambda: Mask.key_padding(bits(2, 8)) & Mask.key_padding(bits(2, 7)), r"keys .*\(2, 8\) and \(2, 7\)"),
        (lambda: Mask.groups(bits(2, 1, 6, 8)) & Mask.groups(bits(3, 1, 6, 8)), r"visible .*\(2, 1, 6, 8\) and"),
        (
            lambda: Mask.lengths(torch.tensor([1])) & Mask.lengths(torch.tensor([1], device="meta")),
            "end must be on one device, got cpu and meta",
        ),
    ],
    ids=[
        "float", "bool", "two dimensions", "unequal", "cu_q", "media", "five dimensions", "align", "keep", "tokens 0",
        "tokens below 0", "cu empty", "cu_k", "group 0", "group below 0", "queries below 0", "packed below 0", "ends",
        "keys", "groups", "devices",
    ],
)  # fmt: skip
def test_bad_arguments_in_one_sentence(build, words):
    with pytest.raises(ValueError, match=words) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mask.lengths([3, 0]), "lengths must be a tensor, got list"),
        (lambda: Mask.window(6, 8, 1.5, 1), "left must be an integer, got 1.5"),
        (lambda: Mask.media(bits(2, 6), "2"), "tokens_per_media must be an integer, got '2'"),
        (lambda: Mask.groups(bits(6, 8), 2.0), "query_group must be an integer, got 2.0"),
        (lambda: Mask.groups(bits(6, 8), 1, None), "key_group must be an integer, got None"),
        (lambda: Mask.key_padding([[True]]), "keep must be a tensor, got list"),
        (lambda: Mask.packed([0, 2], torch.tensor([0, 2])), "cu_q must be a tensor, got list"),
        (lambda: Mask.packed(torch.tensor([0, 2]), (0, 2)), "cu_k must be a tensor, got tuple"),
        (lambda: Mask.media([[True]], 2), "locations must be a tensor, got list"),
        (lambda: Mask.groups(None), "visible must be a tensor, got NoneType"),
        (
            lambda: Mask.key_padding(torch.ones(B, N, dtype=torch.int64)),
            "keep must be a tensor of bools, got torch.int64 of shape (2, 7); if 1 may be seen, pass keep.bool()",
        ),
        (lambda: Mask.key_padding(torch.ones(N)), "keep must be a tensor of bools, got torch.float32 of shape (7,)"),
        (
            lambda: Mask.blocks(torch.ones(1, 2, dtype=torch.uint8)),
            "visible must be a tensor of bools, got torch.uint8 of shape (1, 2); if 1 may be seen, pass visible.bool()",
        ),
    ],
    ids="lengths window media groups key_group keep cu_q cu_k locations visible integers floats blocks".split(),
)
def test_wrong_types_in_one_sentence(build, message):
    with pytest.raises(TypeError) as error:
        build()
    assert str(error.value) == message


DENSE = Mask.groups(bits(M, N))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Mask.lengths(torch.ones(B, dtype=torch.complex64)), ValueError, "lengths must be a one-"),
        (lambda: Mask.lengths(torch.tensor([3, 0]).to_sparse()), TypeError, "lengths must be a dense .* sparse"),
        (lambda: Mask.key_padding(torch.nested.nested_tensor([KEEP[0]])), TypeError, "keep must be .* not nested"),
        (lambda: Mask.packed(torch.tensor([0, 2]), torch.zeros(2, device="meta").int()), ValueError, "one device"),
        (lambda: Mask.causal(M, None, "bottom-right"), TypeError, "num_keys must be an integer, got None"),
        (lambda: DENSE.slice_keys(-1, 3), ValueError, "first must be at least 0, got -1"),
        (lambda: DENSE.slice_keys(3, 2), ValueError, "last must be at least first, got first=3 and last=2"),
        (lambda: DENSE.slice_keys(0, 1.5), TypeError, "last must be an integer, got 1.5"),
        (lambda: Mask(keys=torch.ones(B, N)) & Mask.key_padding(KEEP), TypeError, "keys must be a tensor of bools"),
        (lambda: Mask(start="x") & Mask.window(M, N, 1, 1), TypeError, "start must be a tensor, got str"),
        (lambda: Mask().as_dense(B, H, M, -1), ValueError, "N must be at least 0, got -1"),
        (lambda: Mask().as_dense(B, 2.0, M, N), TypeError, "Hq must be an integer, got 2.0"),
        (lambda: dense(DENSE, M, N + 1), ValueError, r"visible must broadcast to \(2, 2, 5, 8\), got \(1, 1, 5, 7\)"),
        (lambda: dense(DENSE, M, N - 1), ValueError, r"visible must broadcast to \(2, 2, 5, 6\), got \(1, 1, 5, 7\)"),
        (lambda: dense(Mask.key_padding(KEEP), M, 3), ValueError, r"keys must broadcast to \(2, 3\), got \(2, 7\)"),
        (lambda: dense(Mask.causal(M, N), 3), ValueError, r"end must broadcast to \(2, 2, 3\), got \(1, 1, 5\)"),
        (lambda: dense(Mask(keys=KEEP[:, None])), ValueError, r"keys must broadcast to \(2, 7\), got \(2, 1, 7\)"),
        (lambda: dense(Mask(start=torch.ones(M))), TypeError, "start must be a tensor of integers, got torch.float32"),
        (lambda: dense(Mask(visible=bits(M, N).int())), TypeError, "visible must be a tensor of bools, got"),
        (lambda: dense(Mask(visible=bits(M, N), query_group=0)), ValueError, "query_group must be positive, got 0"),
        (
            lambda: dense(Mask(start=torch.zeros(M).int(), end=torch.ones(M, device="meta").int())),
            ValueError,
            "fields of a mask must be on one device, got cpu and meta",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_would_fail_inside_of_torch_is_named(build, error, words):
    with pytest.raises(error, match=words) as raised:
        build()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        (Mask(keys=KEEP[0]), Mask(keys=KEEP[:1])),
        (Mask(start=torch.arange(M)), Mask(start=torch.arange(M)[None, None])),
        (Mask(end=torch.tensor(3)), Mask(end=torch.tensor([[[3]]]))),
        (Mask(end=torch.tensor([[3], [1]])), Mask(end=torch.tensor([[[3], [1]]]))),
        (Mask(visible=PER_QUERY), Mask(visible=PER_QUERY[None, None])),
        (Mask(visible=KEEP[0]), Mask(visible=KEEP[0][None, None, None])),
    ],
    ids=["keys", "start", "end", "end by head", "visible", "visible for all queries"],
)
def test_dimensions_in_front_may_be_left_out(short, full):
    assert short.lead() == full.lead()
    assert torch.equal(dense(short), dense(full)) and torch.equal(canonical_dense(short), dense(full))
    assert torch.equal(dense(short.slice_keys(2, 5), M, 3), dense(full)[..., 2:5])
    for other in map(make, MASKS):
        assert torch.equal(dense(short & other), dense(full & other))
        assert torch.equal(dense(other & short), dense(other & full))
