"""How an op finds the implementation that runs it, and refuses what does not fit: shared by api.py and decoding.py."""

from functools import partial
from types import ModuleType

from pallas_kernels import chunked, mosaic_tpu, reference, triton

# In the order in which None tries them.
IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": triton, "mosaic_tpu": mosaic_tpu, "chunked": chunked, "reference": reference,
}  # fmt: skip
PALLAS = ("triton", "mosaic_tpu")


def unsupported_reason(op: str, implementation: str, arrays: dict, *, interpret: bool = False) -> str | None:
    """Why ``implementation`` cannot run ``op`` on ``arrays`` (its arguments by name) here; None if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"there is no such implementation; choose one of {', '.join(IMPLEMENTATIONS)} or None"
    if implementation in PALLAS:
        return IMPLEMENTATIONS[implementation].unsupported_reason(op, arrays, interpret=interpret)
    return None


def choose(op: str, implementation: str | None, arrays: dict, interpret: bool, also: tuple[str, ...] = ()):
    """The function that runs ``op``: of the named implementation, or of the first that can.

    Args:
      also: further functions of that implementation, which then follow in a tuple.

    Raises:
      ValueError: the name is unknown. NotImplementedError: the named one cannot run this call.
    """
    named = implementation is not None
    names = [implementation] if named else list(IMPLEMENTATIONS)
    reasons = {name: unsupported_reason(op, name, arrays, interpret=interpret) for name in names}
    for name, reason in reasons.items():
        if reason is None:
            functions = [getattr(IMPLEMENTATIONS[name], function) for function in (op, *also)]
            if name in PALLAS:
                functions = [partial(function, interpret=interpret) for function in functions]
            return tuple(functions) if also else functions[0]
    error = NotImplementedError if not named or implementation in IMPLEMENTATIONS else ValueError
    raise error(f"{op}: implementation = {implementation!r}: {'; '.join(map(str, reasons.values()))}")


def check(op: str, condition: bool, name: str, value, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{op}: {name} is {value}; {allowed}")


def check_widths(op, key_width, value_width):
    power_of_two = key_width & (key_width - 1) == 0
    check(op, power_of_two and key_width <= 256, "K", key_width, "it must be a power of two up to 256")
    check(op, value_width % 16 == 0 and 0 < value_width <= 1280, "V", value_width, "a multiple of 16 up to 1280")
