"""What a function would compute, without computing it."""

from collections.abc import Iterator

import jax


def equations(function, *args) -> Iterator:
    """All equations of a function's jaxpr, those inside loops, branches and calls included."""

    def walk(jaxpr):
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            yield equation
            for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(parameter):
                    yield from walk(parameter)

    return walk(jax.make_jaxpr(function)(*args))


def _is_jaxpr(x) -> bool:
    return hasattr(x, "eqns")


def results(function, *args) -> list:
    """Shapes and dtypes of everything that the equations make."""
    return [variable.aval for equation in equations(function, *args) for variable in equation.outvars]
