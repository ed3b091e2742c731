"""Which tokens of a conversation are learned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100


def make_labels(
    learned: list[tuple[int, int]], ids: NDArray[np.int64], offsets: NDArray[np.int64], *, text: str
) -> NDArray[np.int64]:
    """The labels (L,) of tokens: their ids in the learned ranges of characters, and -100 elsewhere.

    Args:
        learned: Begin and end of each range.
        ids: (L,) token ids.
        offsets: (L, 2) range of characters of each token.
        text: The text.

    Raises:
        ValueError: If a token is only partly in a range.
    """
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    # Tokens of blanks may have empty ranges, which do not state their place: they belong to what is around them.
    is_solid = offsets[:, 1] > offsets[:, 0]
    solid = np.flatnonzero(is_solid)
    starts, stops = offsets[solid, 0], offsets[solid, 1]
    for begin, end in learned:
        first = solid[np.searchsorted(stops, begin, side="right")]
        if offsets[first, 0] < begin:
            raise ValueError(f"the answer {text[begin:end]!r:.40} and the end of its prompt, {text[:begin][-20:]!r}, "
                             "share a token; write the answer another way, or use a chat template with a special token "
                             "or a line break before answers")  # fmt: skip
        while text[begin].isspace() and first > 0 and not is_solid[first - 1]:
            first -= 1
        last = solid[np.searchsorted(starts, end, side="left") - 1]
        labels[first : last + 1] = ids[first : last + 1]
    return labels
