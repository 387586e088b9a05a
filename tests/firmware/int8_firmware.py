"""Calls of the kernels in 8 bits as C, for int8_check.c."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from firmware.int8_cases import Addend, Call, Norm, Output
from firmware.int8_oracle import Array
from firmware.kernels_harness import Image


def _array(name: str, values: Array) -> str:
    exact = (v.hex() + "f" if isinstance(v, float) else str(v) for v in values.ravel().tolist())
    numbers, kind = ",".join(exact), values.dtype.name
    kind = "float" if kind == "float32" else f"{kind}_t"
    return f"static const {kind} {name}[] = {{{numbers}}};\n"


def _pointer(kind: str, fields: str) -> str:
    return f"&(const struct {kind}){{{fields}}}"


def _call(number: int, call: Call) -> str:
    arrays, arguments = "", ["y"]
    for i, argument in enumerate(call.arguments):
        name = f"a{number}_{i}"
        match argument:
            case np.ndarray():
                arrays += _array(name, argument)
                arguments.append(f"PLACED({i}, {name})")
            case Output():
                arrays += _array(f"{name}m", argument.multiplier)
                arrays += _array(f"{name}s", argument.shift)
                bounds = f"{argument.zero}, {argument.min}, {argument.max}"
                arguments.append(_pointer("int8_output", f"{name}m, {name}s, {bounds}"))
            case Addend():
                fields = f"{argument.multiplier}, {argument.shift}, {argument.zero}"
                arguments.append(_pointer("int8_addend", fields))
            case Norm():
                roles = ("epsilon", "floor", "factor", "shift")
                arrays += "".join(_array(f"{name}{r}", getattr(argument, r)) for r in roles)
                scales = (f"{scale.hex()}f" for scale in argument.scales)
                fields = ", ".join([*map(str, argument.numbers), *scales])
                fields += "".join(f", {name}{role}" for role in roles)
                arguments.append(_pointer("int8_norm", fields))
            case Image():
                out = argument.channels if call.kernel == "int8_depthwise" else argument.out
                window = argument.window(out)
                fields = ", ".join(str(getattr(window, field[0])) for field in window._fields_)
                arguments.append(_pointer("window", fields))
            case _:
                arguments.append(str(argument))
    ignored = "" if call.scratch else "    (void)room;\n"
    if call.scratch:
        kind = "int32_t" if call.kernel == "int8_group_norm" else "int8_t"
        arguments.append(f"({kind} *)room")
    return (
        f"{arrays}{_array(f'expected{number}', call.expected)}"
        f"static void call{number}(int8_t *y, int8_t *room) {{\n{ignored}"
        f"    {call.kernel}({', '.join(arguments)});\n}}\n"
    )


def cases_h(calls: Mapping[str, Call]) -> str:
    """The text of cases.h."""
    rows = "".join(
        f'    {{"{name}", call{i}, expected{i}, {call.expected.size}, {call.scratch}}},\n'
        for i, (name, call) in enumerate(calls.items())
    )
    functions = "".join(_call(i, call) for i, call in enumerate(calls.values()))
    return f"{functions}static const struct check checks[] = {{\n{rows}}};\n"
