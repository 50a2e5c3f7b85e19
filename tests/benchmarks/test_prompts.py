from __future__ import annotations

from benchmarks.quality.prompts import BASES, TASKS, recipe_of, to_markdown


def test_recipes_are_the_shipped_ones_for_the_package_of_a_base() -> None:
    for base, (model, precision) in BASES.items():
        for task in TASKS:
            recipe = recipe_of(base, task)
            assert (recipe.model, recipe.precision, recipe.metric) == (model, precision, "accuracy")


def test_one_run_has_its_standard_error_and_several_their_spread() -> None:
    none = [{"value": 0.5, "standard_error": 0.02, "n": 900}]
    seeds = [{"value": value, "standard_error": 0.01, "n": 900} for value in (0.8, 0.9)]
    table = to_markdown({"gemma3": {"sentiment": {"zero-shot": none, "soft prompt": seeds}}})
    assert table.splitlines() == [
        "| base | task | zero-shot | soft prompt | n |",
        "| --- | --- | --- | --- | --- |",
        "| gemma3 | sentiment | 50.0 (standard error 2.0) | 85.0 (80.0, 90.0) | 900 |",
    ]
