"""Which of several candidates is the best, and whether a study can tell: tests, intervals and a sentence.

Two things vary: a run differs from the next by its seed, and the test images are a sample themselves. Student's t
asks whether the difference would stand with other seeds, a bootstrap over images whether it would stand with other
images. Either alone crowns winners among equals, so a winner is named only where both agree.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import nctdtr, ndtri, stdtr, stdtrit

LEVEL = 0.95  # of every interval
POWER = 0.8  # with which `seeds_needed` and `images_needed` would find the differences that were seen
_BLOCK = 2**21  # numbers held at once while resampling


@dataclass(frozen=True)
class Pair:
    """One candidate against the best. Differences are other minus best, in percentage points: never above 0."""

    index: int
    difference: float
    low: float | None  # 95 % interval over seeds, of this pair alone; None without a spread
    high: float | None
    p_seeds: float | None  # Student's t; None without a spread
    p_images: float  # bootstrap over test images
    p_holm: float | None  # the larger of the two, corrected for the number of pairs


@dataclass(frozen=True)
class Verdict:
    """What a study can tell. Candidates are named by their index."""

    best: int  # the highest mean accuracy; the first of several
    winner: int | None  # the best, if every other candidate is told apart from it
    pooled_sd: float | None  # of the accuracy of one run around its candidate's mean, in points; None without a spread
    pairs: tuple[Pair, ...]  # every other candidate, in the order given
    seeds_needed: int | None  # seeds a candidate; None where seeds are not what is missing, or it cannot be said
    images_needed: int | None  # test images, likewise
    alpha: float
    seeds: tuple[int, ...]  # of every candidate
    images: int  # in the test split


def judge(
    correct: Sequence[NDArray[np.bool_]], *, alpha: float = 0.05, resamples: int = 2000, seed: int = 0
) -> Verdict:
    """Compares the candidate with the highest mean accuracy with every other one.

    For each pair two p-values are computed, both two-sided. Over seeds: Student's t, its variance pooled over all
    candidates. Over images: the share of resampled test splits in which the best is not ahead, doubled; it takes
    the mean over seeds for every image, and both candidates are scored on the same images. The larger of the two
    counts, corrected after Holm for the number of pairs, and a winner is named if all are at most `alpha`.

    What to expect, by simulation (3 and 5 seeds, five candidates): a winner among equals in at most 3 % of studies,
    also where the 200 test images suit some candidates by chance and where one candidate's seeds spread three times
    as far. A candidate 3 seed deviations above four equal ones is found in about 75 % of studies with 3 seeds, in
    98 % with 5.

    Args:
        correct: For every candidate [seeds, images]: was the image right? The images are the same for all
            candidates, in the same order; the numbers of seeds may differ.
        alpha: How often a winner may be named among equals.
        resamples: Test splits drawn; more are drawn where the correction for many pairs asks for it.
        seed: Of these draws.

    Returns:
        With one candidate `pairs` is empty. Without a candidate of two seeds there is no spread: no winner, and
        None for whatever depends on it. `seeds_needed` is how many seeds every candidate needs to find, with 80 %
        power, differences as large as those seen; `images_needed` is how many test images, once there are as many
        seeds as needed. The differences seen are uncertain, and so are these numbers: they are orders of magnitude.

    Cost: resamples * images * candidates multiply-adds and as many random numbers as resamples * images: half a
        second for 10,000 images and 10 candidates, in 100 MB.

    Raises:
        ValueError: No candidate, one without runs, or candidates tested on different numbers of images.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
        (1979), 65-70. The bootstrap's p: Davison and Hinkley, "Bootstrap Methods and their Application" (1997),
        section 4.2, with one added to both counts.
    """
    right = _checked(correct)
    seeds = tuple(len(c) for c in right)
    images = right[0].shape[1]
    totals = [int(c.sum()) for c in right]
    # One division of whole numbers each, so that equal accuracies are equal to the last bit.
    means = [100 * total / (n * images) for total, n in zip(totals, seeds, strict=True)]
    best = max(range(len(right)), key=means.__getitem__)
    others = [c for c in range(len(right)) if c != best]
    per_run = [c.sum(1).tolist() for c in right]
    sd, freedom = _pooled(per_run)
    sd = None if sd is None else 100 * sd / images

    p_images = _bootstrap(right, best, others, max(resamples, math.ceil(4 * len(others) / alpha)), seed)
    pairs, p_seeds = [], []
    for other, by_images in zip(others, p_images, strict=True):
        difference = means[other] - means[best]
        if sd is None:
            pairs.append(Pair(other, difference, None, None, None, by_images, None))
            continue
        error = sd * math.sqrt(1 / seeds[best] + 1 / seeds[other])
        margin = error * _quantile(freedom, 1 - LEVEL)
        p_seeds.append(_p_student(difference, error, freedom))
        pairs.append(
            Pair(other, difference, difference - margin, difference + margin, p_seeds[-1], by_images, p_holm=None)
        )
    if sd is None or not pairs:
        return Verdict(best, None, sd, tuple(pairs), None, None, alpha, seeds, images)

    corrected = _holm([max(both) for both in zip(p_seeds, p_images, strict=True)])
    pairs = [Pair(**{**vars(pair), "p_holm": p}) for pair, p in zip(pairs, corrected, strict=True)]
    winner = best if max(corrected) <= alpha else None
    seeds_needed = images_needed = None
    if winner is None and all(pair.difference < 0 for pair in pairs):
        if max(_holm(p_seeds)) > alpha:
            seeds_needed = _seeds_needed([-pair.difference for pair in pairs], sd, alpha)
        images_needed = _images_needed(right, best, pairs, seeds_needed, alpha)
        if images_needed <= images or max(_holm(p_images)) <= alpha:
            images_needed = None
    return Verdict(best, winner, sd, tuple(pairs), seeds_needed, images_needed, alpha, seeds, images)


def interval(accuracies: Sequence[Sequence[float]]) -> list[tuple[float, float | None, float | None]]:
    """Mean and 95 % interval (Student's t, variance pooled over all candidates) of every candidate.

    Args:
        accuracies: For every candidate one number a seed, in any unit, which is that of the result.

    Returns:
        (mean, low, high) a candidate; low and high are None with one candidate, or one seed each.

    Raises:
        ValueError: A candidate has no accuracy.
    """
    if not all(accuracies):
        raise ValueError(f"candidate {[bool(a) for a in accuracies].index(False)}: no accuracies; give one a seed")
    sd, freedom = _pooled(accuracies)
    result: list[tuple[float, float | None, float | None]] = []
    for values in accuracies:
        mean = sum(values) / len(values)
        if sd is None or len(accuracies) == 1:
            result.append((mean, None, None))
        else:
            margin = sd / math.sqrt(len(values)) * _quantile(freedom, 1 - LEVEL)
            result.append((mean, mean - margin, mean + margin))
    return result


def sentence(verdict: Verdict, names: Sequence[str], *, equal_budget: bool = True) -> str:
    """The verdict in plain English: who wins and by how much, or who cannot be told apart and what would help.

    Args:
        verdict: What `judge` returned.
        names: Of the candidates, in its order.
        equal_budget: Whether all candidates have the same multiply-adds or parameters.
    """
    best = names[verdict.best]
    if not verdict.pairs:
        return f"Only {best} was trained: there is nothing to compare it with."
    ranked = sorted(verdict.pairs, key=lambda pair: -pair.difference)
    if verdict.pooled_sd is None:
        said = _without_spread(verdict, ranked, names)
    elif verdict.winner is not None:
        also = f"; all {len(ranked)} others are told apart from it" if len(ranked) > 1 else ""
        said = f"{best} is the best: {_ahead(ranked[0], names)}{also}."
    else:
        close = [pair for pair in ranked if pair.p_holm is not None and pair.p_holm > verdict.alpha]
        said = (
            f"No winner: {best} has the highest mean accuracy, but "
            f"{_listed([names[pair.index] for pair in close])} cannot be told apart from it "
            f"({_ahead(ranked[0], names)})."
        ) + _advice(verdict, ranked)
    if not equal_budget:
        said += " The candidates differ in size, so this is no comparison of equals."
    return said


def _without_spread(verdict: Verdict, ranked: Sequence[Pair], names: Sequence[str]) -> str:
    best = names[verdict.best]
    ties = [names[pair.index] for pair in ranked if pair.difference == 0]
    seen = (
        f"{_listed([best, *ties])} have the same accuracy"
        if ties
        else f"{best} is {_points(-ranked[0].difference)} above {names[ranked[0].index]}"
    )
    return f"No winner: with one seed each nothing can be said about the spread between runs. {seen} in this one run."


def _advice(verdict: Verdict, ranked: Sequence[Pair]) -> str:
    if ranked[0].difference == 0:
        return " Their means are equal, so it cannot be said how many seeds would tell them apart."
    seeds = verdict.seeds_needed and f"about {_rounded(verdict.seeds_needed)} seeds each"
    images = verdict.images_needed and f"about {_rounded(verdict.images_needed)} test images"
    if images and not seeds:
        return (
            f" The {verdict.images:,} test images are what limits, so more seeds would not help: "
            f"{images} would be needed to find differences as large as those seen."
        )
    if seeds:
        also = f" and {images} (there are {verdict.images:,})" if images else ""
        return f" To find differences as large as those seen, {seeds}{also} would be needed."
    return ""


def _ahead(pair: Pair, names: Sequence[str]) -> str:
    """How far the best is ahead, with the interval, both as positive numbers."""
    ahead = "level with" if pair.difference == 0 else f"{_points(-pair.difference)} above"
    if pair.low is None or pair.high is None:
        return f"{ahead} {names[pair.index]}"
    # 0.0 - x is never the "-0.00" that -x may be
    return f"{ahead} {names[pair.index]}, 95 % interval {0.0 - pair.high:.2f} to {0.0 - pair.low:.2f}"


def _points(value: float) -> str:
    return f"{value:.2f} points"


def _rounded(number: int) -> str:
    """Two digits, upwards: more would pretend to know."""
    unit = 10 ** max(len(str(number)) - 2, 0)
    return f"{-(-number // unit) * unit:,}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _checked(correct: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    right = [np.asarray(c, dtype=bool) for c in correct]
    if not right:
        raise ValueError("no candidates to compare; give at least one")
    for i, c in enumerate(right):
        if c.ndim != 2 or 0 in c.shape:
            raise ValueError(f"candidate {i}: shape {c.shape}; it must be [seeds, images], at least one of each")
        if c.shape[1] != right[0].shape[1]:
            raise ValueError(
                f"candidate {i} was tested on {c.shape[1]} images, candidate 0 on {right[0].shape[1]}; "
                "test all on the same"
            )
    return right


def _pooled(values: Sequence[Sequence[float]]) -> tuple[float | None, int]:
    """Standard deviation around each candidate's own mean, one for all, and its degrees of freedom."""
    freedom = sum(len(v) - 1 for v in values)
    if freedom == 0:
        return None, 0
    squares = 0.0
    for own in values:
        mean = sum(own) / len(own)
        squares += sum((value - mean) ** 2 for value in own)
    return math.sqrt(squares / freedom), freedom


def _quantile(freedom: int, p: float) -> float:
    """What |t| exceeds with probability p."""
    return float(stdtrit(freedom, 1 - p / 2))


def _p_student(difference: float, error: float, freedom: int) -> float:
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stdtr(freedom, -abs(difference) / error))


def _holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p-values, in the order given: the smallest times their number, the next times one less, ..."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _bootstrap(
    right: Sequence[NDArray[np.bool_]], best: int, others: Sequence[int], resamples: int, seed: int
) -> list[float]:
    """Two-sided p for every other candidate: how often the best is not ahead on images drawn anew."""
    if not others:
        return []
    sums = [c.sum(0) for c in right]
    # Times both numbers of seeds, so that all are whole numbers and a tie is exactly 0.
    ahead = np.stack([len(right[c]) * sums[best] - len(right[best]) * sums[c] for c in others], axis=1).astype(float)
    behind = np.zeros(len(others))
    for counts in _draws(ahead.shape[0], resamples, seed):
        behind += (counts @ ahead <= 0).sum(0)
    # One is added to both counts: the split at hand is a draw too, and no finite number of draws shows p = 0.
    p = 2 * (behind + 1) / (resamples + 1)
    # Nor can m images with a difference say more than m tosses of a coin: drawn anew, a single one never changes.
    coins = 2.0 ** (1 - (ahead != 0).sum(0))
    return np.minimum(1.0, np.maximum(p, coins)).tolist()


def _draws(images: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each image is drawn when as many are drawn with replacement, in blocks [draws, images]."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // images)
    for start in range(0, resamples, rows):
        n = min(rows, resamples - start)
        drawn = generator.integers(images, size=(n, images)) + images * np.arange(n)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * images).reshape(n, images).astype(float)


def _steps(differences: Sequence[float], alpha: float) -> list[float]:
    """The level at which Holm tests each pair: alpha for the smallest difference, alpha / 2 for the next, ..."""
    order = sorted(range(len(differences)), key=differences.__getitem__)
    return [alpha / (order.index(i) + 1) for i in range(len(differences))]


def _seeds_needed(differences: Sequence[float], sd: float, alpha: float) -> int:
    """Seeds a candidate with which the t of every pair is significant with 80 % probability, at its Holm step."""

    def power(n: int, difference: float, step: float) -> float:
        freedom = (len(differences) + 1) * (n - 1)
        # The power is 1 beyond 30, where the function may return nan.
        noncentrality = min(difference / sd * math.sqrt(n / 2), 30)
        return 1 - float(nctdtr(freedom, noncentrality, _quantile(freedom, step)))

    def enough(n: int) -> bool:
        steps = _steps(differences, alpha)
        return all(power(n, d, step) >= POWER for d, step in zip(differences, steps, strict=True))

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2  # too few, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _images_needed(
    right: Sequence[NDArray[np.bool_]], best: int, pairs: Sequence[Pair], seeds: int | None, alpha: float
) -> int:
    """Test images with which the bootstrap of every pair is significant with 80 % probability, at its Holm step.

    The difference of a pair varies from image to image for two reasons: the candidates find different images hard,
    which stays, and single runs do, which more seeds average out. `seeds` is how many there will be (None: as now).
    """
    # p (1 - p) n / (n - 1) is the unbiased variance of right or wrong over the seeds of one image.
    shares = [c.mean(0) for c in right]
    spreads = [len(c) / (len(c) - 1) * (s * (1 - s)).mean() for c, s in zip(right, shares, strict=True) if len(c) > 1]
    of_runs = float(np.mean(spreads))
    needed = 0
    for pair, step in zip(pairs, _steps([-pair.difference for pair in pairs], alpha), strict=True):
        now = 1 / len(right[best]) + 1 / len(right[pair.index])
        then = now if seeds is None else min(now, 2 / seeds)
        variance = float((shares[best] - shares[pair.index]).var())
        variance = max(variance - of_runs * now, 0.0) + of_runs * then
        z = float(ndtri(1 - step / 2) + ndtri(POWER))
        needed = max(needed, math.ceil(variance * (100 * z / pair.difference) ** 2))
    return needed
