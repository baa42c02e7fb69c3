"""The compiled ops that the public functions call, recorded."""

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Notes the calls of compiled ops that pass by."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("edet_"):
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def compiled_call(call):
    """The compiled op behind a public call, and its arguments."""
    with Recorder() as recorder:
        call()
    [recorded] = recorder.calls
    return recorded
