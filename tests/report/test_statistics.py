"""The statistics against known answers: planted effects, exact distributions, and the functions of scipy and statsmodels."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_statsmodels
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from editeval.report.intervals import Interval, wilson
from editeval.report.statistics import (
    Estimate,
    Moments,
    area_weights,
    combine,
    fieller,
    first_lost,
    holm,
    last_kept,
    mcnemar,
    paired_bootstrap,
    paired_change,
    retained,
)
from editeval.report.statistics_across import between_sd, spearman, variances_apart

REPEATS = 1500
# Two-sided 99.9% range of a share that is truly 0.95 over REPEATS: a correct interval fails this once in a thousand seeds.
COVERED = stats.binom.ppf([0.0005, 0.9995], REPEATS, 0.95) / REPEATS


def answers(random: np.random.Generator, *, n: int, orders: int, base: float, kept: float, chance: float, order_sd: float = 0.0) -> tuple:
    """Items that the unedited model gets right with `base`; edits turn a known item to guessing so that r is `kept` on average."""
    known = random.random(n) < (base - chance) / (1 - chance)
    before = np.where(known, 1.0, random.random(n) < chance)
    after = []
    for _ in range(orders):
        still = random.random(n) < np.clip(kept + order_sd * random.standard_normal(), 0, 1)
        guesses = (random.random(n) < chance).astype(float)
        after.append(np.where(known & still, 1.0, np.where(known, guesses, before)))
    return before, np.array(after)


def ideal_width(values: list[float]) -> float:
    """The width of the interval of one who knows how much the estimate varies."""
    return 2 * stats.norm.ppf(0.975) * float(np.std(values))


# -- tests of differences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 5), (1, 9), (12, 3), (0, 6), (300, 250)])
def test_mcnemar_is_the_exact_binomial_test_of_the_items_that_changed(lost: int, gained: int) -> None:
    before = np.array([1.0] * lost + [0.0] * gained + [1.0] * 7 + [0.0] * 4)
    after = np.array([0.0] * lost + [1.0] * gained + [1.0] * 7 + [0.0] * 4)
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(before, after) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("lost", "gained"), [(5, 5), (1, 9), (12, 3), (0, 6), (300, 250)])
def test_mcnemar_agrees_with_statsmodels(lost: int, gained: int) -> None:
    before = np.array([1.0] * lost + [0.0] * gained + [1.0] * 7 + [0.0] * 4)
    after = np.array([0.0] * lost + [1.0] * gained + [1.0] * 7 + [0.0] * 4)
    assert mcnemar(before, after) == pytest.approx(mcnemar_of_statsmodels([[7, lost], [gained, 4]], exact=True).pvalue, rel=1e-9)


def test_mcnemar_calls_no_effect_an_effect_at_most_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    found = 0
    for _ in range(REPEATS):
        before = (random.random(200) < 0.6).astype(float)
        changed = random.random(200) < 0.1
        found += mcnemar(before, np.where(changed, random.random(200) < 0.6, before)) <= 0.05
    assert found / REPEATS <= stats.binom.ppf(0.9995, REPEATS, 0.05) / REPEATS


def test_the_bootstrap_interval_covers_a_planted_difference_of_graded_scores() -> None:
    random = np.random.default_rng(2)
    repeats, covered, detected = 400, 0, 0
    for _ in range(repeats):
        before = random.random(150)
        interval, p_value = paired_bootstrap(before, before - 0.03 + 0.1 * random.standard_normal(150), seed=3, resamples=500)
        covered += interval.low <= -0.03 <= interval.high
        detected += p_value <= 0.05
    assert 0.91 <= covered / repeats <= 0.985
    assert detected / repeats > 0.9  # the effect is 3.7 standard errors


def test_the_bootstrap_calls_no_effect_an_effect_five_times_in_a_hundred() -> None:
    random = np.random.default_rng(20)
    false = 0
    for repeat in range(REPEATS):
        before = random.random(100)
        false += paired_bootstrap(before, before + 0.1 * random.standard_normal(100), seed=repeat, resamples=199)[1] <= 0.05
    low, high = stats.binom.ppf([0.0005, 0.9995], REPEATS, 0.05) / REPEATS
    assert low <= false / REPEATS <= high


def test_the_bootstrap_agrees_with_scipys() -> None:
    random = np.random.default_rng(4)
    before, after = random.random(80), random.random(80) - 0.1
    ours, _ = paired_bootstrap(before, after, seed=0)
    theirs = stats.bootstrap((after - before,), np.mean, method="percentile", random_state=0, n_resamples=4000).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_holm_gives_the_textbook_adjustment_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == ()
    assert holm([0.5, 0.9]) == (1.0, 1.0)


@pytest.mark.parametrize("number", [1, 2, 7, 40])
def test_holm_agrees_with_statsmodels(number: int) -> None:
    p_values = np.random.default_rng(number).random(number) ** 4  # many of them small
    assert holm(list(p_values)) == pytest.approx(tuple(multipletests(p_values, method="holm")[1]))


def test_holm_keeps_the_chance_of_any_false_finding_at_five_in_a_hundred() -> None:
    random = np.random.default_rng(5)
    false = sum(min(holm(list(random.random(12)))) <= 0.05 for _ in range(REPEATS))
    assert false / REPEATS <= stats.binom.ppf(0.9995, REPEATS, 0.05) / REPEATS


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 17), (500, 1000)])
def test_wilson_agrees_with_scipy(successes: int, n: int) -> None:
    theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
    ours = wilson(successes, n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 17), (500, 1000), (2.5, 7.3)])  # the last: an effective number of trials
def test_wilson_agrees_with_statsmodels(successes: float, n: float) -> None:
    ours = wilson(successes, n)
    assert (ours.low, ours.high) == pytest.approx(proportion_confint(successes, n, method="wilson"), abs=1e-9)


# -- retained ability ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "kept", "base"), [(120, 0.9, 0.6), (400, 0.5, 0.5), (400, 0.0, 0.5), (1500, 0.95, 0.45)])
def test_the_interval_of_retained_ability_covers_the_planted_share_over_items(n: int, kept: float, base: float) -> None:
    random = np.random.default_rng(n)
    covered = 0
    for _ in range(REPEATS):
        before, after = answers(random, n=n, orders=1, base=base, kept=kept, chance=0.25)
        interval = retained(before, after, chance=0.25, pool="items").interval
        covered += interval.low <= kept <= interval.high
    assert COVERED[0] <= covered / REPEATS <= 0.99  # the two added pairs make small samples a little wide, never narrow


def test_with_several_orders_the_interval_covers_the_mean_over_orders_not_that_of_the_orders_seen() -> None:
    random = np.random.default_rng(6)
    repeats, both, items_alone = 600, 0, 0
    widths, values = [], []
    for _ in range(repeats):
        before, after = answers(random, n=500, orders=4, base=0.7, kept=0.6, chance=0.25, order_sd=0.15)
        interval = retained(before, after, chance=0.25, pool="items").interval
        both += interval.low <= 0.6 <= interval.high
        alone = retained(before, after.mean(0, keepdims=True), chance=0.25, pool="items").interval
        items_alone += alone.low <= 0.6 <= alone.high
        widths.append(interval.high - interval.low)
        values.append(interval.value)
    assert 0.92 <= both / repeats <= 0.98
    assert np.median(widths) <= 1.7 * ideal_width(values)  # the quantile of t of four orders is 1.6 times the normal one
    assert items_alone / repeats < 0.8  # what leaving the orders out would cost


def test_retained_ability_is_one_where_nothing_changed_and_is_not_certain_of_it() -> None:
    before = np.array([1.0, 0.0] * 30)
    found = retained(before, before[None], chance=0.25, pool="items")
    assert found.interval.value == 1.0
    assert found.interval.low < 0.9 < found.interval.high
    many = np.tile(before, 100)
    assert retained(many, many[None], chance=0.25, pool="items").interval.low > 0.99


def test_a_change_of_no_item_is_zero_and_is_not_certain_of_it_whatever_the_items_weigh() -> None:
    for before in (np.array([1.0, 0.0, 1.0, 0.0, 1.0]), np.array([1.5, 0.0, 0.75, 0.0, 0.75])):
        interval = paired_change(before, np.array([before, before]), pool="items").interval()
        assert interval.value == 0
        assert interval.low < -0.4
    graded = paired_change(np.array([0.2, 0.4, 0.6]), np.array([[0.1, 0.3, 0.5]]), pool="items")
    assert graded.interval().high == pytest.approx(-0.1)


def test_a_model_at_chance_bounds_nothing() -> None:
    random = np.random.default_rng(7)
    before = (random.random(200) < 0.25).astype(float)
    found = retained(before, before[None][:, ::-1], chance=0.25, pool="items")
    assert not found.can_show_damage
    assert (found.interval.low, found.interval.high) == (-math.inf, math.inf)


def test_fieller_reduces_to_the_normal_interval_when_the_denominator_is_known() -> None:
    found = fieller(Moments(numerator=3.0, denominator=2.0, var_top=0.04, var_bottom=0.0, covariance=0.0), quantile=1.96)
    assert (found.low, found.high) == pytest.approx((1.5 - 1.96 * 0.1, 1.5 + 1.96 * 0.1))


def test_fieller_agrees_with_a_bootstrap_of_the_ratio() -> None:
    random = np.random.default_rng(8)
    before, after = answers(random, n=600, orders=1, base=0.6, kept=0.7, chance=0.25)
    found = retained(before, after, chance=0.25, pool="items").interval
    draws = random.integers(0, 600, (4000, 600))
    ratios = (after[0][draws].mean(1) - 0.25) / (before[draws].mean(1) - 0.25)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=0.015)


# -- sums ------------------------------------------------------------------------------------------------------------------


def test_a_difference_on_the_same_items_is_paired_and_on_others_is_not() -> None:
    random = np.random.default_rng(9)
    influence = random.standard_normal(100)
    one = Estimate(value=0.8, pools={"a": influence})
    same, other = Estimate(value=0.7, pools={"a": influence + 0.01}), Estimate(value=0.7, pools={"b": influence})
    assert combine([(1, one), (-1, same)]).variance == pytest.approx(0.0, abs=1e-12)
    assert combine([(1, one), (-1, other)]).variance == pytest.approx(2 * one.variance)


def test_a_planted_difference_of_differences_is_covered() -> None:
    """Base and chat siblings asked the same items: the chat model keeps 0.1 more."""
    random = np.random.default_rng(10)
    repeats, covered = 500, 0
    widths, values = [], []
    for _ in range(repeats):
        before, base = answers(random, n=300, orders=3, base=0.7, kept=0.6, chance=0.25, order_sd=0.05)
        keeps = random.random(base.shape) < 0.25
        chat = np.where(keeps, before, base)  # a quarter of all items as before: r = 0.6 + 0.25 (1 - 0.6) = 0.7
        terms = [retained(before, after, chance=0.25, pool="items").estimate for after in (chat, base)]
        interval = combine([(1, terms[0]), (-1, terms[1])]).interval()
        covered += interval.low <= 0.1 <= interval.high
        widths.append(interval.high - interval.low)
        values.append(interval.value)
    # What an item does under one order and not under another is in both parts of the variance, over items and over orders: here, where
    # orders hardly differ, the interval is half as wide again as it could be.
    assert 0.92 <= covered / repeats <= 0.999
    assert np.median(widths) <= 1.7 * ideal_width(values)


def siblings(random: np.random.Generator, *, n: int, kept: tuple[float, float], order_sd: float) -> list[Estimate]:
    """Retained ability of two siblings that know the same items, under three orders of edits that move each by itself."""
    known = random.random(n) < 0.6
    before = np.where(known, 1.0, random.random(n) < 0.25)
    found = []
    for share in kept:
        still = random.random((3, n)) < np.clip(share + order_sd * random.standard_normal((3, 1)), 0, 1)
        after = np.where(known, np.where(still, 1.0, random.random((3, n)) < 0.25), before)
        found.append(retained(before, after, chance=0.25, pool="items").estimate)
    return found


@pytest.mark.parametrize(
    ("order_sd", "fewest", "most"),
    [
        (0.0, 0.002, 0.03),  # orders that do not differ: the cautious end, see above
        (0.05, 0.015, 0.09),
        (0.1, 0.02, 0.09),  # orders that do: Satterthwaite's degrees of freedom of three of them are themselves an estimate
    ],
)
def test_siblings_that_lose_the_same_are_told_apart_about_five_times_in_a_hundred(order_sd: float, fewest: float, most: float) -> None:
    random = np.random.default_rng(5)
    repeats, false = 600, 0
    for _ in range(repeats):
        base, chat = siblings(random, n=300, kept=(0.6, 0.6), order_sd=order_sd)
        interval = combine([(1, chat), (-1, base)]).interval()
        false += not interval.low <= 0 <= interval.high
    assert fewest <= false / repeats <= most


def test_siblings_of_which_one_keeps_more_are_told_apart() -> None:
    random = np.random.default_rng(5)
    pairs = [siblings(random, n=1000, kept=(0.6, 0.75), order_sd=0.0) for _ in range(200)]
    assert np.mean([combine([(1, chat), (-1, base)]).interval().low > 0 for base, chat in pairs]) > 0.95


def test_orders_have_few_degrees_of_freedom() -> None:
    estimate = Estimate(value=0.5, orders=(0.4, 0.6))
    assert estimate.quantile() == pytest.approx(stats.t.ppf(0.975, 1))
    assert Estimate(value=0.5, orders=(0.5,)).variance == 0


def test_the_p_value_of_an_estimate_agrees_with_its_interval_with_scipy_and_with_statsmodels() -> None:
    items = np.random.default_rng(13).standard_normal(30) + 0.3
    alone = Estimate(value=float(items.mean()), pools={"a": items})
    assert alone.p_value() == pytest.approx(stats.ttest_1samp(items, 0).pvalue)
    assert (alone.interval().low, alone.interval().high) == pytest.approx(DescrStatsW(items).tconfint_mean())
    orders = replace(alone, orders=(-0.2, 0.3, 0.8))
    edge = replace(orders, value=orders.quantile() * math.sqrt(orders.variance))
    assert edge.p_value() == pytest.approx(0.05)
    assert (Estimate(value=0.0).p_value(), Estimate(value=0.1).p_value()) == (1, 0)


def test_estimates_of_one_pool_need_the_same_items() -> None:
    with pytest.raises(ValueError, match="the same items"):
        combine([(1, Estimate(value=1, pools={"a": np.ones(3)})), (1, Estimate(value=1, pools={"a": np.ones(4)}))])


def test_the_area_of_a_straight_line_over_log_edits_is_its_middle() -> None:
    rungs = [0, 1, 10, 100]
    heights = np.log1p(rungs) / np.log1p(100)
    assert float(np.dot(area_weights(rungs), heights)) == pytest.approx(0.5)
    assert sum(area_weights(rungs)) == pytest.approx(1)


# -- along the edits -------------------------------------------------------------------------------------------------------


def point(rung: int, low: float, high: float) -> tuple[int, Interval]:
    return rung, Interval(value=(low + high) / 2, low=low, high=high)


def test_n90_is_the_last_rung_before_the_lower_bound_first_falls_below() -> None:
    curve = [point(1, 0.95, 1), point(10, 0.91, 1), point(20, 0.6, 0.92), point(50, 0.93, 1), point(100, 0.1, 0.3)]
    assert last_kept(curve, 0.9) == 10  # what recovers at 50 does not count: no one can rely on it
    assert last_kept(curve, 0.5) == 50
    assert first_lost(curve, 0.9) == 100
    assert last_kept([point(1, 0.2, 0.4)], 0.9) == 0
    assert first_lost([point(1, 0.2, 0.95)], 0.9) is None


# -- over models and benchmarks --------------------------------------------------------------------------------------------


def test_spearman_agrees_with_scipy_and_small_samples_are_permuted() -> None:
    x, y = [1.0, 2, 3, 4, 5, 6], [0.0, 0, 0.2547, 0.2272, 0.0189, 0.0263]  # arXiv 2410.18785, Table 4: ROME, 10 edits, MMLU
    interval, p_value = spearman(x, y)
    assert interval.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert p_value > 0.3
    assert interval.low < 0 < interval.high
    exact = np.mean([abs(stats.spearmanr(x, shuffled).statistic) >= interval.value - 1e-9 for shuffled in itertools.permutations(y)])
    assert p_value == pytest.approx(float(exact))


def test_spearmans_interval_covers_a_planted_correlation() -> None:
    random = np.random.default_rng(11)
    rho = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's of a bivariate normal with Pearson's 0.6
    repeats = 600
    pairs = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], (repeats, 40))
    covered = sum((found := spearman(list(pair[:, 0]), list(pair[:, 1]))[0]).low <= rho <= found.high for pair in pairs)
    assert 0.92 <= covered / repeats <= 0.98


def few_sizes(n: int, pearson: float) -> tuple[list[tuple[Interval, float]], np.ndarray]:
    """Spearman's interval and p of each rho that n ranks gave in many draws of a bivariate normal, and the share of draws with it."""
    draws = np.random.default_rng(21).multivariate_normal([0, 0], [[1, pearson], [pearson, 1]], (4000, n))
    ranks = draws.argsort(1).argsort(1)  # (draws, n, 2)
    _, first, counts = np.unique(((ranks[..., 0] - ranks[..., 1]) ** 2).sum(1), return_index=True, return_counts=True)
    return [spearman(list(ranks[draw, :, 0]), list(ranks[draw, :, 1])) for draw in first], counts / counts.sum()


@pytest.mark.parametrize("n", [5, 6, 7])
@pytest.mark.parametrize("pearson", [0.0, 0.3, 0.6, 0.9])
def test_spearmans_interval_of_as_few_sizes_as_a_family_has_covers_a_planted_correlation(n: int, pearson: float) -> None:
    rho = 6 / math.pi * math.asin(pearson / 2)
    found, shares = few_sizes(n, pearson)
    covered = float(np.dot([interval.low <= rho <= interval.high for interval, _ in found], shares))
    assert 0.94 <= covered <= 0.997


@pytest.mark.parametrize(("n", "fewest"), [(5, 0.01), (6, 0.02), (7, 0.02)])  # of five sizes only the two perfect orders say anything
def test_sizes_that_do_not_matter_are_said_to_matter_at_most_as_often_as_claimed(n: int, fewest: float) -> None:
    found, shares = few_sizes(n, 0.0)
    assert fewest <= float(np.dot([not interval.low <= 0 <= interval.high for interval, _ in found], shares)) <= 0.05
    assert fewest <= float(np.dot([p_value <= 0.05 for _, p_value in found], shares)) <= 0.06  # 0.05, and the chance of 4,000 draws


@pytest.mark.parametrize("n", [4, 5, 7, 12])
def test_a_perfect_rank_correlation_of_few_points_is_not_certain(n: int) -> None:
    interval, p_value = spearman(list(range(n)), list(range(n)))
    assert interval.low < 0.99 < interval.high == pytest.approx(1)
    assert (interval.low > 0) == (p_value < 0.05)
    down, _ = spearman(list(range(n)), list(range(n))[::-1])
    assert (down.low, down.high) == pytest.approx((-1, -interval.low))


def test_a_constant_series_has_no_rank_correlation() -> None:
    interval, p_value = spearman([1, 2, 3, 4, 5], [1, 1, 1, 1, 1])
    assert math.isnan(interval.value)
    assert (interval.low, interval.high, p_value) == (-1, 1, 1)


@pytest.mark.parametrize("true_sd", [0.0, 0.05, 0.3])
def test_the_spread_between_benchmarks_is_covered(true_sd: float) -> None:
    random = np.random.default_rng(12)
    repeats, covered = 300, 0
    for _ in range(repeats):
        variances = random.uniform(0.001, 0.004, 7)
        values = 0.6 + true_sd * random.standard_normal(7) + np.sqrt(variances) * random.standard_normal(7)
        interval = between_sd(list(values), list(variances))
        covered += interval.low <= true_sd <= interval.high
    assert covered / repeats >= 0.91


def test_the_spread_between_benchmarks_is_that_of_statsmodels() -> None:
    random = np.random.default_rng(22)
    values, variances = 0.6 + 0.2 * random.standard_normal(7), random.uniform(0.001, 0.004, 7)
    theirs = combine_effects(values, variances, method_re="iterated", atol=1e-10).tau2  # Paule and Mandel's
    assert between_sd(list(values), list(variances)).value == pytest.approx(math.sqrt(theirs), rel=1e-4)


def test_what_orders_move_in_all_benchmarks_alike_hides_no_spread_between_them() -> None:
    items = np.array([-0.1, 0.1] * 500)
    shared = [Estimate(value=m, pools={str(m): items}, orders=(m - 0.3, m, m + 0.3)) for m in (0.2, 0.5, 0.8)]
    assert variances_apart(shared) == pytest.approx([one.item_variance for one in shared])
    assert between_sd([one.value for one in shared], variances_apart(shared)).low > 0.1
    own = [Estimate(value=0.5, orders=orders) for orders in ((0.4, 0.6), (0.6, 0.4))]
    assert variances_apart(own) == pytest.approx([2 * one.order_variance for one in own])  # all of it is theirs: M / (M - 1)


def test_equal_values_have_no_spread() -> None:
    found = between_sd([0.5, 0.5, 0.5], [0.01, 0.01, 0.01])
    assert (found.value, found.low) == (0, 0)
