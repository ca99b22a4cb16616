"""What a report says of a model that became smaller."""

import json
from dataclasses import replace

from lightning_prune.report.costs import Cost
from lightning_prune.report.data import Layer, Report, Update
from lightning_prune.report.render import to_markdown, to_page
from lightning_prune.report.rows import page
from lightning_prune.report.storage import from_json, to_json

SMALLER = Report(
    kind="train_time",
    recipe={"granularity": "Channel(multiple_of=8)"},
    target_sparsity=0.5,
    achieved_sparsity=0.5,
    layers=(Layer("a.weight", (8, 3), 24, 24, num_groups=16, num_kept=8),),
    cost_before=Cost(params=1000, nonzeros=1000),
    cost_after=Cost(params=260, nonzeros=260),
    equivalence_error=2.5e-16,
    frozen={"head.weight[0]": "output of the model", "head.bias[0]": "output of the model", "a[1]": "input"},
)


def test_sparsity_is_that_of_what_the_granularity_counts():
    texts = {}
    for granularity in ("Channel()", "Head()", "Layer()", "Layer(unit='branch')", "Weight()"):
        facts = dict(page(replace(SMALLER, recipe={"granularity": granularity})).facts)
        texts[granularity] = facts["Sparsity"]
    assert texts == {
        "Channel()": "50.00 % of the channels (asked for: 50.00 %)",
        "Head()": "50.00 % of the heads (asked for: 50.00 %)",
        "Layer()": "50.00 % of the blocks (asked for: 50.00 %)",
        "Layer(unit='branch')": "50.00 % of the branches (asked for: 50.00 %)",
        "Weight()": "50.00 % of the pruned weights (asked for: 50.00 %)",
    }


def test_a_budget_is_told_in_place_of_a_sparsity_that_nobody_asked_for():
    budget = {"granularity": "Channel()", "budget": "Budget(macs=0.5)"}
    plain = replace(SMALLER, updates=(Update(0, 0.0, 0.0, 0.0), Update(9, 1.0, 0.0, 0.3)))
    updates = tuple(replace(update, requested=None) for update in plain.updates)
    report = replace(SMALLER, recipe=budget, updates=updates, target_sparsity=None, achieved_sparsity=0.3)
    assert dict(page(report).facts)["Sparsity"] == "30.00 % of the channels (asked for: Budget(macs=0.5))"
    (table,) = (t for t in page(report).tables if t.title.startswith("Updates"))
    assert table.columns == ("step", "progress", "achieved") and table.rows[1] == ("9", "100.00 %", "30.00 %")
    shown, text = to_page(report), to_markdown(report)
    assert "asked for: Budget(macs=0.5)" in shown and "asked for: Budget(macs=0.5)" in text.replace("\\", "")
    assert not any("requested" in found or "asked for: 0.00" in found for found in (shown, text))
    assert "requested" in to_page(plain)
    found = json.loads(to_json(report))
    assert found["target_sparsity"] is None and [u["requested"] for u in found["updates"]] == [None, None]
    assert from_json(to_json(report)) == report


def test_several_budgets_are_told():
    recipe = {"budget (1)": "Budget(macs=0.5)", "budget (2)": "Budget(params=0.5)"}
    assert replace(SMALLER, recipe=recipe).budgets == ("Budget(macs=0.5)", "Budget(params=0.5)")


def test_the_measured_difference_is_told_where_there_is_one():
    assert "2.5e-16 at most" in dict(page(SMALLER).facts)["Small model"]
    assert "Small model" not in dict(page(replace(SMALLER, equivalence_error=None)).facts)


def test_what_stays_whole_is_counted_by_reason():
    (table,) = (table for table in page(SMALLER).tables if table.title == "What stays whole")
    assert table.rows == (("output of the model", "2", "head.weight[0]"), ("input", "1", "a[1]"))


def test_channels_parameters_and_work_are_told_apart():
    assert any("keeps a quarter of its weights" in note for note in page(SMALLER).notes)
    assert not any("quarter" in note for note in page(replace(SMALLER, recipe={})).notes)
