"""Whether a difference between two models on the same samples is more than chance.

Pure functions on arrays with one row per sample: a value and a weight. A metric is an aggregation of the sum of the values over
the sum of the weights: an accuracy has weights of one, a perplexity log-likelihoods over tokens. Pairing the samples takes out
what makes some of them hard for every model. p-values are of single tests, not corrected for how many are made.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8  # chance of telling a difference apart that "samples needed" grants
RESAMPLES = 4999

# What a metric makes of mean values; of log-likelihoods in nats, for the last two.
AGGREGATIONS: dict[str, Callable] = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: np.exp(-mean),
    "bits": lambda mean: -mean / math.log(2),
}
_SLOPES: dict[str, Callable] = {
    "mean": lambda mean: 1.0,
    "perplexity": lambda mean: math.exp(-mean),
    "bits": lambda mean: 1 / math.log(2),
}
# Of what cannot be negative: the aggregations of log-likelihoods, and the test of samples that are right or wrong.
NOT_NEGATIVE, RIGHT_OR_WRONG = ("perplexity", "bits"), "exact McNemar"


@dataclass(frozen=True)
class Difference:
    """A model's metric beside a baseline's on the same samples.

    Args:
        value (`float`): The model's metric.
        baseline_value (`float`): The baseline's.
        interval (`tuple[float, float]`): 95 % confidence interval of the difference.
        p (`float`): Two-sided p-value of no difference.
        test (`str`): `"exact McNemar"` for samples that are right or wrong, else `"paired bootstrap"`.
        retention (`float`, *optional*): Percent of the baseline's metric that is kept. Absent where lower is better (a ratio of
            perplexities is no share of anything) and when the baseline's is not above zero.
        retention_interval (`tuple[float, float]`, *optional*): Its 95 % confidence interval, where no resample has a zero.
        samples (`int`): Pairs.
        samples_needed (`int`, *optional*): Pairs that give an 80 % chance of telling a difference of this size apart at the
            5 % level; absent when there is no difference.
        verdict (`str`): `"better"`, `"worse"` or `"not distinguishable"`.
    """

    value: float
    baseline_value: float
    interval: tuple[float, float]
    p: float
    test: str
    retention: float | None
    retention_interval: tuple[float, float] | None
    samples: int
    samples_needed: int | None
    verdict: str

    @property
    def difference(self) -> float:
        """The model's metric less the baseline's."""
        return self.value - self.baseline_value

    def relative(self, aggregation: str | None) -> tuple[float, float, float]:
        """Return the difference in percent of the baseline's value, and the ends of its 95 % interval.

        The interval is the ratio's, where that was resampled. Else it is the difference's in percent of the baseline's value,
        which a resample's may exceed; so it ends at -100 for what cannot be negative: the share of samples that are right, and
        what is made of log-likelihoods.

        Args:
            aggregation (`str`, *optional*): The metric's, a key of `AGGREGATIONS`.
        """
        percent = 100 / abs(self.baseline_value)
        if self.retention_interval:
            low, high = (bound - 100 for bound in self.retention_interval)
        else:
            low, high = (percent * bound for bound in self.interval)
            if self.test == RIGHT_OR_WRONG or aggregation in NOT_NEGATIVE:
                low = max(low, -100.0)
        return percent * self.difference, low, high


def compare_paired(
    ours: np.ndarray, theirs: np.ndarray, aggregation: str = "mean", higher_is_better: bool = True, seed: int = 0
) -> Difference:
    """Compare two models on the same samples.

    Samples that are right or wrong are tested by McNemar's exact test, all others by the paired bootstrap, whose p-value is not
    taken below what unanimous signs of so few pairs could give. The intervals are bootstrap percentiles.

    Args:
        ours (`np.ndarray` of shape `(samples, 2)`): The model's values and weights.
        theirs (`np.ndarray` of shape `(samples, 2)`): The baseline's, of the same samples in the same order.
        aggregation (`str`, *optional*, defaults to `"mean"`): A key of `AGGREGATIONS`.
        higher_is_better (`bool`, *optional*, defaults to `True`): Direction of the metric.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.

    Raises:
        ValueError: for arrays that are no pairs, or fewer than two of them.
    """
    if ours.shape != theirs.shape or ours.ndim != 2 or ours.shape[1] != 2 or len(ours) < 2:
        raise ValueError(f"Want two arrays (samples, 2) of at least two samples; got shapes {ours.shape} and {theirs.shape}")
    count = len(ours)
    value, baseline = (float(_metric(rows, aggregation)) for rows in (ours, theirs))
    resampled = _resampled([ours, theirs], aggregation, seed)
    differences = resampled[0] - resampled[1]
    both = np.concatenate([ours, theirs])
    if np.isin(both[:, 0], (0, 1)).all() and (both[:, 1] == 1).all():
        p, test = mcnemar(ours[:, 0], theirs[:, 0]), RIGHT_OR_WRONG
    else:
        crossed = min((differences <= 0).mean(), (differences >= 0).mean())
        p, test = max(min(1.0, 2 * crossed), 1 / (RESAMPLES + 1), 2.0 ** (1 - count)), "paired bootstrap"
    retention, retention_interval = None, None
    if higher_is_better and baseline > 0:
        retention = 100 * value / baseline
        if (resampled[1] > 0).all():
            retention_interval = _interval(100 * resampled[0] / resampled[1])
    verdict = "not distinguishable"
    if p < 1 - LEVEL:
        verdict = "better" if (value > baseline) == higher_is_better else "worse"
    needed = samples_needed(value - baseline, float(differences.std()) * math.sqrt(count))
    if verdict == "not distinguishable" and needed is not None:
        needed = max(needed, count + 1)
    span = _interval(differences)
    return Difference(value, baseline, span, float(p), test, retention, retention_interval, count, needed, verdict)


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the p-value of McNemar's exact test: of the pairs that differ, each side wins half.

    Args:
        ours (`np.ndarray` of shape `(samples,)`): 1 where the model is right, else 0.
        theirs (`np.ndarray` of shape `(samples,)`): The baseline's.
    """
    wins, losses = int((ours > theirs).sum()), int((ours < theirs).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def samples_needed(difference: float, deviation: float) -> int | None:
    """Return how many pairs tell a difference apart with 80 % power at the 5 % level, or `None` for no difference.

    For samples that are right or wrong it is Connor's formula (Biometrics 43, 1987) for McNemar's test.

    Args:
        difference (`float`): The metric's.
        deviation (`float`): Standard deviation of one pair's difference.
    """
    if difference == 0:
        return None
    alpha, beta = stats.norm.ppf(1 - (1 - LEVEL) / 2), stats.norm.ppf(POWER)
    under_null = math.hypot(deviation, difference)  # where the mean difference is zero, the spread about it is this
    return max(2, math.ceil(((alpha * under_null + beta * deviation) / difference) ** 2))


def estimate(
    rows: np.ndarray, aggregation: str = "mean", seed: int = 0
) -> tuple[float, float | None, tuple[float, float] | None]:
    """Return a metric of one model, its standard error by the delta method and the bootstrap's 95 % interval; these two are
    `None` for a single sample.

    Args:
        rows (`np.ndarray` of shape `(samples, 2)`): Values and weights.
        aggregation (`str`, *optional*, defaults to `"mean"`): A key of `AGGREGATIONS`.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
    """
    (values, weights), count = rows.T, len(rows)
    mean = values.sum() / weights.sum()
    value = float(AGGREGATIONS[aggregation](mean))
    if count < 2:
        return value, None, None
    stderr = _SLOPES[aggregation](mean) * (values - mean * weights).std(ddof=1) * math.sqrt(count) / weights.sum()
    return value, float(stderr), _interval(_resampled([rows], aggregation, seed)[0])


def _metric(rows: np.ndarray, aggregation: str) -> np.ndarray:
    return AGGREGATIONS[aggregation](rows[:, 0].sum() / rows[:, 1].sum())


def _resampled(models: Sequence[np.ndarray], aggregation: str, seed: int) -> np.ndarray:
    """Return the models' metrics of shape `(models, resamples)`, all on the same resamples."""
    finish, count = AGGREGATIONS[aggregation], len(models[0])

    def statistic(*columns, axis):
        sums = [column.sum(axis=axis) for column in columns]
        return np.stack([finish(value / weight) for value, weight in zip(sums[::2], sums[1::2], strict=True)])

    columns = [column for rows in models for column in rows.T]
    batch = max(1, 1_000_000 // count)  # resamples whose samples are in memory at a time
    with np.errstate(over="ignore"):
        result = stats.bootstrap(columns, statistic, n_resamples=RESAMPLES, batch=batch, paired=True, vectorized=True,
                                 method="percentile", rng=np.random.default_rng(seed))  # fmt: skip
    return result.bootstrap_distribution


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2])
    return float(low), float(high)
