"""How often tokens appear, and how long they stay away."""

from __future__ import annotations

import numpy as np

RARE = (1, 3)  # seen this often in training: a rare token
FREQUENT = 200  # seen more often: a frequent one


def rank_frequency(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1 [n] and shares of all tokens [n], the most frequent first; tokens that never occur
    are left out.

    Args:
        counts: how often each token occurs [V].
    """
    present = np.sort(counts[counts > 0])[::-1]
    return np.arange(1, len(present) + 1), present / present.sum()


def zipf_exponent(counts: np.ndarray, ranks: tuple[int, int] = (10, 1000)) -> float:
    """s in share ∝ rank^−s, by least squares on the logarithms between two ranks.

    Each rank is weighted by 1/rank, so that every octave of ranks counts the same.
    """
    rank, share = rank_frequency(counts)
    inside = (rank >= ranks[0]) & (rank <= ranks[1])
    if inside.sum() < 2:
        raise ValueError(f"ranks {ranks} hold {inside.sum()} tokens: a slope needs two")
    slope, _ = np.polyfit(np.log(rank[inside]), np.log(share[inside]), 1, w=rank[inside] ** -0.5)
    return float(-slope)


def mean_gaps(seen: np.ndarray) -> np.ndarray:
    """Mean number of steps from one appearance of a token to the next [V].

    The steps over the number of steps in which it appears; infinite for a token that never does.

    Args:
        seen: whether each token is in each step's batch [steps, V], boolean.
    """
    with np.errstate(divide="ignore"):
        gaps: np.ndarray = len(seen) / seen.sum(axis=0)
    return gaps


def longest_silence(seen: np.ndarray) -> np.ndarray:
    """The most steps in a row without a token after it was first seen [V]; 0 for one never seen.

    Args:
        seen: whether each token is in each step's batch [steps, V], boolean.
    """
    longest = np.zeros(seen.shape[1], dtype=np.int64)
    silent = np.zeros_like(longest)
    known = np.zeros(seen.shape[1], dtype=bool)
    for row in seen:
        known |= row
        silent = np.where(row | ~known, 0, silent + 1)
        longest = np.maximum(longest, silent)
    return longest


def rare_tokens(counts: np.ndarray) -> np.ndarray:
    """Which tokens [V] were seen 1 to 3 times."""
    return (counts >= RARE[0]) & (counts <= RARE[1])


def frequent_tokens(counts: np.ndarray) -> np.ndarray:
    """Which tokens [V] were seen more than 200 times."""
    return counts > FREQUENT


def frequency_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Which tokens were seen never, 1 to 3, 4 to 20, 21 to 200 and more times: by name, masks [V].

    Args:
        counts: how often each token was seen [V].
    """
    rare, frequent = rare_tokens(counts), frequent_tokens(counts)
    return {
        "never": counts == 0,
        "1 to 3": rare,
        "4 to 20": (counts > 0) & (counts <= 20) & ~rare,
        "21 to 200": (counts > 20) & ~frequent,
        "more": frequent,
    }


def equal_share_groups(shares: np.ndarray, groups: int = 10) -> dict[str, np.ndarray]:
    """Tokens by frequency, in groups that make up equal shares of the text: by name, masks [V].

    The first group holds the most frequent tokens, the last the rarest and those that never occur. Each
    group has as many samples as any other, up to one token's share, so the mean of their losses is about
    the overall loss (Kunstner et al., arXiv 2402.19449, group classes in this way).

    Args:
        shares: how large a share of the text each token is [V]; they need not add up to 1.
        groups: how many.

    Raises:
        ValueError: fewer than two groups, or shares that are all zero.
    """
    if groups < 2:
        raise ValueError(f"groups must be 2 or more, got {groups}")
    total = shares.sum()
    if not total > 0:
        raise ValueError("the tokens' shares are all zero")
    order = np.argsort(-shares, kind="stable")
    middle = (np.cumsum(shares[order]) - shares[order] / 2) / total
    which = np.empty(len(shares), dtype=np.int64)
    which[order] = np.minimum((groups * middle).astype(np.int64), groups - 1)
    edges = [round(100 * i / groups) for i in range(groups + 1)]
    return {f"{edges[i]}–{edges[i + 1]} %": which == i for i in range(groups)}
