"""What the start left for later is done between steps, and nobody waits for it."""

from __future__ import annotations

from quire.core.engine.client import InProcessClient
from quire.core.engine.late_warm_up import LateWarmUp


class Pieces:
    """An executor with some pieces left, each of which takes so many seconds of a false clock."""

    def __init__(self, num_pieces, seconds):
        self.num_left, self.seconds, self.now, self.num_asked = num_pieces, seconds, 0.0, 0

    def warm_up_more(self):
        self.num_asked += 1
        self.num_left -= 1
        self.now += self.seconds
        return self.num_left > 0

    def clock(self):
        return self.now


def make(num_pieces=5, seconds=1.0):
    pieces = Pieces(num_pieces, seconds)
    return pieces, LateWarmUp(pieces, pieces.clock)


def test_idle_moments_do_one_piece_each_until_none_is_left():
    """Then nobody is asked again."""
    pieces, late = make(3)
    assert [late.do_piece() for _ in range(5)] == [True, True, False, False, False]
    assert pieces.num_asked == 3


def test_pieces_between_steps_take_a_fifth_of_the_time():
    """Requests that run are slowed down a little, never stopped."""
    pieces, late = make(1000)
    for _ in range(10_000):
        late.between_steps(0)
        pieces.now += 0.01
    share = pieces.num_asked * pieces.seconds / pieces.now
    assert 0.15 < share <= 0.21


def test_nothing_is_done_while_a_request_waits():
    """Its first token is worth more than somebody's later ones."""
    pieces, late = make()
    for _ in range(100):
        late.between_steps(1)
        pieces.now += 10
    assert pieces.num_asked == 0
    late.between_steps(0)
    assert pieces.num_asked == 1


def test_user_may_have_everything_done_before_measuring():
    """A figure must not hold the recording of a graph."""
    pieces = Pieces(4, 1.0)
    client = object.__new__(InProcessClient)
    client._core = pieces
    client.finish_warm_up()
    assert pieces.num_left == 0
