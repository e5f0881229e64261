"""Pages are never given to two, shared only for equal beginnings, and come back whatever the order."""

import random

from gazelle.generate.pages import Pages


def test_a_beginning_is_found_again_and_the_last_token_left_over():
    pages = Pages(8, 4)
    taken = pages.take(2)
    before = pages.register(taken[0], [1, 2, 3, 4], None)
    before = pages.register(taken[1], [5, 6, 7, 8], before)
    assert pages.match([1, 2, 3, 4, 5, 6, 7, 8, 9], None) == (taken, before)
    assert pages.match([1, 2, 3, 4, 5, 6, 7, 8], None)[0] == taken[:1]
    assert pages.match([1, 2, 3, 4, 5, 6, 7, 9, 9], None)[0] == taken[:1]
    assert pages.match([5, 6, 7, 8, 9], None)[0] == []
    assert pages.match([1, 2, 3, 4, 5], "another adapter")[0] == []


def test_equal_pages_behind_different_beginnings_are_kept_apart():
    pages = Pages(8, 2)
    one, other = pages.take(2), pages.take(2)
    pages.register(one[1], [9, 9], pages.register(one[0], [1, 1], None))
    pages.register(other[1], [9, 9], pages.register(other[0], [2, 2], None))
    assert pages.match([1, 1, 9, 9, 0], None)[0] == one
    assert pages.match([2, 2, 9, 9, 0], None)[0] == other


def test_room_is_made_from_what_was_unused_longest():
    pages = Pages(3, 1)
    for token in range(3):
        page = pages.take(1)
        pages.register(page[0], [token], None)
        pages.release(page)
    assert pages.available == 3
    pages.take(1)
    assert pages.match([0, 9], None)[0] == [] and len(pages.match([1, 9], None)[0]) == 1
    assert pages.take(2) is None and pages.available == 1


def test_forgetting_leaves_pages_with_their_users():
    pages = Pages(4, 1)
    held = pages.take(2)
    pages.register(held[0], [1], None)
    idle = pages.take(1)
    pages.register(idle[0], [2], None)
    pages.release(idle)
    pages.forget()
    assert pages.match([1, 0], None)[0] == [] and pages.available == 2
    pages.release(held)
    assert sorted(pages.take(4)) == [0, 1, 2, 3]


def test_at_random_no_page_is_lost_or_held_by_strangers():
    draw = random.Random(0)
    pages = Pages(20, 2)
    held: list[tuple[list[int], list[int]]] = []
    content: dict[int, tuple[int, ...]] = {}
    for _ in range(3000):
        if held and draw.random() < 0.45:
            pages.release(held.pop(draw.randrange(len(held)))[0])
        else:
            ids = [draw.randrange(2) for _ in range(draw.randrange(1, 12))]
            found, before = pages.match(ids, None)
            for number, page in enumerate(found):
                assert content[page] == tuple(ids[:2 * number + 2])
            more = pages.take(-(-len(ids) // 2) - len(found))
            if more is None:
                pages.release(found)
                continue
            mine = found + more
            for number in range(len(found), len(ids) // 2):
                content[mine[number]] = tuple(ids[:2 * number + 2])
                before = pages.register(mine[number], ids[2 * number:2 * number + 2], before)
            held.append((mine, ids))
        users = {page for mine, _ in held for page in mine}
        assert pages.used == len(users)
        for mine, ids in held:
            for number in range(len(ids) // 2):
                assert content[mine[number]] == tuple(ids[:2 * number + 2])
