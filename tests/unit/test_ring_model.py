"""Every interleaving of the ring's protocol, for small rings: the table of native/shm/ring.h.

One writer sends M messages to R readers through a ring of 1 or 2 slots, and closes or falls silent.
A step is one access to shared memory of native/shm/ring.cpp, or one system call; after every step
each process that lives may be killed, and readers may leave between messages. Spinning is left out:
it only looks more often. Accesses are taken in one total order, which is what memory_order_seq_cst
gives to those that the wake-ups depend on (ring_stress.cpp, under ThreadSanitizer, looks at the
others).

Checked: a reader reads each message once, in order, whole; a slot changes its state only as the
table says and by whom it says; nobody waits for ever; who lives at the end has read all that was
published. Readers are interchangeable, so a state is kept with its readers sorted.

That the checker can fail is checked too: each broken rule below must be found out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

FREE, WRITTEN, PART_READ, READ = "FREE", "WRITTEN", "PART_READ", "READ"
JOINED, LEFT, DEAD = "JOINED", "LEFT", "DEAD"


class Reader(NamedTuple):
    """pc: what it does next. The last three are shared words, kept here so that readers sort."""

    pc: str = "look"
    consumed: int = 0
    state: str = JOINED
    sleeper_bit: bool = False  # of `sleepers`
    awaited: int = -1  # count, if `awaited` names this reader
    slowest: bool = False  # the writer's own note: whom it waits for


class State(NamedTuple):
    pc: str = "check"  # of the writer
    sent: int = 0
    published: int = 0
    closed: bool = False
    filling: bool = False
    rung: bool = False  # `bell` is not what the writer saw last
    faults: int = 0  # processes that may still die or leave
    readers: tuple[Reader, ...] = ()


class Broken(NamedTuple):
    """Rules that a test breaks, to see that it is noticed."""

    one_slot_too_many: bool = False
    publish_before_fill: bool = False
    sleepers_before_publish: bool = False
    awaited_before_consumed: bool = False
    no_second_look: bool = False
    dead_are_awaited: bool = False
    close_wakes_nobody: bool = False
    # Zeroing `sleepers` would save wakes of readers that are awake but have not said so. A reader
    # that read the message without sleeping may by then have announced its next sleep.
    writer_takes_sleepers: bool = False


class Wrong(Exception):
    """The protocol does what it must not."""


def counts(reader: Reader) -> bool:
    return reader.state == JOINED


def slot_state(state: State, slot: int, slots: int) -> str:
    """In terms of the last message that was written to the slot, or is being written."""
    message = max((m for m in range(state.published) if m % slots == slot), default=None)
    if message is None or (state.filling and state.sent % slots == slot):
        return FREE
    flags = [r.consumed > message or not counts(r) for r in state.readers]
    return READ if all(flags) else PART_READ if any(flags) else WRITTEN


ALLOWED = {
    "writer": {(FREE, WRITTEN), (READ, FREE), (FREE, READ), (FREE, PART_READ)},
    "reader": {(WRITTEN, PART_READ), (WRITTEN, READ), (PART_READ, READ)},
}
ALLOWED["drop"] = ALLOWED["reader"]


class Model:
    def __init__(
        self, readers: int, messages: int, faults: int, broken: Broken, slots: int = 2
    ) -> None:
        self.slots = slots
        self.messages = messages
        self.broken = broken
        self.start = State(faults=faults, readers=(Reader(),) * readers)

    # --- the writer: RingWriter::has_slot, wait, publish, drop, close -----------------------

    def writer(self, s: State) -> Iterator[State]:
        b = self.broken
        window = self.slots + b.one_slot_too_many
        target = s.sent + 1 - window
        alive = [r for r in s.readers if counts(r)]
        if s.pc == "check":
            if s.sent == self.messages:
                yield s._replace(pc="close")
                yield s._replace(pc="idle")  # or has no more to say for now
            elif not alive:
                yield s._replace(pc="done")  # raises: nobody is left
            elif min(r.consumed for r in alive) >= target:
                begin = "look for sleepers" if b.sleepers_before_publish else "fill"
                yield s._replace(pc="publish" if b.publish_before_fill else begin)
            else:
                yield s._replace(pc="announce", rung=False)
            # nudge(), before there is anything to read: of one reader or of more.
            asleep = [i for i, r in enumerate(s.readers) if r.pc == "asleep"]
            for i in asleep:
                woken = s.readers[i]._replace(pc="clear bit")
                yield s._replace(readers=(*s.readers[:i], woken, *s.readers[i + 1 :]))
            if len(asleep) > 1:
                yield self.wake_readers(s)
        elif s.pc == "fill":
            message = s.sent - self.slots
            for r in s.readers:
                if r.pc == "read" and r.consumed == message and counts(r):
                    raise Wrong("a slot is written while a reader reads it")
            yield s._replace(pc="publish", filling=True)
        elif s.pc == "publish":
            after = "check" if b.sleepers_before_publish else "look for sleepers"
            s = s._replace(published=s.published + 1, filling=False)
            yield s._replace(pc=after, sent=s.sent + 1)
        elif s.pc == "look for sleepers":
            onward = "fill" if b.sleepers_before_publish else "check"
            some = any(r.sleeper_bit for r in s.readers)
            wake = "take sleepers" if b.writer_takes_sleepers else "wake readers"
            yield s._replace(pc=wake if some else onward)
        elif s.pc == "take sleepers":
            readers = tuple(r._replace(sleeper_bit=False) for r in s.readers)
            yield s._replace(pc="wake readers", readers=readers)
        elif s.pc == "wake readers":
            onward = "fill" if b.sleepers_before_publish else "check"
            yield self.wake_readers(s)._replace(pc=onward)
        elif s.pc == "announce":
            least = min((r.consumed for r in alive), default=0)
            for i, r in enumerate(s.readers):
                if counts(r) and r.consumed == least:
                    marked = r._replace(awaited=target, slowest=True)
                    readers = (*s.readers[:i], marked, *s.readers[i + 1 :])
                    yield s._replace(pc="look again", readers=readers)
                    break  # readers that are equally far behind and in the same place are alike
            else:
                yield s._replace(pc="check")
        elif s.pc == "look again":
            slowest = next(r for r in s.readers if r.slowest)
            enough = slowest.consumed >= target or not counts(slowest)
            skip = enough and not b.no_second_look
            yield s._replace(pc="clear awaited" if skip else "sleep")
        elif s.pc == "sleep":
            yield s._replace(pc="clear awaited" if s.rung else "asleep")
        elif s.pc == "asleep":
            # The look at the processes, every LOOK_S: the only thing that a sleep ends by
            # itself for, so that a lost wake-up shows.
            for i, r in enumerate(s.readers):
                if r.pc == "killed" and not b.dead_are_awaited and (counts(r) or r.slowest):
                    dropped = r._replace(state=DEAD if counts(r) else r.state)
                    readers = (*s.readers[:i], dropped, *s.readers[i + 1 :])
                    yield s._replace(pc="clear awaited", readers=readers)
        elif s.pc == "clear awaited":
            readers = tuple(r._replace(awaited=-1, slowest=False) for r in s.readers)
            yield s._replace(pc="check", readers=readers)
        elif s.pc == "close":
            after = "done" if b.close_wakes_nobody else "wake for close"
            yield s._replace(pc=after, closed=True)
        elif s.pc == "wake for close":
            yield self.wake_readers(s)._replace(pc="done")

    @staticmethod
    def wake_readers(s: State) -> State:
        woken = tuple(r._replace(pc="clear bit") if r.pc == "asleep" else r for r in s.readers)
        return s._replace(readers=woken)

    # --- a reader: RingReader::take, done, wait, leave --------------------------------------

    def reader(self, s: State, i: int) -> Iterator[State]:
        r, b = s.readers[i], self.broken

        def to(pc: str, shared: State = s, **words: object) -> State:
            changed = r._replace(pc=pc, **words)
            readers = shared.readers
            return shared._replace(readers=(*readers[:i], changed, *readers[i + 1 :]))

        has_message = s.published > r.consumed
        if r.pc == "look":
            if has_message:
                yield to("read")
            elif s.closed:
                yield to("done")
            elif s.pc == "killed":
                yield to("done")  # raises PeerDiedError
            else:
                yield to("announce")
            if s.faults:
                yield to("look who waits for the one that left", state=LEFT)._replace(
                    faults=s.faults - 1
                )
        elif r.pc == "announce":
            yield to("look again", sleeper_bit=True)
        elif r.pc == "look again":
            go_on = (has_message or s.closed) and not b.no_second_look
            yield to("clear bit" if go_on else "sleep")
        elif r.pc == "sleep":
            changed = has_message or s.closed  # the word is not what it saw
            yield to("clear bit" if changed and not b.no_second_look else "asleep")
        elif r.pc == "asleep":
            if s.pc == "killed":
                yield to("clear bit")
        elif r.pc == "clear bit":
            yield to("look", sleeper_bit=False)
        elif r.pc == "read":
            # Between "look" and here the slot was copied; it must still be the same message.
            overtaken = s.published > r.consumed + self.slots
            writing = s.filling and s.sent == r.consumed + self.slots
            if overtaken or writing or self.unwritten(s, r.consumed):
                raise Wrong("a reader reads a slot that is not, or no more, the message's")
            if b.awaited_before_consumed:
                reached = r.awaited >= 0 and r.consumed + 1 >= r.awaited
                yield to("store late, then take" if reached else "store late")
            else:
                yield to("look at awaited", consumed=r.consumed + 1)
        elif r.pc in ("store late", "store late, then take"):
            yield to("look" if r.pc == "store late" else "take awaited", consumed=r.consumed + 1)
        elif r.pc == "look at awaited":
            reached = r.awaited >= 0 and r.consumed >= r.awaited
            yield to("take awaited" if reached else "look")
        elif r.pc == "take awaited":
            yield to("ring", awaited=-1) if r.awaited >= 0 else to("look")
        elif r.pc == "ring":
            yield to("wake the writer", s._replace(rung=True))
        elif r.pc == "wake the writer":
            yield to("look", s._replace(pc="clear awaited") if s.pc == "asleep" else s)
        elif r.pc == "look who waits for the one that left":
            yield to("ring, leaving" if r.awaited >= 0 else "done")
        elif r.pc == "ring, leaving":
            yield to("wake, leaving", s._replace(rung=True))
        elif r.pc == "wake, leaving":
            yield to("done", s._replace(pc="clear awaited") if s.pc == "asleep" else s)

    def unwritten(self, s: State, message: int) -> bool:
        return self.broken.publish_before_fill and message == s.published - 1

    # --- all steps ------------------------------------------------------------------------------

    def steps(self, s: State) -> Iterator[tuple[str, State]]:
        for after in self.writer(s):
            yield ("drop" if s.pc == "asleep" else "writer"), after
        for i, r in enumerate(s.readers):
            if r.pc not in ("done", "killed"):
                for after in self.reader(s, i):
                    yield "reader", after
                if r.pc == "asleep":  # the look every kLivenessNs
                    looks = (*s.readers[:i], r._replace(pc="clear bit"), *s.readers[i + 1 :])
                    yield "timer", s._replace(readers=looks)
                if s.faults:
                    killed = (*s.readers[:i], r._replace(pc="killed"), *s.readers[i + 1 :])
                    yield "kill", s._replace(readers=killed, faults=s.faults - 1)
        if s.faults and s.pc not in ("done", "idle", "killed"):
            yield "kill", s._replace(pc="killed", faults=s.faults - 1)

    def explore(self) -> int:
        """The number of states; Wrong if one is."""
        seen = {self.start}
        todo = [self.start]
        while todo:
            state = todo.pop()
            stuck = True
            for actor, after in self.steps(state):
                # A look would only hide a wake-up that was lost.
                stuck = stuck and actor in ("kill", "timer")
                if state.published != after.published or actor not in ("kill", "timer"):
                    self.check_slots(actor, state, after)
                after = after._replace(readers=tuple(sorted(after.readers)))
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
            if stuck:
                self.check_end(state)
        return len(seen)

    def check_slots(self, actor: str, before: State, after: State) -> None:
        for slot in range(self.slots):
            change = slot_state(before, slot, self.slots), slot_state(after, slot, self.slots)
            if change[0] != change[1] and change not in ALLOWED[actor]:
                raise Wrong(f"{actor} takes a slot from {change[0]} to {change[1]}")

    def check_end(self, s: State) -> None:
        if s.pc not in ("done", "idle", "killed"):
            raise Wrong(f"the writer waits for ever: {s}")
        for r in s.readers:
            waits = r.pc == "asleep" and s.pc == "idle" and r.consumed == s.published
            if r.pc not in ("done", "killed") and not waits:
                raise Wrong(f"a reader waits for ever: {s}")
            if r.pc == "done" and r.state == JOINED and r.consumed != s.published:
                raise Wrong(f"a reader ended without all messages: {s}")


@pytest.mark.parametrize(
    ("slots", "readers", "messages", "faults"),
    [
        (1, 2, 3, 2),
        (2, 1, 6, 2),
        (2, 2, 5, 1),
        (2, 2, 4, 3),
        (2, 3, 4, 0),
        (2, 3, 3, 1),
        (2, 3, 2, 2),
    ],
)
def test_every_interleaving(slots: int, readers: int, messages: int, faults: int) -> None:
    states = Model(readers, messages, faults, Broken(), slots).explore()
    print(f"{states} states")
    assert states > 100


@pytest.mark.parametrize("rule", Broken._fields)
def test_a_broken_rule_is_found_out(rule: str) -> None:
    broken = Broken(**{rule: True})
    with pytest.raises(Wrong):
        for readers, slots in ((1, 1), (1, 2), (2, 2)):
            Model(readers, 4, 1, broken, slots).explore()


def test_the_model_and_the_code_name_the_same_states() -> None:
    header = (Path(__file__).parents[2] / "native/shm/ring.h").read_text()
    table = header.partition("#pragma once")[0]
    for name in (FREE, WRITTEN, PART_READ, READ, JOINED, LEFT, DEAD, "ABSENT"):
        assert name in table
    for word in ("published", "consumed", "sleepers", "awaited", "bell"):
        assert word in table and f" {word};" in header
