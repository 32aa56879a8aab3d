"""What the runs of `gspo-ops compare` show, cell by cell and claim by claim, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from statistics import mean, stdev
from typing import Any, NamedTuple

LEARNS = 0.05  # an arm learns at a rate if each of its tuning seeds gains at least this much
LEVEL = 0.05  # significance level of the family of all tests
_HUNDRED = 100.0
_ROUNDING = 1e-12
_PAIRS = (("GSPO", "GRPO"), ("GSPO", "GRPO, Routing Replay"), ("GRPO, Routing Replay", "GRPO"),
          ("GSPO-token", "GSPO"))  # fmt: skip


class Comparison(NamedTuple):
    """Difference of two arms' gains in a cell, each at its best rate, seed by seed.

    Attributes:
        cell: name of the cell.
        a, b: the arms.
        difference: mean gain of a minus that of b.
        error: standard error of the difference.
        p: p-value of a paired t-test, corrected for the number of all comparisons.
    """

    cell: str
    a: str
    b: str
    difference: float
    error: float
    p: float

    @property
    def verdict(self) -> int:
        """1 if a gains more, -1 if b does, 0 if the seeds are inconclusive."""
        return 0 if self.p >= LEVEL else int(math.copysign(1, self.difference))


class Results:
    """The contents of a `compare.json`, and what follows from them."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        self.cells: list[dict[str, Any]] = found["cells"]
        self.rates: list[float] = found["rates"]
        self._runs = {(r["cell"], r["arm"], r["rate"], r["seed"]): r for r in found["runs"]}

    def final(self, cell: str, arm: str) -> list[dict[str, Any]]:
        """Runs at the best rate, one for each final seed."""
        rate = self.best(cell, arm)
        return [self._runs[cell, arm, rate, seed] for seed in self.found["seeds"]]

    def tuning(self, cell: str, arm: str, rate: float) -> list[dict[str, Any]]:
        return [self._runs[cell, arm, rate, seed] for seed in self.found["tuning_seeds"]]

    def best(self, cell: str, arm: str) -> float:
        return best_rate(run for rate in self.rates for run in self.tuning(cell, arm, rate))

    def learns(self, cell: str, arm: str) -> list[float]:
        """The rates at which each tuning seed gains at least `LEARNS`."""
        return [
            rate for rate in self.rates
            if all(run["gain"] >= LEARNS for run in self.tuning(cell, arm, rate))
        ]  # fmt: skip

    def gains(self, cell: str, arm: str) -> list[float]:
        return [run["gain"] for run in self.final(cell, arm)]

    def mean_of(self, key: str, cell: str, arm: str, rate: float | None = None) -> float:
        """Mean of a metric over the final runs, or over the tuning runs at a rate."""
        runs = self.final(cell, arm) if rate is None else self.tuning(cell, arm, rate)
        values = [run[key] for run in runs if run.get(key) is not None]
        return mean(values) if values else math.nan

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """All comparisons, with Holm's correction for their number."""
        from scipy.stats import ttest_rel

        found = []
        for cell in self.cells:
            for a, b in _PAIRS:
                if {a, b} <= {*cell["arms"]}:
                    of_a, of_b = self.gains(cell["name"], a), self.gains(cell["name"], b)
                    differences = [x - y for x, y in zip(of_a, of_b, strict=True)]
                    difference, error = mean_and_error(differences)
                    if error > _ROUNDING:
                        p = float(ttest_rel(of_a, of_b).pvalue)
                    else:  # all differences are the same
                        p = float(abs(difference) <= _ROUNDING)
                    found.append(Comparison(cell["name"], a, b, difference, error, p))
        corrected = holm([one.p for one in found])
        return [one._replace(p=p) for one, p in zip(found, corrected, strict=True)]

    def compared(self, a: str, b: str) -> list[Comparison]:
        return [one for one in self.comparisons if (one.a, one.b) == (a, b)]

    def telling(self) -> str:
        """The cell in which GSPO and GRPO differ most, in standard errors."""
        most = max(
            self.compared("GSPO", "GRPO"), key=lambda one: abs(one.difference) / (one.error or 1e-9)
        )
        return most.cell


def best_rate(runs: Iterable[dict[str, Any]]) -> float:
    """The learning rate with the highest training reward over the last third of the steps."""
    by_rate: dict[float, list[float]] = {}
    for run in runs:
        rewards = run["reward"]
        by_rate.setdefault(run["rate"], []).append(mean(rewards[-max(len(rewards) // 3, 1) :]))
    return max(by_rate, key=lambda rate: mean(by_rate[rate]))


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's method, keeping their order."""
    found, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        found[place] = largest
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return mean(values), stdev(values) / math.sqrt(len(values))


def predicted_spread(k3: float, tokens: int) -> float:
    """Standard deviation of a response's log-ratio if its tokens' log-ratios were independent.

    k3 is half the mean square of a token's log-ratio, as long as the log-ratio is small.
    """
    return math.sqrt(2 * max(k3, 0.0) / tokens)


def report(found: dict[str, Any]) -> list[str]:
    """Return the tables and what they say about the paper's claims, as lines of Markdown."""
    results = Results(found)
    return [
        *_settings(results), "", *_cells(results), "", *_claims(results), "",
        *_lengths(results), "", _time(found),
    ]  # fmt: skip


def repeated(found: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """Compare the gains of two measurements in the cells of both, as lines of Markdown."""
    first, second = Results(earlier), Results(found)
    names = {cell["name"] for cell in second.cells}
    lines, close = [], []
    for cell in first.cells:
        for arm in cell["arms"] if cell["name"] in names else []:
            gains, errors = zip(
                *(mean_and_error(of.gains(cell["name"], arm)) for of in (first, second)),
                strict=True,
            )
            difference, error = gains[1] - gains[0], math.hypot(*errors)
            close.append(abs(difference) <= 2 * error)
            both = " | ".join(_arm(of, cell["name"], arm) for of in (first, second))
            lines.append(f"| {cell['name']} | {arm} | {both} | {difference:+.2f} ± {error:.2f} |")
    first_at, second_at = (f"{of['date']}, commit {of['commit']}" for of in (earlier, found))
    return [
        f"{sum(close)} of {len(close)} gains differ between two measurements ({first_at}; "
        f"{second_at}) by at most two standard errors of their difference. Entries are as above.",
        "",
        "| cell | | first | second | difference |",
        f"|{'---|' * 5}",
        *lines,
    ]


def _settings(results: Results) -> list[str]:
    found, config = results.found, results.found["config"]
    rollout = config["rollout"]
    rates = ", ".join(f"{rate:g}" for rate in results.rates)
    return [
        f"{config['steps']} rollouts of {rollout['prompts']} problems x {rollout['group_size']} "
        f"responses for every arm, {config['dtype']}. Each arm tries the learning rates {rates} "
        f"from {len(found['tuning_seeds'])} tuning seeds and is then measured from "
        f"{len(found['seeds'])} other seeds at the rate with the highest training reward. Entries "
        "are gains in held-out accuracy, mean and standard error over the final seeds, with, in "
        "parentheses, that rate and the rates at which every "
        f"tuning seed gains {LEARNS:g} or more. Churn is the fraction of chosen experts that the "
        "first update of a rollout replaces, and clipped is the fraction of clipped tokens, both "
        "at the arm's best rate.",
    ]  # fmt: skip


def _cells(results: Results) -> list[str]:
    arms = list(dict.fromkeys(arm for cell in results.cells for arm in cell["arms"]))
    lines = [
        f"| cell | before | {' | '.join(arms)} | churn: GSPO, GRPO | clipped: GSPO, GRPO |",
        f"|{'---|' * (len(arms) + 4)}",
    ]
    for cell in results.cells:
        name = cell["name"]
        before = mean(run["before"] for run in results.final(name, "GSPO"))
        columns = [_arm(results, name, arm) if arm in cell["arms"] else "" for arm in arms]
        pairs = [
            ", ".join(f"{100 * results.mean_of(key, name, arm):.2g}%" for arm in ("GSPO", "GRPO"))
            if shown else ""
            for key, shown in (("expert_churn", cell["kind"] == "moe"), ("clip_frac_tokens", True))
        ]  # fmt: skip
        lines.append(f"| {name} | {before:.2f} | {' | '.join([*columns, *pairs])} |")
    return lines


def _arm(results: Results, cell: str, arm: str) -> str:
    gain, error = mean_and_error(results.gains(cell, arm))
    learns = results.learns(cell, arm)
    stable = "none"
    if learns:
        stable = f"{learns[0]:g}" + (f" to {learns[-1]:g}" if len(learns) > 1 else "")
    return f"{gain:+.2f} ± {error:.2f} ({results.best(cell, arm):g}; {stable})"


# The claims


def _claims(results: Results) -> list[str]:
    moe = [c for c in results.cells if c["kind"] == "moe" and not c["engine"]]
    count = len(results.comparisons)
    lines = [
        f"What the paper claims, and where it holds here. Differences in gain are judged by paired "
        f"t-tests at level {LEVEL:g}, with Holm's correction for all {count} tests.",
        "",
        "- *More is learned from the same compute.* " + _judged(results.compared("GSPO", "GRPO")),
        "- *Stable where GRPO is not.* " + _stability(results),
        "- *Two orders of magnitude more tokens are clipped.* " + _clipping(results),
    ]
    if moe:
        needed = results.compared("GRPO, Routing Replay", "GRPO")
        lines += [
            "- *GRPO needs Routing Replay on MoE models.* " + _judged(needed),
            "- *GSPO does not need it.* GSPO against GRPO with Routing Replay: "
            + _judged(results.compared("GSPO", "GRPO, Routing Replay")),
        ]
    lines += _engine(results)
    graded = results.compared("GSPO-token", "GSPO")
    return [*lines, "- GSPO-token with a grade for each token, against GSPO: " + _judged(graded)]


def _judged(comparisons: Sequence[Comparison]) -> str:
    """List the cells in which a gains more, b gains more, or the seeds are inconclusive."""
    a, b = comparisons[0].a, comparisons[0].b
    parts = []
    for verdict, says in ((1, f"{a} gains more"), (-1, f"{b} gains more")):
        cells = [one for one in comparisons if one.verdict == verdict]
        parts.append(f"{says} in {_places(cells, _difference)}")
    unknown = [one for one in comparisons if not one.verdict]
    parts.append(f"these seeds are inconclusive in {_places(unknown, _difference)}")
    return "; ".join(parts) + "."


def _difference(one: Comparison) -> str:
    return f"{one.cell}: {one.difference:+.2f} ± {one.error:.2f}"


def _places(found: Sequence[Any], say: Callable[[Any], str]) -> str:
    cells = "cell" if len(found) == 1 else "cells"
    inside = f" ({'; '.join(map(say, found))})" if found else ""
    return f"{len(found)} {cells}{inside}"


def _stability(results: Results) -> str:
    """Compare the numbers of rates at which GSPO and GRPO learn."""
    cells = [(c["name"], *(len(results.learns(c["name"], arm)) for arm in ("GSPO", "GRPO")))
             for c in results.cells]  # fmt: skip

    def say(cell: tuple[str, int, int]) -> str:
        return f"{cell[0]}: {cell[1]} and {cell[2]}"

    wider, narrower = [c for c in cells if c[1] > c[2]], [c for c in cells if c[1] < c[2]]
    return (
        f"Among {len(results.rates)} rates, GSPO learns at more than GRPO in "
        f"{_places(wider, say)}, at fewer in {_places(narrower, say)}, and at equally many in "
        f"{_places([c for c in cells if c[1] == c[2]], say)}."
    )


def _clipping(results: Results) -> str:
    """Compare clip fractions at the same rate, the largest at which both learn."""
    factors = []
    for cell in results.cells:
        both = {*results.learns(cell["name"], "GSPO")} & {*results.learns(cell["name"], "GRPO")}
        if both:
            rate = max(both)
            gspo, grpo = (results.mean_of("clip_frac_tokens", cell["name"], arm, rate)
                          for arm in ("GSPO", "GRPO"))  # fmt: skip
            factors.append((cell["name"], rate, gspo / grpo if grpo else math.inf))

    def say(factor: tuple[str, float, float]) -> str:
        times = "none with GRPO" if math.isinf(factor[2]) else f"{factor[2]:.0f}"
        return f"{factor[0]}, at {factor[1]:g}: {times}"

    more = [f for f in factors if f[2] >= _HUNDRED]
    return (
        f"At the largest rate at which both learn, GSPO clips a hundred times as many tokens as "
        f"GRPO, or more, in {_places(more, say)}, and fewer in "
        f"{_places([f for f in factors if f[2] < _HUNDRED], say)}."
    )


def _engine(results: Results) -> list[str]:
    """Compare each cell that samples in bf16 with the same cell that does not."""
    lines = []
    exact = {(c["kind"], c["tokens"], c["mini_batches"], c["epochs"]): c["name"]
             for c in results.cells if not c["engine"]}  # fmt: skip
    for cell in results.cells:
        place = cell["kind"], cell["tokens"], cell["mini_batches"], cell["epochs"]
        if not cell["engine"] or place not in exact:
            continue
        costs = []
        for arm in ("GSPO", "GRPO"):
            pairs = zip(
                results.gains(cell["name"], arm), results.gains(exact[place], arm), strict=True
            )
            cost = mean_and_error([a - b for a, b in pairs])
            costs.append(f"{arm}'s gain changes by {cost[0]:+.2f} ± {cost[1]:.2f}")
        lines.append(
            f"- *Tolerance to an engine's log-probs.* {cell['name']}, against {exact[place]}: "
            f"{' and '.join(costs)} (without a test)."
        )
    return lines


# By length


def common_rate(results: Results) -> float:
    """The rate at which GSPO and GRPO learn in the most cells; of several, the largest."""
    return max(
        results.rates,
        key=lambda rate: (
            sum(rate in results.learns(c["name"], arm)
                for c in results.cells for arm in ("GSPO", "GRPO")),
            rate,
        ),
    )  # fmt: skip


def _lengths(results: Results) -> list[str]:
    rate = common_rate(results)
    lines = [
        f"At one learning rate, {rate:g}, from the tuning seeds: the fraction of clipped tokens, "
        "and the spread, the root mean square of the responses' log-ratios, as predicted from that "
        "of independent tokens (divided by the square root of the length) and as measured.",
        "",
        "| cell | clipped, GSPO | clipped, GRPO | spread, GSPO: predicted | measured "
        "| spread, GRPO: predicted | measured |",
        f"|{'---|' * 7}",
    ]
    for cell in results.cells:
        numbers = [
            f"{100 * results.mean_of('clip_frac_tokens', cell['name'], arm, rate):.2g}%"
            for arm in ("GSPO", "GRPO")
        ]
        for arm in ("GSPO", "GRPO"):
            k3, measured = (results.mean_of(key, cell["name"], arm, rate)
                            for key in ("approx_kl_k3", "log_ratio_rms"))  # fmt: skip
            numbers += [f"{predicted_spread(k3, cell['tokens']):.1e}", f"{measured:.1e}"]
        lines.append(f"| {cell['name']} | {' | '.join(numbers)} |")
    return lines


def _time(found: dict[str, Any]) -> str:
    hours = sum(run["seconds"] for run in found["runs"]) / 3600
    return (
        f"{len(found['runs'])} runs of one thread took {hours:.1f} hours, "
        f"{60 * hours / found['jobs']:.0f} minutes with {found['jobs']} at a time."
    )
