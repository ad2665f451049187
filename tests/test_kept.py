"""What is kept of an object goes with it, whatever is raised meanwhile."""

import gc
import sys

import pytest
import torch

from quantpage.kept import KeptWith
from tests.interrupted import run

pytestmark = pytest.mark.cpu


class Owner:
    pass


def test_made_once_and_gone_with_the_owner():
    made = []
    kept = KeptWith(lambda owner: made.append(owner.name) or [owner.name])
    first, second = Owner(), Owner()
    first.name, second.name = "first", "second"
    assert kept(first) is kept(first) and kept(second) == ["second"]
    assert made == ["first", "second"] and len(kept._kept) == 2
    del first
    gc.collect()
    assert next(iter(kept._kept.values()))[0] == ["second"] and len(kept._kept) == 1


@pytest.mark.parametrize("make", [Owner, lambda: torch.zeros(1)])
def test_nothing_comes_between_an_owners_end_and_that_of_what_is_kept(make):
    kept = KeptWith(lambda _: object())
    held, old = [make()], set()
    number = id(held[0])
    old.add(id(kept(held[0])))
    # No instruction of ours runs in it, before which anything could be raised.
    assert run(held.clear, 1) == (0, False)
    assert number not in kept._kept
    held = [make() for _ in range(500)]
    assert any(id(each) == number for each in held), "the address was not met again"


def test_an_interrupted_call_keeps_nothing_of_another_object():
    for at in range(1, 60):
        kept = KeptWith(lambda owner: owner.name)
        for name in ("first", "second"):
            owner = Owner()
            owner.name = name
            _, interrupted = run(lambda kept=kept, owner=owner: kept(owner), at)
            assert kept(owner) == name
            del owner
            assert not kept._kept
        if not interrupted:
            return
    raise AssertionError(f"a call is longer than 59 instructions in {sys.version}")
