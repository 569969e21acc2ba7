"""How long a step may take, by those before it: no clocks."""

import math

from headrace.parallel.pulse import NEEDED, RECORD, Pulse, WatchConfig


class Clock:
    """Seconds that a test lets go by."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pulse_after(steps: int, seconds: float = 2.0) -> tuple[Pulse, Clock]:
    clock = Clock()
    pulse = Pulse(WatchConfig(margin_s=5.0, allowance_s=300.0), clock)
    for number in range(steps + 1):  # nobody knows how long the first of a start took
        pulse.step(number)
        clock.now += seconds
    return pulse, clock


def test_the_start_has_no_limit_and_the_first_steps_an_allowance() -> None:
    assert Pulse(WatchConfig(margin_s=5.0, allowance_s=300.0)).limit_s == math.inf
    assert pulse_after(NEEDED - 1)[0].limit_s == 300.0
    assert pulse_after(NEEDED)[0].limit_s == 2 * 2.0 + 5.0


def test_one_slow_step_of_many_does_not_count_and_two_do() -> None:
    pulse, clock = pulse_after(150)
    for slow in (1, 2):
        clock.now += 98.0
        pulse.step(150 + slow)
        clock.now += 2.0
        assert pulse.limit_s == (2 * 2.0 + 5.0 if slow == 1 else 2 * 100.0 + 5.0)


def test_what_is_no_step_has_an_allowance_and_does_not_count() -> None:
    pulse, clock = pulse_after(NEEDED)
    pulse.pass_time(8.0)
    with pulse.phase("save"):
        assert pulse.idle_s == 0.0
        clock.now += 100.0
        assert pulse.limit_s == 300.0
    assert pulse.idle_s == 0.0
    pulse.step(99)
    assert pulse.limit_s == 2 * 2.0 + 5.0


def test_records_are_judged_by_records() -> None:
    pulse, clock = pulse_after(NEEDED)
    for _ in range(NEEDED):
        with pulse.phase(RECORD):
            clock.now += 7.0
    with pulse.phase(RECORD):
        assert pulse.limit_s == 2 * 7.0 + 5.0


def test_without_a_margin_nothing_is_looked_for() -> None:
    pulse = Pulse(WatchConfig(margin_s=0.0))
    pulse.step(1)
    assert pulse.limit_s == math.inf
