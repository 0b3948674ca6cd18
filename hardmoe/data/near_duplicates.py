"""When two images are the same picture, and which of them has to go.

The difference of two 32 x 32 thumbnails is the larger of two numbers, both 0 for equal pictures:

- 1 - r, with r the correlation over all pixels: whether the shapes are the same, whatever the brightness and contrast;
- the mean squared difference in the worst of all 4 x 4 windows (every second row and column), in units of black against
  white: whether a detail differs.

A picture that lost a small margin is the same picture, but its thin lines moved by more than their width. So the difference
is the smallest of three: as they are, and with either one enlarged by the 4 % that 2 % off every side would give.

Neither is enough alone. Two weights of a glyph correlate well, and only the worst window tells them apart; two near-blank
pages differ little in any window, and only the correlation does. A bare mean difference, of pictures that are mostly the same
white, does neither. On 2,000 near-duplicates and 2,000 hard negatives of drawings and as many of photographs
(tests/near_duplicate_pairs.py), at the threshold of 0.03:

    rule                                   drawings               photographs
                                           recall  false alarms   recall  false alarms
    hashes within 4 bits, nothing else     0.956   0.280          0.972   0.000
    bare mean difference, any hash         0.699   0.023          0.923   0.334
    within 4 bits and mean difference      0.699   0.020          0.913   0.000
    within 4 bits and this difference      0.935   0.008          0.971   0.000

The recall that is missing is croppings whose hashes differ in more bits: a radius of 6 finds 0.964 and 0.991, with the same
false alarms, for nine times the search. At 0.02 and 0.04 the recall is 0.930 and 0.959, the precision 0.997 and 0.990.

Whole numbers up to the last division make the difference the same on every machine and in every batch.

Which image goes is decided by pairs, never along chains: b may be a copy of a and of c though a is none of c. Rejected:
removing whole groups that touch a held-out image, which along a chain removes pictures that are like none of them.

Shape letters: N rows, P pairs, X the 1,024 pixels of a thumbnail, S its side, T rows that are in a pair.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hardmoe.data.perceptual import THUMBNAIL_PIXELS, THUMBNAIL_SIDE
from hardmoe.data.schemas import SPLITS

_TRAIN, _VALIDATION, _TEST = (SPLITS.index(split) for split in ("train", "validation", "test"))

_BLOCK = 128
"""Pairs at a time: 2 MB per array of their pixels, which stays in a core's cache."""
_ZOOM = 0.96
"""Share of a side that is left after cropping 2 % at both of its ends."""
_FRACTIONS = 16
"""An enlarged thumbnail's pixels are rounded to sixteenths of a grey level, so that all sums stay exact in float64."""
_WINDOW_PIXELS = 16
_HOPELESS = 0.5
"""With 1 - r above this no picture is enlarged: 2 % off every side gave 0.29 at most, and different photographs are beyond."""
_EQUAL = 0.01
"""Nor below this difference, where re-encoded and resized copies are: it saves most of their time."""


class Decision(NamedTuple):
    """What becomes of rows.

    Attributes:
        groups_T: the smallest row that a row is connected with by pairs, itself if by none, int64 [T].
        removed_T: whether the row has to go, bool [T].
    """

    groups_T: NDArray[np.int64]
    removed_T: NDArray[np.bool_]


def differences(first_PX: NDArray[np.uint8], second_PX: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How different the pictures of pairs are, as the module says.

    Args:
        first_PX: thumbnails, uint8 [P, 1024].
        second_PX: those that they are compared with, uint8 [P, 1024]; the order of a pair does not matter.

    Returns:
        float64 [P], from 0 to 2.
    """
    result_P = np.empty(len(first_PX))
    for start in range(0, len(first_PX), _BLOCK):
        pairs = slice(start, start + _BLOCK)
        result_P[pairs] = _block_differences(first_PX[pairs], second_PX[pairs])
    return result_P


def _block_differences(first_PX: NDArray[np.uint8], second_PX: NDArray[np.uint8]) -> NDArray[np.float64]:
    first, second = _Pictures.of(first_PX), _Pictures.of(second_PX)
    unlike_P = _unlikeness(first, second)
    result_P = np.maximum(unlike_P, _worst_window(first, second))
    hopeful_P = np.flatnonzero((unlike_P <= _HOPELESS) & (result_P > _EQUAL))
    if len(hopeful_P):
        first, second = first.take(hopeful_P), second.take(hopeful_P)
        for a, b in ((first.enlarged(), second), (first, second.enlarged())):
            difference_P = np.maximum(_unlikeness(a, b), _worst_window(a, b))
            result_P[hopeful_P] = np.minimum(result_P[hopeful_P], difference_P)
    return result_P


def _enlarging() -> NDArray[np.float32]:
    """The matrix that enlarges a column of pixels, [S, S], in 1/128: two weights in every row, for linear interpolation."""
    centre = (THUMBNAIL_SIDE - 1) / 2
    places_S = (np.arange(THUMBNAIL_SIDE) - centre) * _ZOOM + centre
    above_S = places_S.astype(np.intp)
    weights_S = np.round((places_S - above_S) * 128)
    matrix_SS = np.zeros((THUMBNAIL_SIDE, THUMBNAIL_SIDE), np.float32)
    matrix_SS[np.arange(THUMBNAIL_SIDE), above_S] = 128 - weights_S
    matrix_SS[np.arange(THUMBNAIL_SIDE), above_S + 1] = weights_S
    return matrix_SS


_ENLARGING_SS = _enlarging()


class _Pictures(NamedTuple):
    """Thumbnails in sixteenths of grey levels, float64 [P, X], with their sums and sums of squares, float64 [P]."""

    pixels_PX: NDArray[np.float64]
    sums_P: NDArray[np.float64]
    squares_P: NDArray[np.float64]

    @classmethod
    def of(cls, thumbnails_PX: NDArray[np.uint8]) -> "_Pictures":
        return cls._from_sixteenths(thumbnails_PX * np.float64(_FRACTIONS))

    @classmethod
    def _from_sixteenths(cls, pixels_PX: NDArray[np.float64]) -> "_Pictures":
        return cls(pixels_PX, pixels_PX.sum(axis=1), np.einsum("px,px->p", pixels_PX, pixels_PX))

    def take(self, pairs_P: NDArray[np.intp]) -> "_Pictures":
        return _Pictures(*(values[pairs_P] for values in self))

    def enlarged(self) -> "_Pictures":
        """The inner 96 % of every picture, by linear interpolation; `self` must be made of thumbnails."""
        grey_PSS = (self.pixels_PX / _FRACTIONS).astype(np.float32).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
        # Whole numbers up to 255 * 128**2 < 2**24, so float32 is exact and in no need of an order of summation.
        enlarged_PSS = _ENLARGING_SS @ grey_PSS @ _ENLARGING_SS.T
        sixteenths_PSS = np.floor(enlarged_PSS * np.float32(_FRACTIONS / 128**2) + np.float32(0.5))
        return _Pictures._from_sixteenths(sixteenths_PSS.astype(np.float64).reshape(-1, THUMBNAIL_PIXELS))


def _unlikeness(a: _Pictures, b: _Pictures) -> NDArray[np.float64]:
    """One minus the correlation, [P]; 1 for a picture without contrast."""
    covariance_P = THUMBNAIL_PIXELS * np.einsum("px,px->p", a.pixels_PX, b.pixels_PX) - a.sums_P * b.sums_P
    variances_P = [THUMBNAIL_PIXELS * c.squares_P - np.square(c.sums_P) for c in (a, b)]
    scale_P = np.sqrt(variances_P[0]) * np.sqrt(variances_P[1])
    return np.asarray(1.0 - np.divide(covariance_P, scale_P, out=np.zeros_like(scale_P), where=scale_P > 0), np.float64)


def _worst_window(a: _Pictures, b: _Pictures) -> NDArray[np.float64]:
    """Mean squared difference in the worst 4 x 4 window, 1 for black against white, [P]."""
    squares_PX = np.square((a.pixels_PX - b.pixels_PX).astype(np.int32))  # below 2**24, and sixteen of them below 2**28
    squares_PSS = squares_PX.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    # Slices, not sums along short axes, which take ten times as long.
    rows_PHS = squares_PSS[:, ::2] + squares_PSS[:, 1::2]
    rows_PHS = rows_PHS[:, 1:] + rows_PHS[:, :-1]
    windows_PHH = rows_PHS[:, :, ::2] + rows_PHS[:, :, 1::2]
    windows_PHH = windows_PHH[:, :, 1:] + windows_PHH[:, :, :-1]
    worst_P = windows_PHH.reshape(len(squares_PX), -1).max(axis=1)
    return np.asarray(worst_P / (_WINDOW_PIXELS * (255.0 * _FRACTIONS) ** 2), np.float64)


def groups(first_P: NDArray[np.int64], second_P: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """The smallest row that every row is connected with by pairs, int64 [N]; a row in no pair is its own."""
    labels_N = np.arange(num_rows)
    while True:
        first_labels_P, second_labels_P = labels_N[first_P], labels_N[second_P]
        apart_P = np.flatnonzero(first_labels_P != second_labels_P)
        if len(apart_P) == 0:
            return labels_N
        # Labels are roots here: every root takes the smallest root that a pair shows it, then all point to theirs directly.
        first_P, second_P = first_P[apart_P], second_P[apart_P]
        first_labels_P, second_labels_P = first_labels_P[apart_P], second_labels_P[apart_P]
        np.minimum.at(labels_N, np.maximum(first_labels_P, second_labels_P), np.minimum(first_labels_P, second_labels_P))
        while (labels_N[labels_N] != labels_N).any():
            labels_N = labels_N[labels_N]


def decide(
    first_P: NDArray[np.int64],
    second_P: NDArray[np.int64],
    splits_T: NDArray[np.integer],
    preference_T: NDArray[np.int64],
    policy: Literal["held_out", "all"],
) -> Decision:
    """Which rows to remove, so that what is learned, what is chosen and what is measured share no picture.

    A training row goes if it pairs with a validation or a test row, and a validation row if it pairs with a test row, all by
    the splits as given. With `all`, what is left of the training rows is grouped by its own pairs, and of every group the
    preferred row stays. Its hashtags remain its own: pictures that only nearly equal one another are confirmed by a threshold,
    and one false alarm in 250 would teach the wrong words.

    Args:
        first_P: one row of each confirmed pair.
        second_P: the other one; neither the order of a pair nor of the pairs matters.
        splits_T: index into `SPLITS` of every row.
        preference_T: every row's place, from 0, in the order in which rows are to be kept.
        policy: see above.

    Returns:
        The decision.
    """
    removed_T = np.zeros(len(splits_T), bool)
    for one_P, other_P in ((first_P, second_P), (second_P, first_P)):
        splits_P, other_splits_P = splits_T[one_P], splits_T[other_P]
        in_the_way_P = (splits_P == _TRAIN) & (other_splits_P != _TRAIN)
        in_the_way_P |= (splits_P == _VALIDATION) & (other_splits_P == _TEST)
        removed_T[one_P[in_the_way_P]] = True
    if policy == "all":
        stays_T = (splits_T == _TRAIN) & ~removed_T
        both_P = stays_T[first_P] & stays_T[second_P]
        # By their places in the order of preference, a group's label is its preferred row's.
        best_T = groups(preference_T[first_P[both_P]], preference_T[second_P[both_P]], len(splits_T))
        removed_T |= best_T[preference_T] != preference_T
    return Decision(groups(first_P, second_P, len(splits_T)), removed_T)
