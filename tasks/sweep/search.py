"""Which candidate is next: Optuna's samplers, asked for parameters and told what came of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial, TrialState

from tasks.sweep.spec import Range, Spec

optuna.logging.set_verbosity(optuna.logging.WARNING)
TRIES = 50  # for a candidate that was not asked before; a small space may hold no other


class Search:
    """Candidates of a sweep, one after another.

    Random and TPE are repeatable with one machine; with more, TPE depends on who ends first.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.limits = spec.parsed_limits()
        self._asked: set[str] = set()
        self._left = spec.grid() if spec.sampler == "grid" else []
        self._samplers = self._make_samplers()
        self._space = {key: _distribution(value) for key, value in spec.space.items()}
        self._study = optuna.create_study(
            sampler=self._samplers[0], directions=list(spec.objectives.values())
        )

    def _make_samplers(self) -> list[optuna.samplers.BaseSampler]:
        """The one that was chosen; and any, for when TPE wants nothing but what it had."""
        any_ = optuna.samplers.RandomSampler(seed=self.spec.seed)
        if self.spec.sampler == "tpe":
            return [optuna.samplers.TPESampler(seed=self.spec.seed), any_]
        return [any_]

    def ask(self) -> tuple[Trial | None, dict[str, Any]] | None:
        """The next candidate's parameters by dotted key; None when there is no other.

        A grid needs no sampler, so its candidates have no trial.
        """
        if self.spec.sampler == "grid":
            return (None, self._left.pop(0)) if self._left else None
        for sampler in self._samplers:
            self._study.sampler = sampler
            for _ in range(TRIES):
                trial = self._study.ask(self._space)
                values = {key: self._real(key, value) for key, value in trial.params.items()}
                if repr(values) not in self._asked:
                    self._asked.add(repr(values))
                    return trial, values
                self._study.tell(trial, state=TrialState.FAIL)
        return None

    def _real(self, key: str, value: Any) -> Any:
        """A choice is kept as its place in the list: Optuna takes no lists as choices."""
        choices = self.spec.space[key]
        return choices[value] if isinstance(choices, list) else value

    def tell(self, trial: Trial | None, figures: Mapping[str, float | None]) -> None:
        """What a candidate reached; one that lacks an objective counts as failed.

        But for one that a limit stopped: TPE looks at no failed trial, and would learn nothing.
        """
        if trial is None:
            return
        values, over = [figures.get(name) for name in self.spec.objectives], False
        for limit in self.limits:
            value = figures.get(limit.figure)
            if value is not None and math.isfinite(value):
                trial.set_constraint(str(limit), limit.excess(value))
                over |= limit.excess(value) > 0
        known = [value for value in values if value is not None and math.isfinite(value)]
        if len(known) < len(values):
            self._study.tell(trial, state=TrialState.PRUNED if over else TrialState.FAIL)
        else:
            self._study.tell(trial, known)


def _distribution(choices: Any) -> BaseDistribution:
    if not isinstance(choices, Range):
        return CategoricalDistribution(list(range(len(choices))))
    if choices.whole:
        step = int(choices.step or 1)
        return IntDistribution(int(choices.low), int(choices.high), choices.log, step)
    return FloatDistribution(choices.low, choices.high, choices.log, choices.step)
