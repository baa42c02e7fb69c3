"""The one cache of plans: which keys are kept, and that threads may share it."""

from concurrent.futures import ThreadPoolExecutor

from edet.fused.plan import Plans


def test_the_key_not_used_for_longest_is_forgotten():
    plans: Plans[str] = Plans(2)
    plans.keep("a", "A")
    plans.keep("b", None)
    assert plans.find("a") == (True, "A")  # a use: b is the older one now
    plans.keep("c", "C")
    assert plans.find("b") == (False, None)
    assert len(plans) == 2 and plans.values() == ["A", "C"]


def test_a_key_may_be_known_without_a_plan():
    plans: Plans[str] = Plans(3)
    assert plans.find("a") == (False, None)
    plans.keep("a", None)
    assert plans.find("a") == (True, None)
    assert len(plans) == 1 and plans.values() == []
    plans.keep("a", "A")
    assert plans.find("a") == (True, "A")
    plans.clear()
    assert len(plans) == 0 and plans.find("a") == (False, None)


def test_fewer_can_be_kept_later():
    plans: Plans[int] = Plans(4)
    for key in range(4):
        plans.keep(key, key)
    plans.most = 2
    plans.keep(4, 4)
    assert plans.values() == [3, 4]


def test_threads_never_see_more_than_there_may_be():
    plans: Plans[int] = Plans(3)

    def use(seed: int) -> bool:
        sizes = []
        for i in range(300):
            key = (seed + i) % 7
            known, plan = plans.find(key)
            assert not known or plan == key
            plans.keep(key, key)
            sizes.append(len(plans))
        return max(sizes) <= 3

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(4)))
    assert len(plans) == 3
