"""How one ATen call is called by the dispatcher, by the profiler, and on the tape."""


def unified(name: str) -> str:
    """A dispatched call's name for comparison: `add_.Tensor` as `add.Tensor`.

    The engine adds gradients in place where nobody else holds them, which the tape does not see.
    """
    return "add.Tensor" if name == "add_.Tensor" else name


def short(name: str) -> str:
    """A call's name without namespace, overload and mark of being in place, which the profiler writes differently."""
    return name.removeprefix("aten::").partition(".")[0].rstrip("_")
