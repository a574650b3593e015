"""When coefficients are logged, worked by hand."""

from __future__ import annotations

from lora_gan.coefficients import Changes


def logged(steps: list[dict[str, float]], every: int) -> dict[str, list[tuple[int, float]]]:
    """What is logged of each coefficient in the order in which it is."""
    changes, found = Changes(), dict[str, list[tuple[int, float]]]()
    for step, values in enumerate(steps, start=1):
        for when, some in changes.points(values, step) if changes.due(step, every) else ():
            for name, value in some.items():
                found.setdefault(name, []).append((when, value))
    return found


def test_a_change_is_two_points_and_what_plays_no_part_is_none() -> None:
    steps = [{"supervised": 1.0, "policy": float(step > 4), "kl": 0.0, "adversarial_gate": 1.0} for step in range(1, 9)]
    assert logged(steps, every=2) == {"supervised": [(1, 1.0)], "policy": [(4, 0.0), (6, 1.0)]}


def test_what_always_changes_is_a_point_at_each_look() -> None:
    steps = [{"baseline": 0.5 * step} for step in range(6)]  # 0 in the first step
    assert logged(steps, every=1)["baseline"] == [(step + 1, 0.5 * step) for step in range(6)]
    assert logged(steps, every=2)["baseline"] == [(1, 0.0), (2, 0.5), (4, 1.5), (6, 2.5)]
    assert logged(steps, every=0) == {}


def test_a_value_that_comes_back_is_flat_in_between() -> None:
    steps = [{"adversarial_gate": gate} for gate in (1.0, 0.0, 0.0, 0.0, 1.0, 1.0)]
    assert logged(steps, every=1)["adversarial_gate"] == [(1, 1.0), (2, 0.0), (4, 0.0), (5, 1.0)]
