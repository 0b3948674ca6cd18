"""The Triton program of `device_kernel`, which says what it does and why; apart, since Triton is only there with a GPU's torch.

Rejected: two kernels, one that searches and one that measures and adds, which read the features twice.

Shape letters: N rows, D feature dim, X clusters padded to a power of two, B rows of a block.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,no-any-return,attr-defined"

import triton
import triton.language as tl

_ROUND_SINGLE = tl.constexpr(1.5 * 2.0**23)
"""Added and taken off, it leaves a float32 below 2^22 rounded to an integer, halves to even."""
_ROUND_DOUBLE = tl.constexpr(1.5 * 2.0**52)
_ROUND_BITS = tl.constexpr(0x4338000000000000)


@triton.jit(do_not_specialize=["num_rows"])
def pass_over_rows(
    features_p: tl.tensor,
    high_p: tl.tensor,
    low_p: tl.tensor,
    squares_p: tl.tensor,
    double_p: tl.tensor,
    primary_p: tl.tensor,
    squared_p: tl.tensor,
    units_p: tl.tensor,
    counts_p: tl.tensor,
    objective_p: tl.tensor,
    num_rows: tl.tensor,
    scale: tl.tensor,
    largest: tl.tensor,
    factor: tl.tensor,
    least: tl.tensor,
    longest: tl.tensor,
    D: tl.constexpr,
    X: tl.constexpr,
    B: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Pointers to what `device_kernel` names, the numbers of a pass, and the sizes that it is compiled for."""
    program = tl.program_id(0)
    d, x = tl.arange(0, D), tl.arange(0, X)
    table = d[:, None] * X + x[None, :]
    high_DX, low_DX, squares_X = tl.load(high_p + table), tl.load(low_p + table), tl.load(squares_p + x)
    first_DX = tl.zeros((D, X), tl.float32)
    second_DX = tl.zeros((D, X), tl.float32)
    third_DX = tl.zeros((D, X), tl.float32)
    fourth_DX = tl.zeros((D, X), tl.float32)
    counts_X = tl.zeros((X,), tl.int32)
    whole_B, fraction_B = tl.zeros((B,), tl.int64), tl.zeros((B,), tl.int64)
    for block in range(tl.minimum(BLOCKS, tl.cdiv(num_rows - program * (BLOCKS * B), B))):
        rows_B = (program.to(tl.int64) * BLOCKS + block) * B + tl.arange(0, B)
        inside_B = rows_B < num_rows
        features_BD = tl.load(features_p + rows_B[:, None] * D + d[None, :], mask=inside_B[:, None], other=0.0)
        products_BX = _products(features_BD, high_DX, low_DX, WIDE)
        single_BD = features_BD.to(tl.float32)
        norms_B = tl.sqrt(tl.sum(single_BD * single_BD, axis=1))
        scores_BX = squares_X[None, :] - products_BX * scale
        best_B, nearest_B = tl.min(scores_BX, axis=1, return_indices=True)
        hit_BX = x[None, :] == nearest_B[:, None]
        second_B = tl.min(tl.where(hit_BX, float("inf"), scores_BX), axis=1)
        margins_B = (norms_B + largest) * (norms_B + largest) * factor + least
        certain_B = (second_B - best_B > margins_B) & (norms_B < longest) & inside_B
        tl.store(primary_p + rows_B, tl.where(certain_B, nearest_B, -1), mask=inside_B)

        near_B = tl.where(certain_B, nearest_B, 0)
        squared_B = _in_lanes(features_p, double_p, rows_B, near_B, certain_B, D)
        tl.store(squared_p + rows_B, squared_B, mask=inside_B)
        floor_B = tl.floor(squared_B)
        whole_B += floor_B.to(tl.int64)
        steps_B = (squared_B - floor_B) * 1099511627776.0 + _ROUND_DOUBLE
        fraction_B += steps_B.to(tl.int64, bitcast=True) - _ROUND_BITS

        one_BX = (hit_BX & certain_B[:, None]).to(tl.float16)
        counts_X += tl.sum((hit_BX & certain_B[:, None]).to(tl.int32), axis=0)
        rest_BD = tl.where(certain_B[:, None], single_BD, 0.0)
        digit_BD, rest_BD = _digit(rest_BD, 4.0)
        first_DX = tl.dot(tl.trans(digit_BD), one_BX, first_DX)
        digit_BD, rest_BD = _digit(rest_BD, 8192.0)
        second_DX = tl.dot(tl.trans(digit_BD), one_BX, second_DX)
        digit_BD, rest_BD = _digit(rest_BD, 16777216.0)
        third_DX = tl.dot(tl.trans(digit_BD), one_BX, third_DX)
        if WIDE:
            digit_BD, rest_BD = _digit(rest_BD, 4294967296.0)
            fourth_DX = tl.dot(tl.trans(digit_BD), one_BX, fourth_DX)
    units_DX = (first_DX.to(tl.int64) << 30) + (second_DX.to(tl.int64) << 19) + (third_DX.to(tl.int64) << 8)
    units_DX += fourth_DX.to(tl.int64)
    tl.atomic_add(units_p + (program // GROUP).to(tl.int64) * (D * X) + table, units_DX, sem="relaxed")
    tl.atomic_add(counts_p + x, counts_X.to(tl.int64), sem="relaxed")
    tl.store(objective_p + program * 2, tl.sum(whole_B, axis=0))
    tl.store(objective_p + program * 2 + 1, tl.sum(fraction_B, axis=0))


@triton.jit
def _products(features_BD: tl.tensor, high_DX: tl.tensor, low_DX: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """Features times scaled centroids from float16 halves, float32 [B, X]; float32 features times 2^6."""
    if WIDE:
        scaled_BD = features_BD * 64.0
        upper_BD = scaled_BD.to(tl.float16)
        lower_BD = (scaled_BD - upper_BD.to(tl.float32)).to(tl.float16)
        products_BX = tl.dot(upper_BD, high_DX) + (tl.dot(upper_BD, low_DX) + tl.dot(lower_BD, high_DX))
    else:
        products_BX = tl.dot(features_BD, high_DX) + tl.dot(features_BD, low_DX)
    return products_BX


@triton.jit
def _digit(rest_BD: tl.tensor, steps: tl.constexpr) -> tl.tensor:
    """The rest in whole steps, of which one holds so many, as float16, and what is then left."""
    digit_BD = (rest_BD * steps + _ROUND_SINGLE) - _ROUND_SINGLE
    return digit_BD.to(tl.float16), rest_BD - digit_BD * (1.0 / steps)


@triton.jit
def _in_lanes(
    features_p: tl.tensor, double_p: tl.tensor, rows_B: tl.tensor, near_B: tl.tensor, certain_B: tl.tensor, D: tl.constexpr
) -> tl.tensor:
    """Squared distances, float64 [B], in NumPy's order: eight lanes up to 128 features, the halves of 256 by themselves."""
    eight = tl.arange(0, 8)
    squared_B = tl.zeros((rows_B.shape[0],), tl.float64)
    width: tl.constexpr = D if D < 128 else 128
    for part in tl.static_range(0, D, width):
        lanes_B8 = tl.zeros((rows_B.shape[0], 8), tl.float64)
        for place in range(part, part + width, 8):  # unrolled, its loads take all registers and more
            column = place + eight[None, :]
            features_B8 = tl.load(features_p + rows_B[:, None] * D + column, mask=certain_B[:, None], other=0.0)
            centroids_B8 = tl.load(double_p + near_B[:, None] * D + column, mask=certain_B[:, None], other=0.0)
            differences_B8 = features_B8.to(tl.float64) - centroids_B8
            lanes_B8 += differences_B8 * differences_B8
        even_B4, odd_B4 = tl.split(tl.reshape(lanes_B8, (rows_B.shape[0], 4, 2)))
        even_B2, odd_B2 = tl.split(tl.reshape(even_B4 + odd_B4, (rows_B.shape[0], 2, 2)))
        even_B, odd_B = tl.split(even_B2 + odd_B2)
        squared_B += even_B + odd_B
    return squared_B
