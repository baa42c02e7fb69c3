"""What launches leave with the host: the shared memory that a kernel may have is of the process."""

import threading

import torch

LAUNCHES = 2000


def project(channels, launches, errors, emulated):
    """Launches one kernel so often, with the shared memory that so many input channels need."""
    emulated.set_device(132, 227 * 1024)  # of this thread
    emulated.set_dry(True)
    image = torch.empty(1, channels, 16, 16, dtype=torch.half)
    image = image.to(memory_format=torch.channels_last)
    ones = torch.ones(112)
    weights = ([torch.empty(7, channels, 16)], [ones], [ones])
    try:
        for _ in range(launches):
            torch.ops.edet_emulation.lateral(image, *weights, 0, 0)
    except RuntimeError as error:
        errors.append(str(error))


def test_threads_whose_launches_need_different_shared_memory(emulated):
    """Neither lowers the limit that the other has just set: 480 and 672 channels are both D0's."""
    errors = []
    threads = [threading.Thread(target=project, args=(channels, LAUNCHES, errors, emulated))
               for channels in (480, 672)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
