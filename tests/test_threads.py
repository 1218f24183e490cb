"""torch's number of threads, where threads of ours work beside each other."""

import threading

import pytest
import torch

from mm4ke_plugins.storage.threads import in_threads, one_thread_in_torch


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_thread(function) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_two_threads_that_overlap_leave_torch_as_it_was(three_threads):
    seen = {}
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first():
        with one_thread_in_torch():
            first_is_in.set()
            second_is_in.wait()
            seen["in first"] = torch.get_num_threads()
        seen["after first"] = torch.get_num_threads()
        first_is_out.set()

    def second():
        first_is_in.wait()
        with one_thread_in_torch():
            seen["in second"] = torch.get_num_threads()
            second_is_in.set()
            first_is_out.wait()
        seen["after second"] = torch.get_num_threads()

    for thread in [in_a_thread(first), in_a_thread(second)]:
        thread.join()
    in_a_thread(lambda: seen.update(new=torch.get_num_threads())).join()
    assert seen == {"in first": 1, "in second": 1, "after first": 3, "after second": 3, "new": 3}
    assert torch.get_num_threads() == 3


def test_one_within_another_and_exceptions(three_threads):
    with pytest.raises(RuntimeError), one_thread_in_torch():
        assert in_threads(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
        raise RuntimeError
    assert torch.get_num_threads() == 3
