"""What Optuna is asked and told; whole searches are in test_launchers."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException

from hydra_plugins.lightning_prune import optuna_sweeper as search
from tests.sweep.test_summary import write_job

optuna = pytest.importorskip("optuna", reason="pip install '.[sweeps]'")
GOALS = {"val/acc": "maximize", "nonzeros": "minimize"}


def space(**texts):
    parser = OverridesParser.create()
    return {
        name: search.distribution(parser.parse_override(f"{name}={text}")) for name, text in texts.items()
    }


def test_the_search_space_is_what_the_overrides_say():
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    assert space(
        a="interval(0.5,0.98)",
        b="int(interval(1,8))",
        c="tag(log,interval(1e-4,0.1))",
        d="choice(global,local)",
        e="range(1,10,3)",
        f="1,2",
    ) == {
        "a": FloatDistribution(0.5, 0.98),
        "b": IntDistribution(1, 8),
        "c": FloatDistribution(1e-4, 0.1, log=True),
        "d": CategoricalDistribution(["global", "local"]),
        "e": IntDistribution(1, 7, step=3),
        "f": CategoricalDistribution(["1", "2"]),
    }


def test_directions_follow_from_names_or_are_given():
    assert search.goals_of("val/perplexity", None) == {"val/perplexity": "minimize"}
    assert search.goals_of(["a", "b"], ["maximize", "minimize"]) == {"a": "maximize", "b": "minimize"}
    assert search.goals_of(None, "minimize") == {"result": "minimize"}
    with pytest.raises(CompactHydraException, match="`direction` is one of .* for each of .*, but got"):
        search.goals_of(["a", "b"], "maximize")
    with pytest.raises(CompactHydraException, match="`hydra.sweeper.metrics` is what to search for"):
        search.goals_of(None, None)


def test_a_study_remembers_jobs_and_asks_first_for_those_that_came_to_nothing(tmp_path):
    write_job(tmp_path, 0, ["a=0.5", "d=global"], {"val/acc": 0.9, "nonzeros": 10.0})
    write_job(tmp_path, 1, ["a=0.7", "d=local"], error="killed")
    write_job(tmp_path, 2, ["a=0.6", "d=local"], {"val/acc": 0.8, "nonzeros": float("nan")})
    study = optuna.create_study(directions=list(GOALS.values()))
    wanted = space(a="interval(0.5,0.98)", d="choice(global,local)")
    jobs, unfinished = search.remember(study, tmp_path, wanted, GOALS)
    assert (list(jobs), unfinished) == (["0", "1", "2"], ["1", "2"])
    assert study.best_trials[0].values == [0.9, 10.0]
    assert [study.ask(wanted).params for _ in range(2)] == [
        {"a": 0.7, "d": "local"},
        {"a": 0.6, "d": "local"},
    ]


def test_a_folder_with_another_search_is_refused(tmp_path):
    write_job(tmp_path, 0, ["a=0.2"], {"val/acc": 0.9, "nonzeros": 10.0})
    study = optuna.create_study(directions=list(GOALS.values()))
    for wanted in (space(a="interval(0.5,0.98)"), space(a="interval(0,1)", b="interval(0,1)")):
        with pytest.raises(CompactHydraException, match="holds a search in the same settings"):
            search.remember(study, tmp_path, wanted, GOALS)
