"""Who is found missing, from beats heard and time told: no threads, no clocks."""

import pytest

from headrace.parallel.heartbeat import TIMED_OUT, Beat, RollCall, name_ranks

LIMIT_S, GRACE_S = 60.0, 5.0


def roll_call(rank: int, size: int, keeper: str | None = None) -> RollCall:
    return RollCall(rank, size, LIMIT_S, GRACE_S, keeper, "here")


def let_pass(roll: RollCall, seconds: int, beats: dict[int, Beat], silent: tuple[int, ...] = ()) -> None:
    """Each second all but the `silent` beat once more, in the state given."""
    for _ in range(seconds):
        roll.pass_time(1.0)
        for rank, beat in beats.items():
            if rank not in silent:
                beats[rank] = Beat(beat.count + 1, beat.step, beat.host, beat.state, beat.reason)
        roll.hear(beats)


def beats_of(*ranks: int) -> dict[int, Beat]:
    return {rank: Beat(1, 7, f"node{rank // 2}") for rank in ranks}


def test_the_silent_are_named_once_the_limit_is_over() -> None:
    roll, beats = roll_call(0, 6), beats_of(1, 2, 3, 4, 5)
    let_pass(roll, 100, beats)
    let_pass(roll, 59, beats, silent=(2, 3, 5))
    assert roll.finding() is None
    let_pass(roll, 1, beats, silent=(2, 3, 5))
    assert roll.finding() == "ranks 2-3 (node1), 5 (node2) have not been heard of for 60 s"
    assert roll.step == 7


def test_who_never_began_is_missing_too() -> None:
    roll, beats = roll_call(0, 2), {1: Beat()}
    let_pass(roll, 60, beats, silent=(1,))
    assert roll.finding() == "rank 1 (host unknown) has not been heard of for 60 s"
    assert roll.step is None


def test_a_failed_collective_shortens_the_limit() -> None:
    roll, beats = roll_call(0, 4), beats_of(1, 2, 3)
    let_pass(roll, 6, beats, silent=(2,))
    assert roll.finding() is None
    beats[3] = Beat(1, 7, "node1", "failed")
    let_pass(roll, 1, beats, silent=(2,))
    assert roll.finding() == "rank 2 (node1) has not been heard of for 6 s"
    assert not roll.alone


@pytest.mark.parametrize(
    ("keeper", "named"), [(None, "rank 0 (node0)"), ("the launcher at 10.0.0.1:29500", "the launcher at")]
)
def test_a_store_that_does_not_answer_is_its_keepers_silence(keeper: str | None, named: str) -> None:
    """And nobody else's, however long others have not been heard of."""
    roll, beats = roll_call(3, 4, keeper), beats_of(0)
    let_pass(roll, 10, beats)
    let_pass(roll, 4, beats, silent=(0,))
    for _ in range(60):
        assert roll.finding() is None
        roll.pass_time(1.0)
    found = roll.finding()
    assert found is not None
    assert found.startswith(named)
    assert found.endswith("has not been heard of for 60 s")


def test_a_store_that_left_with_its_keeper_is_not_missed() -> None:
    roll, beats = roll_call(1, 2), {0: Beat(1, 7, "node0", "left")}
    let_pass(roll, 1, beats)
    roll.pass_time(1000.0)
    assert roll.finding() is None
    roll.fail(timed_out=False)
    roll.pass_time(GRACE_S)
    assert roll.finding(failed_here=True) == "rank 0 (node0) left before the others"


def test_an_error_is_named_after_the_others_had_time_to_meet_it() -> None:
    roll, beats = roll_call(0, 4), beats_of(1, 2, 3)
    let_pass(roll, 10, beats)
    beats[2] = Beat(1, 7, "node1", "error", "disk full")
    roll.fail(timed_out=False)
    let_pass(roll, 5, beats, silent=(3,))
    assert roll.finding(failed_here=True) is None
    let_pass(roll, 1, beats, silent=(3,))
    assert roll.finding(failed_here=True) == "rank 2 (node1) left with an error: disk full"


def test_whoever_did_not_wait_was_waited_for() -> None:
    roll, beats = roll_call(0, 4), beats_of(1, 2, 3)
    roll.fail(timed_out=True)
    for rank in (1, 3):
        beats[rank] = Beat(1, 7, "node0", "failed", TIMED_OUT)
    let_pass(roll, 5, beats)
    assert "rank 2 (node1) does run, but did not come" in str(roll.finding(failed_here=True))
    beats[2] = Beat(1, 7, "node1", "failed")
    let_pass(roll, 1, beats)
    assert "rank 0 (here) does run, but did not come" in str(roll.finding())
    assert roll.finding(failed_here=True) is None


def test_nobody_is_accused_where_it_is_most_that_go_on() -> None:
    roll, beats = roll_call(0, 4), beats_of(1, 2, 3)
    roll.fail(timed_out=True)
    let_pass(roll, 20, beats)
    assert roll.finding(failed_here=True) is None


def test_beats_travel_as_text() -> None:
    beat = Beat(3, None, "node1", "error", 'a "word"\nand more')
    assert Beat.unpack(beat.pack().encode()) == beat


def test_names_are_short() -> None:
    assert name_ranks({3: "a"}) == "rank 3 (a)"
    assert name_ranks({r: "a" if r < 4 else "b" for r in (0, 1, 2, 5, 7, 8)}) == "ranks 0-2 (a), 5, 7-8 (b)"
