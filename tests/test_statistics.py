"""Verdicts: every number against another way to it, and how often simulated studies crown a winner."""

import math
import tracemalloc
from functools import cache

import numpy as np
import pytest
from scipy import stats

from glocal import statistics
from glocal.statistics import interval, judge, sentence

NAMES = ["C-C-C-C", "C-C-T-T", "T-T-T-T", "C-T-T-T", "C-C-C-T"]
STUDIES = 1000


def runs(*rights, images=100):
    """One candidate: [seeds, images], the first `right` images of every run right."""
    return np.arange(images) < np.array(rights)[:, None]


def scattered(generator, seeds, images, share):
    return generator.random((seeds, images)) < share


# --- every number against another way to it


def test_two_candidates_are_compared_as_scipy_does():
    one, other = runs(80, 84, 79, 86), runs(70, 78, 75)
    verdict = judge([one, other])
    expected = stats.ttest_ind(other.mean(1) * 100, one.mean(1) * 100)
    low, high = expected.confidence_interval(0.95)
    (pair,) = verdict.pairs
    assert (verdict.best, pair.index) == (0, 1)
    assert pair.difference == pytest.approx(other.mean() * 100 - one.mean() * 100)
    assert pair.p_seeds == pytest.approx(expected.pvalue)
    assert (pair.low, pair.high) == pytest.approx((low, high))


def test_the_variance_is_pooled_over_all_candidates():
    candidates = [runs(80, 84, 79), runs(70, 78), runs(81), runs(60, 61, 62, 66)]
    verdict = judge(candidates)
    accuracies = [c.mean(1) * 100 for c in candidates]
    within = sum(((a - a.mean()) ** 2).sum() for a in accuracies)
    # the F statistic's own denominator, from scipy, is the pooled variance
    grand = np.concatenate(accuracies).mean()
    between = sum(len(a) * (a.mean() - grand) ** 2 for a in accuracies) / 3
    assert verdict.pooled_sd**2 == pytest.approx(between / stats.f_oneway(*accuracies).statistic)
    assert verdict.pooled_sd**2 == pytest.approx(within / 6)
    for pair in verdict.pairs:
        own, best = accuracies[pair.index], accuracies[verdict.best]
        error = verdict.pooled_sd * math.sqrt(1 / len(own) + 1 / len(best))
        assert pair.p_seeds == pytest.approx(2 * stats.t.sf(-pair.difference / error, df=6))
        margin = stats.t.ppf(0.975, df=6) * error
        assert (pair.low, pair.high) == pytest.approx((pair.difference - margin, pair.difference + margin))


def test_the_bootstrap_equals_a_loop_over_images():
    generator = np.random.default_rng(1)
    candidates = [scattered(generator, 3, 60, 0.75), scattered(generator, 2, 60, 0.7), scattered(generator, 3, 60, 0.5)]
    verdict = judge(candidates, resamples=4000)
    best = candidates[verdict.best]
    for pair in verdict.pairs:
        ahead = [best[:, i].mean() - candidates[pair.index][:, i].mean() for i in range(60)]
        behind = 0
        for _ in range(4000):
            behind += sum(ahead[i] for i in generator.integers(60, size=60)) <= 1e-9
        expected = min(1, 2 * (behind + 1) / 4001)
        assert pair.p_images == pytest.approx(expected, abs=5 * math.sqrt(max(expected, 1e-3) * 2 / 4000))
    assert any(0.02 < pair.p_images < 0.9 for pair in verdict.pairs)  # or the loop would not say much


def test_the_bootstrap_is_paired():
    # half the images are hard for both: unpaired they would drown a difference of 3 images in 100
    one, other = runs(53, 53, 54), runs(45, 44, 45)
    assert judge([one, other]).pairs[0].p_images < 0.01
    unpaired = np.concatenate([other[:, 45:], other[:, :45]], axis=1)
    assert judge([one, unpaired]).pairs[0].p_images > 0.1


def test_blocks_do_not_change_the_draws(monkeypatch):
    generator = np.random.default_rng(2)
    candidates = [scattered(generator, 3, 50, 0.7), scattered(generator, 3, 50, 0.65)]
    whole = judge(candidates)
    monkeypatch.setattr(statistics, "_BLOCK", 333)
    pair = judge(candidates).pairs[0]
    assert pair.p_images == pytest.approx(whole.pairs[0].p_images, abs=0.05)
    assert sum(len(block) for block in statistics._draws(50, 2000, 0)) == 2000
    assert all((block.sum(1) == 50).all() for block in statistics._draws(50, 2000, 0))


def test_the_larger_p_counts_and_holm_corrects_it():
    generator = np.random.default_rng(3)
    candidates = [scattered(generator, 3, 400, share) for share in (0.8, 0.77, 0.7, 0.74, 0.6)]
    verdict = judge(candidates)
    worse = {pair.index: max(pair.p_seeds, pair.p_images) for pair in verdict.pairs}
    order = sorted(worse, key=worse.get)
    running = 0.0
    for factor, index in zip((4, 3, 2, 1), order, strict=True):
        running = max(running, min(1.0, factor * worse[index]))
        (pair,) = [p for p in verdict.pairs if p.index == index]
        assert pair.p_holm == pytest.approx(running)
    assert any(p.p_seeds > p.p_images for p in verdict.pairs) and any(p.p_seeds < p.p_images for p in verdict.pairs)
    assert [pair.index for pair in verdict.pairs] == [c for c in range(5) if c != verdict.best]


def test_a_winner_needs_every_pair():
    clear = [runs(90, 91, 90), runs(60, 61, 60), runs(50, 51, 50)]
    assert judge(clear).winner == 0
    contested = [*clear, runs(90, 90, 90)]
    verdict = judge(contested)
    assert verdict.best == 0 and verdict.winner is None
    assert [pair.p_holm < 0.05 for pair in verdict.pairs] == [True, True, False]


def test_intervals_of_means():
    accuracies = [[90.0, 92.0, 91.0], [80.0, 84.0], [70.0]]
    sd = math.sqrt((2 + 8) / 3)
    for values, (mean, low, high) in zip(accuracies, interval(accuracies), strict=True):
        expected = stats.t.interval(0.95, df=3, loc=np.mean(values), scale=sd / math.sqrt(len(values)))
        assert mean == pytest.approx(np.mean(values))
        assert (low, high) == pytest.approx(expected)
    assert interval([[90.0], [80.0]]) == [(90.0, None, None), (80.0, None, None)]
    assert interval([[90.0, 91.0]]) == [(90.5, None, None)]
    with pytest.raises(ValueError, match="candidate 1: no accuracies"):
        interval([[90.0], []])


# --- what would be needed


def test_seeds_needed_have_the_power_promised():
    candidates = [runs(80, 90, 85), runs(82, 78, 86)]
    verdict = judge(candidates)
    assert verdict.winner is None and verdict.images_needed is None
    generator = np.random.default_rng(4)

    def power(n):
        one = generator.normal(-verdict.pairs[0].difference, verdict.pooled_sd, (40_000, n))
        other = generator.normal(0, verdict.pooled_sd, (40_000, n))
        return (stats.ttest_ind(one, other, axis=1).pvalue <= 0.05).mean()

    assert power(verdict.seeds_needed) > 0.8 - 0.01
    assert power(verdict.seeds_needed - 1) < 0.8 + 0.01


def test_seeds_needed_count_every_pair():
    two = judge([runs(80, 90, 85), runs(82, 78, 86)]).seeds_needed
    # the same difference four times: each at Holm's step, the variance from more candidates
    five = judge([runs(80, 90, 85), *[runs(82, 78, 86)] * 4]).seeds_needed
    assert two < five < 2 * two


def test_seeds_needed_are_more_than_there_are():
    generator = np.random.default_rng(5)
    seen = 0
    for _ in range(300):
        ability = generator.normal(0.6, 0.05, (4, 3)) + np.array([0.08, 0, 0, -0.1])[:, None]
        candidates = [generator.random((3, 2000)) < a[:, None] for a in ability]
        verdict = judge(candidates, resamples=100)
        if verdict.seeds_needed is not None:
            seen += 1
            assert verdict.winner is None and verdict.seeds_needed > 3
    assert seen > 50


def test_no_power_is_undefined():
    # a far third beside a close second: its noncentrality is where scipy's function returns nan
    verdict = judge([runs(500, 501, 503, images=1000), runs(500, 501, 502, images=1000), runs(1, 2, 3, images=1000)])
    sd, gap = verdict.pooled_sd, -verdict.pairs[0].difference
    assert verdict.seeds_needed == pytest.approx(2 * (1.96 + 0.84) ** 2 * (sd / gap) ** 2, rel=0.05)


def test_images_that_limit():
    # with every seed the same 6 of 100 images are gained and 2 lost: no seed will change that
    one, other = runs(70, 70, 70), runs(64, 64, 64)
    one[:, :2] = False
    verdict = judge([one, other])
    (pair,) = verdict.pairs
    assert pair.p_seeds <= 0.05 < pair.p_images
    assert verdict.winner is None and verdict.seeds_needed is None
    # sign test by normal approximation: mean 0.04, variance 0.08 - 0.04 ** 2
    assert verdict.images_needed == math.ceil((0.08 - 0.0016) * (1.959964 + 0.841621) ** 2 / 0.0016)
    text = sentence(verdict, NAMES)
    assert "The 100 test images are what limits" in text and "about 390 test images would be needed" in text
    # four times as many such images are told apart
    many = [np.tile(c, (1, 4)) for c in (one, other)]
    assert judge(many).winner == 0


def test_more_seeds_average_out_what_single_runs_do():
    # all disagreement is noise of single runs: seeds are needed, images are not, though the bootstrap fails too
    generator = np.random.default_rng(6)
    abilities = (0.45, 0.5, 0.55), (0.435, 0.485, 0.535)
    verdict = judge([np.concatenate([scattered(generator, 1, 1000, a) for a in own]) for own in abilities])
    assert verdict.pairs[0].p_images > 0.05 and verdict.pairs[0].p_seeds > 0.05
    assert verdict.seeds_needed is not None and verdict.images_needed is None
    # the same runs, and images that favour either candidate whatever the seed
    one, other = (scattered(generator, 3, 1000, share) for share in (0.5, 0.475))
    one[:, :300], other[:, :300] = True, False
    one[:, 300:600], other[:, 300:600] = False, True
    verdict = judge([one, other])
    assert verdict.seeds_needed is not None and verdict.images_needed > 1000


# --- where little can be said


def test_one_seed_names_no_winner():
    verdict = judge([runs(90), runs(10)])
    (pair,) = verdict.pairs
    assert (verdict.best, verdict.winner, verdict.pooled_sd) == (0, None, None)
    assert (pair.low, pair.high, pair.p_seeds, pair.p_holm, verdict.seeds_needed) == (None,) * 5
    assert pair.difference == -80 and pair.p_images < 0.01
    text = sentence(verdict, NAMES)
    assert "nothing can be said about the spread" in text and "80.00 points above C-C-T-T" in text
    level = sentence(judge([runs(90), runs(90), runs(10)]), NAMES)
    assert "C-C-C-C and C-C-T-T have the same accuracy" in level


def test_one_candidate_is_not_compared():
    verdict = judge([runs(90, 92)])
    assert (verdict.best, verdict.winner, verdict.pairs) == (0, None, ())
    assert sentence(verdict, NAMES) == "Only C-C-C-C was trained: there is nothing to compare it with."


@pytest.mark.parametrize("rights", [(90, 92, 91), (90, 90, 90), (100, 100, 100), (0, 0, 0)])
def test_equals_are_never_told_apart(rights):
    verdict = judge([runs(*rights), runs(*rights)])
    (pair,) = verdict.pairs
    assert (pair.difference, pair.p_seeds, pair.p_images, pair.p_holm) == (0, 1, 1, 1)
    assert (verdict.winner, verdict.seeds_needed, verdict.images_needed) == (None, None, None)
    text = sentence(verdict, NAMES)
    assert "C-C-T-T cannot be told apart" in text and "level with" in text and "-0.00 to" not in text


def test_a_tie_is_exact_whatever_the_number_of_seeds():
    # 0.7 of the images in all, as 7/10 and as 21/30: no rounding error may break the tie
    verdict = judge([runs(6, 7, 8, images=10), runs(7, images=10)])
    assert verdict.best == 0 and verdict.pairs[0].difference == 0 and verdict.pairs[0].p_seeds == 1


def test_no_variance_and_different_means():
    verdict = judge([runs(70, 70, 70), runs(50, 50, 50), runs(60, 60, 60)])
    assert verdict.winner == 0 and verdict.pooled_sd == 0
    assert all(p.p_seeds == 0 < p.p_images and p.low == p.high == p.difference for p in verdict.pairs)


def test_few_images_cannot_decide():
    assert judge([np.ones((3, 1)), np.zeros((3, 1))]).pairs[0].p_images == 1
    assert judge([np.ones((3, 5)), np.zeros((3, 5))]).winner is None  # five tosses: p is 1/16 at best
    assert judge([np.ones((3, 6)), np.zeros((3, 6))]).pairs[0].p_images == 1 / 32


def test_one_seed_beside_three():
    verdict = judge([runs(90, 92, 91), runs(60), runs(70, 71, 73)])
    sd = math.sqrt((2 + 14 / 3) / 4)
    assert verdict.pooled_sd == pytest.approx(sd) and verdict.seeds == (3, 1, 3)
    assert verdict.pairs[0].p_seeds == pytest.approx(2 * stats.t.sf(31 / (sd * math.sqrt(4 / 3)), df=4))
    assert verdict.winner == 0


def test_many_candidates_still_find_a_winner():
    # 100 pairs: 2,000 draws cannot show a p as small as Holm asks for
    verdict = judge([runs(90, 91, 92), *[runs(40, 41, 42)] * 100], resamples=10)
    assert verdict.winner == 0


def test_the_seed_decides_the_draws():
    generator = np.random.default_rng(7)
    candidates = [scattered(generator, 3, 100, 0.7), scattered(generator, 3, 100, 0.6)]
    assert judge(candidates, seed=1) == judge(candidates, seed=1)
    assert len({judge(candidates, seed=seed).pairs[0].p_images for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "no candidates"),
        ([runs(1, 2), np.ones(100)], r"candidate 1: shape \(100,\)"),
        ([np.ones((0, 5))], r"candidate 0: shape \(0, 5\)"),
        ([runs(1), runs(1, images=99)], "candidate 1 was tested on 99 images, candidate 0 on 100"),
    ],
)
def test_what_is_refused(candidates, message):
    with pytest.raises(ValueError, match=message):
        judge(candidates)


def test_ten_thousand_images_fit():
    generator = np.random.default_rng(8)
    candidates = [scattered(generator, 3, 10_000, 0.9) for _ in range(10)]
    tracemalloc.start()
    judge(candidates)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


# --- the sentence


def test_a_winner_is_named_with_its_lead():
    verdict = judge([runs(60, 61, 62), runs(90, 91, 92), runs(70, 71, 72)])
    assert sentence(verdict, NAMES) == (
        "C-C-T-T is the best: 20.00 points above T-T-T-T, 95 % interval 18.00 to 22.00; "
        "all 2 others are told apart from it."
    )
    assert "no comparison of equals" in sentence(verdict, NAMES, equal_budget=False)


def test_no_winner_says_who_is_close_and_what_would_help():
    verdict = judge([runs(85, 80, 90), runs(82, 78, 86), runs(20, 20, 20), runs(84, 79, 85)])
    text = sentence(verdict, NAMES)
    assert text.startswith("No winner: C-C-C-C has the highest mean accuracy, but C-T-T-T and C-C-T-T cannot be")
    assert "2.33 points above C-T-T-T, 95 % interval" in text and "T-T-T-T" not in text
    assert f"about {verdict.seeds_needed} seeds each would be needed" in text


# --- how often simulated studies crown a winner


@pytest.fixture
def shared_draws(monkeypatch):
    """The draws of images, which a fixed seed makes the same for every study, are made once."""
    draws = statistics._draws
    monkeypatch.setattr(statistics, "_draws", cache(lambda *args: list(draws(*args))))


def simulated(studies, seeds, *, lead=0.0, images=500, spread=(0.1,) * 5, taste=0.3, seed=0):
    """Studies of five candidates, each [seeds, images]: right where ability exceeds difficulty.

    `lead`: how much abler the first is. `spread`: of the abilities over seeds. `taste`: how far candidates differ in
    which images they find hard, whatever the seed; each study has images and tastes of its own. All in units of the
    images' difficulty, which varies by 1, as does a single answer.
    """
    generator = np.random.default_rng(seed)
    for _ in range(studies):
        difficulty = generator.normal(size=images)
        study = []
        for c, sd in enumerate(spread):
            ability = (lead if c == 0 else 0.0) + sd * generator.standard_normal((seeds, 1))
            noise = generator.standard_normal((seeds, images))
            study.append(ability + noise > difficulty + taste * generator.standard_normal(images))
        yield study


def rate(studies, winner=None):
    named = [judge(study).winner for study in studies]
    return np.mean([w is not None if winner is None else w == winner for w in named])


def three_deviations(**kind):
    """The `lead` that raises the expected accuracy by three standard deviations of a run's accuracy.

    An answer's margin is normal with variance 2 and small change, and half of them are right.
    """
    sds = [c.mean(1).var(ddof=1) for study in simulated(400, 5, **kind) for c in study]
    total = math.sqrt(2 + kind["taste"] ** 2 + kind["spread"][0] ** 2)
    return total * stats.norm.ppf(0.5 + 3 * math.sqrt(np.mean(sds)))


@pytest.mark.parametrize("seeds", [3, 5])
def test_equals_are_rarely_crowned(seeds, shared_draws):
    assert rate(simulated(STUDIES, seeds, taste=0.0, images=500, seed=seeds)) <= 0.05


@pytest.mark.parametrize("seeds", [3, 5])
def test_few_images_rarely_crown_equals(seeds, shared_draws, monkeypatch):
    kind = {"images": 200, "spread": (0.02,) * 5, "taste": 2.0, "seed": 10 + seeds}
    assert rate(simulated(STUDIES, seeds, **kind)) <= 0.05
    # without the bootstrap, candidates to whose taste these images happen to be are crowned
    monkeypatch.setattr(statistics, "_bootstrap", lambda right, best, others, *_: [0.0] * len(others))
    assert rate(simulated(200, seeds, **kind)) > 0.08


def test_one_noisy_candidate_is_rarely_crowned(shared_draws):
    assert rate(simulated(STUDIES, 3, spread=(0.3, 0.1, 0.1, 0.1, 0.1), images=500, taste=0.0, seed=20)) <= 0.05


@pytest.mark.parametrize(("seeds", "least", "most"), [(3, 0.7, 0.85), (5, 0.93, 1.0)])
def test_three_deviations_are_found(seeds, least, most, shared_draws):
    kind = {"spread": (0.1,) * 5, "taste": 0.0, "images": 1000}
    found = rate(simulated(STUDIES, seeds, lead=three_deviations(**kind), seed=30 + seeds, **kind), winner=0)
    assert least <= found <= most


def test_a_tie_on_resampled_images_does_not_count_for_the_best():
    """Ahead on five images, behind on two, of forty: what a resampled split gives is a multinomial draw."""
    best, other = np.zeros((2, 40), bool), np.zeros((2, 40), bool)
    best[:, :5], other[:, 5:7] = True, True
    drawn = np.random.default_rng(1).multinomial(40, [5 / 40, 2 / 40, 33 / 40], size=100_000)
    not_ahead = (drawn[:, 0] <= drawn[:, 1]).mean()
    tied = (drawn[:, 0] == drawn[:, 1]).mean()
    [pair] = judge([best, other], resamples=10_000).pairs
    assert tied > 0.05  # so that it matters where they are counted
    assert abs(pair.p_images - 2 * not_ahead) < 0.02


# planted by scripts/mutate
FAULTS = (
    ("the smaller of the two p-values counts", "_holm([max(both) for", "_holm([min(both) for"),
    (
        "every p is corrected by the number of all pairs",
        "(len(p_values) - rank) * p_values[i]",
        "len(p_values) * p_values[i]",
    ),
    ("corrected p-values may fall again", "largest = max(largest, min(", "largest = max(0.0, min("),
    ("a tie on resampled images counts for the best", "(counts @ ahead <= 0)", "(counts @ ahead < 0)"),
    ("one image is enough for a winner", "np.maximum(p, coins)", "p"),
    (
        "the pooled variance has one degree of freedom for every run",
        "freedom = sum(len(v) - 1 for v in values)",
        "freedom = sum(len(v) for v in values) - 1",
    ),
)
