"""What a sweep tries next: Optuna proposes it, and remembers in a file of the home what came of each trial."""

import json
import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from slmops.core.settings import Settings
from slmops.selection.sweep import Trial

_ENDED = {"measured": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class Search:
    """The trials of one search, which goes on where it was when it is opened again under the same name."""

    def __init__(self, name: str, choices: Mapping[str, dict[str, list[Any]]], settings: Settings) -> None:
        """Search the values of the options of each recipe, beginning with the first of each option."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        settings.home.mkdir(parents=True, exist_ok=True)
        self._choices = choices
        self._study = optuna.create_study(
            storage=f"sqlite:///{settings.home / 'sweeps.db'}",
            study_name=name,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        if not self._study.trials:
            for recipe, options in choices.items():
                first = {f"{recipe}.{option}": _text(values[0]) for option, values in options.items()}
                self._study.enqueue_trial({"recipe": recipe, **first})
        for killed in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(killed.number, state=TrialState.FAIL)
            self._study.enqueue_trial(killed.params)

    @property
    def trials(self) -> list[Trial]:
        """Those that came to an end."""
        ended = self._study.get_trials(deepcopy=False, states=tuple(_ENDED.values()))
        return [Trial.model_validate(one.user_attrs["trial"]) for one in ended if "trial" in one.user_attrs]

    def ask(self) -> Trial | None:
        """What to try next, never what was tried; None: that is all."""
        known = {one.variant for one in self.trials}
        if len(known) == sum(math.prod(map(len, values.values())) for values in self._choices.values()):
            return None
        sampler: BaseSampler = TPESampler(seed=len(known))
        while True:
            self._study.sampler = sampler
            trial = self._suggest(len(known))
            if trial.variant not in known:
                return trial
            self._study.tell(self._asked, state=TrialState.FAIL)
            sampler = RandomSampler(seed=self._asked.number)  # the other one can insist on what it knows

    def _suggest(self, number: int) -> Trial:
        self._asked = self._study.ask()
        recipe = self._asked.suggest_categorical("recipe", [*self._choices])
        options: dict[str, Any] = {
            option: json.loads(self._asked.suggest_categorical(f"{recipe}.{option}", [_text(one) for one in values]))
            for option, values in self._choices[recipe].items()
        }
        return Trial(number=number, recipe=recipe, options=options)

    def tell(self, trial: Trial) -> None:
        """Remember what came of the trial that was asked for last."""
        self._asked.set_user_attr("trial", trial.model_dump(mode="json"))
        values = [trial.metrics["size_mb"], trial.metrics["kl_mean"]] if trial.outcome == "measured" else None
        self._study.tell(self._asked, values, state=_ENDED[trial.outcome])


def _text(value: Any) -> str:
    """A value of an option as Optuna keeps it, whose own choices are no lists and tables."""
    return json.dumps(value, sort_keys=True)
