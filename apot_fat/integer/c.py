"""An integer program as C99: one header and one source, without floats, allocation or a library.

A convolution is computed one output channel at a time, its sums in one small buffer, and what reads them follows at
once. Where the other results lie is ``memory.py``'s; the functions that compute are in ``kernels.c``, one a combination
of types.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np
import torch

from apot_fat.integer.c_text import array_lines, comment, packed_bytes, statement
from apot_fat.integer.memory import TYPES, Memory, smallest_type, sums_type
from apot_fat.integer.program import Add, Convolution, IntegerProgram, Lookup, Operation, Pool, Rescale, Thresholds
from apot_fat.quant.integers import shift_terms

Array = np.ndarray
Products = Literal["shift", "multiply"]
_BYTES = {"uint8": 1, "int8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8}


@dataclass(frozen=True)
class CSource:
    """What ``c_source`` writes.

    Args:
        header, source: the text of NAME.h and NAME.c.
        ram, constants: bytes of the buffers; of weights and tables. Code and stack come beside them.
    """

    header: str
    source: str
    ram: int
    constants: int


def c_source(program: IntegerProgram, name: str, products: Products = "shift") -> CSource:
    """A program in C99.

    Args:
        program: what ``integer_program`` makes.
        name: of the files, as C spells names, and of their function ``NAME_run`` and macros ``NAME_CLASSES``, ….
        products: of weights, ``shift``: shifts and adds alone, so that no multiplication is compiled into the program;
            or ``multiply``: by ``*``.
    """
    return _Writer(program, name, products).write()


def check_c_file(path: Path) -> None:
    """Raise ``ValueError`` unless a file's name is one that C's functions can have, and ends in .c."""
    if path.suffix != ".c" or not re.fullmatch(r"[A-Za-z]\w*", path.stem, re.ASCII):
        raise ValueError(f"{path}: names functions of C; letters, digits and underscores and .c, such as network.c")


class _Writer:
    def __init__(self, program: IntegerProgram, name: str, products: Products) -> None:
        self.program, self.name, self.products = program, name, products
        self.operations = program.operations
        self.memory = Memory(program)
        self.kernels: dict[tuple[str, ...], str] = {}
        self.data: list[str] = []
        self.named: dict[tuple[str, str], str] = {}
        self.constants = 0
        self.sums = {"int16": 0, "int32": 0}
        self.padded = dict.fromkeys(TYPES, 0)

    def write(self) -> CSource:
        """The two texts."""
        steps = [self._step(number) for number in self.memory.steps]
        buffers = [f"static {kind}_t {kind}s[{size}];" for kind, size in self.memory.sizes.items() if size]
        buffers += [f"static {kind}_t {kind}_sums[{size}];" for kind, size in self.sums.items() if size]
        buffers += [f"static {kind}_t padded_{kind}[{size}];" for kind, size in self.padded.items() if size]
        arrays = (self.memory.sizes, self.sums, self.padded)
        ram = sum(_BYTES[kind] * size for sizes in arrays for kind, size in sizes.items())
        order = {kernel: rank for rank, kernel in enumerate(_kernels())}
        kernels = [
            text for key, text in sorted(self.kernels.items(), key=lambda item: (order[item[0][0]], item[0][1:]))
        ]
        run = f"void {self.name}_run(const uint8_t *pixels, int32_t *logits)\n{{\n" + "\n".join(steps) + "\n}\n"
        parts = [f'#include "{self.name}.h"\n', *kernels, "\n".join(self.data) + "\n", "\n".join(buffers) + "\n", run]
        return CSource(self._header(ram), "\n".join([*parts, self._main()]), ram, self.constants)

    def _header(self, ram: int) -> str:
        upper = self.name.upper()
        channels, height, width = self.program.input_shape
        classes = int(np.prod(self.operations[-1].shape))
        return f"""#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

#define {upper}_CHANNELS {channels}
#define {upper}_HEIGHT {height}
#define {upper}_WIDTH {width}
#define {upper}_CLASSES {classes}
#define {upper}_RAM_BYTES {ram}L /* of static buffers */
#define {upper}_CONSTANT_BYTES {self.constants}L /* of weights and tables */

/*
 * The network's logits of an image of bytes, channel by channel and row by row. The largest is the class; in the unit
 * of the float network each counts {self.program.logit_scale!r}. Buffers are static: one call at a time.
 */
void {self.name}_run(const uint8_t *pixels, int32_t *logits);

#endif
"""

    def _main(self) -> str:
        upper = self.name.upper()
        return f"""#ifdef {upper}_MAIN
/* images on standard input as bytes, their logits on standard output, one line each */
#include <stdio.h>

int main(void)
{{
    static uint8_t pixels[(long){upper}_CHANNELS * {upper}_HEIGHT * {upper}_WIDTH];
    static int32_t logits[{upper}_CLASSES];
    int i;
    while (fread(pixels, sizeof pixels, 1, stdin) == 1) {{
        {self.name}_run(pixels, logits);
        for (i = 0; i < {upper}_CLASSES; i++)
            printf("%ld%c", (long)logits[i], i + 1 < {upper}_CLASSES ? ' ' : '\\n');
    }}
    return 0;
}}
#endif
"""

    # what is written

    def _kernel(self, kernel: str, **values: str) -> str:
        text = Template(_kernels()[kernel]).substitute(values)
        self.kernels.setdefault((kernel, *values.values()), text)
        return "_".join(value for key, value in values.items() if key in ("kind", "x", "t", "y"))

    def _array(self, kind: str, values: Iterable[int], name: str) -> str:
        return self._constants(f"{kind}_t", _BYTES[kind], list(map(str, values)), name)

    def _constants(self, kind: str, size: int, listed: Sequence[str], name: str) -> str:
        # the name of an array; equal ones are one
        text = array_lines(listed)
        if (kind, text) not in self.named:
            self.named[kind, text] = f"{name}_{len(self.named)}"
            self.data.append(f"static const {kind} {self.named[kind, text]}[] = {{\n{text}\n}};")
            self.constants += size * len(listed)
        return self.named[kind, text]

    def _step(self, number: int) -> str:
        operation = self.operations[number]
        if isinstance(operation, Convolution):
            body = self._convolution(number, operation)
        elif isinstance(operation, Add):
            first, second = operation.inputs
            self._kernel("clipped")
            kernel = self._kernel(
                "plus", x=self.memory.type(first), t=self.memory.type(second), y=self.memory.type(number)
            )
            arguments = (
                self.memory.pointer(number),
                self.memory.pointer(first),
                self.memory.pointer(second),
                _size(operation),
            )
            body = [statement(f"plus_{kernel}", *arguments, operation.low, operation.high)]
        elif isinstance(operation, Pool):
            body = self._pool(number, operation)
        else:
            body = self._pointwise(number, operation)
        said = f"{operation.name}: {type(operation).__name__.lower()}"
        return "\n".join([f"    /* {comment(said)} */", *(f"    {line}" for line in body)])

    def _pointwise(self, number: int, operation: Operation) -> list[str]:
        (read,) = operation.inputs
        channels, *size = operation.shape
        plane = int(np.prod(size))
        is_one_row = _rows(operation) == 1 and not isinstance(operation, Lookup)
        if is_one_row:
            channels, plane = 1, channels * plane
        x, y = self.memory.type(read), self.memory.type(number)
        call, steps = self._channel(operation, x, y, "x", "y", plane)
        body = [f"const {x}_t *x = {self.memory.pointer(read)};", f"{y}_t *y = {self.memory.pointer(number)};"]
        if channels == 1:
            return ["{", *(f"    {line}" for line in (*body, *steps.declared, call)), "}"]
        advanced = [f"x += {plane}, y += {plane}", *steps.advanced]
        loop = f"for (channel = 0; channel < {channels}; channel++, {', '.join(advanced)})"
        lines = [*body, *steps.declared, "int32_t channel;", loop, f"    {call}"]
        return ["{", *(f"    {line}" for line in lines), "}"]

    def _channel(self, operation: Operation, x: str, y: str, read: str, written: str, count: int) -> tuple[str, _Steps]:
        """The call that computes one channel; what to declare before and to advance after it."""
        tag = written
        if isinstance(operation, Lookup):
            kernel = self._kernel("look_up", y=y)
            table = self._array(y, operation.table.ravel().tolist(), "table")
            steps = _Steps([f"const {y}_t *table = {table};"], ["table += 256"])
            return statement(f"look_up_{kernel}", written, read, count, "table"), steps
        advances = _rows(operation) > 1
        if isinstance(operation, Thresholds):
            rows = operation.thresholds_CT
            t = smallest_type(int(rows.min(initial=0)), int(rows.max(initial=0)), ("int8", "int16", "int32"))
            kernel = self._kernel("levels", x=x, t=t, y=y)
            levels = self._array(y, operation.levels, "levels")
            listed = rows.ravel().tolist() or [0]
            declared = [f"const {t}_t *t_{tag} = {self._array(t, listed, 'thresholds')};"]
            advanced = [f"t_{tag} += {rows.shape[1]}"]
            falls = str(int(operation.falls_C[0]))
            if advances and operation.falls_C.any():
                falls = f"*f_{tag}"
                name = self._array("uint8", operation.falls_C.astype(int).tolist(), "falls")
                declared.append(f"const uint8_t *f_{tag} = {name};")
                advanced.append(f"f_{tag}++")
            call = statement(f"levels_{kernel}", written, read, count, f"t_{tag}", rows.shape[1], falls, levels)
        else:
            assert isinstance(operation, Rescale)
            self._kernel("clipped")
            self._kernel(f"times_{self.products}")
            kernel = self._kernel("rescale", x=x, y=y)
            columns = (("int32", operation.factor_C), ("int64", operation.addend_C), ("uint8", operation.shift_C))
            declared, advanced, used = [], [], []
            for kind, column in columns:
                label = {"int32": "factor", "int64": "addend", "uint8": "shift"}[kind]
                name = self._array(kind, column.tolist(), label)
                declared.append(f"const {kind}_t *{label}_{tag} = {name};")
                advanced.append(f"{label}_{tag}++")
                used.append(f"*{label}_{tag}")
            call = statement(f"rescale_{kernel}", written, read, count, *used, operation.low, operation.high)
        return call, _Steps(declared, advanced if advances else [])

    def _convolution(self, number: int, operation: Convolution) -> list[str]:
        (read,) = operation.inputs
        _, out_height, out_width = operation.shape
        plane = out_height * out_width
        x = self.memory.type(read)
        epilogue = self.memory.epilogue(number)
        y = sums_type(operation) if epilogue else self.memory.type(number)
        height, width = self.memory.shape(read)[1:]
        (top, left), (down, right) = operation.padding, operation.stride
        in_runs = bool(epilogue) and (down, right) == (1, 1) and (out_height, out_width) == (height, width)
        pitch = width + left if in_runs else width
        self._sums_kernels(x, y, in_runs)
        values, codes = np.unique(operation.weight_OIHW, return_inverse=True)
        packed = self._array("uint8", packed_bytes(codes.ravel(), operation.weight_bits), "weights")
        outputs, inputs = operation.weight_OIHW.shape[:2]
        fields = (
            self._weight_levels(values),
            operation.weight_bits,
            inputs,
            *(height, width, height * width),
            *operation.weight_OIHW.shape[2:],
            *(down, right, down * width),
            *(-top, -left, -top * pitch),
            *(operation.dilation[0], operation.dilation[0] * pitch, operation.dilation[1]),
            *(out_height, out_width, (out_width - 1) * right, height * pitch),
        )
        body = [
            f"static const struct convolution c = {{{', '.join(map(str, fields))}}};",
            f"const {x}_t *x = {self.memory.pointer(read)};",
            f"struct reader weights = {{{packed}, 0, 0}};",
        ]
        if epilogue:
            sums = f"{y}_sums"
            self.sums[y] = max(self.sums[y], height * pitch if in_runs else plane)
            self.padded[x] = max(self.padded[x], height * pitch + 2 * left if in_runs else 0)
            inner, after = [], []
            for index, follower in enumerate(epilogue):
                kind, tag = self.memory.type(follower), f"y{index}"
                call, steps = self._channel(self.operations[follower], y, kind, sums, tag, plane)
                body += [f"{kind}_t *{tag} = {self.memory.pointer(follower)};", *steps.declared]
                inner.append(call)
                after += [f"{tag} += {plane};", *(f"{step};" for step in steps.advanced)]
        else:
            sums, inner, after = "y", [], [f"y += {plane};"]
            body.append(f"{y}_t *y = {self.memory.pointer(number)};")
        if in_runs:
            computed = statement(f"runs_{x}_{y}", sums, f"padded_{x}", "x", "&c", "&weights")
        else:
            computed = statement(f"sums_{x}_{y}", sums, "x", "&c", plane, "&weights")
        inner = [computed, *inner, *after]
        groups = operation.groups
        if groups == 1:
            body.append("int32_t output;")
        else:
            body.append("int32_t group, output;")
            body.append(f"for (group = 0; group < {groups}; group++, x += {inputs * height * width})")
        body += [
            f"for (output = 0; output < {outputs // groups}; output++) {{",
            *(f"    {line}" for line in inner),
            "}",
        ]
        return ["{", *(f"    {line}" for line in body), "}"]

    def _sums_kernels(self, x: str, y: str, in_runs: bool) -> None:
        # what sums inputs x as y: in runs, or row by row
        kernel, infix = ("run", "_run") if in_runs else ("add", "")
        read = "x[j]" if in_runs else "x[k]"
        arguments = "to, from, count" if in_runs else "sums, x, c, top, left, first + left"
        if self.products == "multiply":
            self._kernel("weights", weight="struct weight {\n    int32_t value;\n};")
            term = f"+ ({y}_t)({read} * factor)"
            self._kernel(kernel, name="add", x=x, y=y, argument=f"{y}_t factor", term=term)
            apply = f"if (w.value)\n    add{infix}_{x}_{y}({arguments}, ({y}_t)w.value);"
        else:
            kind = "uint32" if self._has_wide_weights else "uint16"
            said = "/* the powers of two it is the sum of, as bits */"
            self._kernel("weights", weight=f"{said}\nstruct weight {{\n    {kind}_t added, subtracted;\n}};")
            for name, sign in (("add", "+"), ("subtract", "-")):
                term = f"{sign} ({y}_t)((u{y}_t){read} << shift)"
                self._kernel(kernel, name=name, x=x, y=y, argument="uint8_t shift", term=term)
            apply = f"""uint8_t shift;
for (shift = 0; w.added | w.subtracted; shift++, w.added >>= 1, w.subtracted >>= 1) {{
    if (w.added & 1)
        add{infix}_{x}_{y}({arguments}, shift);
    if (w.subtracted & 1)
        subtract{infix}_{x}_{y}({arguments}, shift);
}}"""
        indented = "\n".join(" " * 16 + line for line in apply.split("\n"))
        if in_runs:
            self._kernel("surround", x=x)
        self._kernel("runs" if in_runs else "sums", x=x, y=y, apply=indented)

    @property
    def _has_wide_weights(self) -> bool:
        sums = (operation for operation in self.operations if isinstance(operation, Convolution))
        return any(int(np.abs(operation.weight_OIHW).max()) >= 1 << 15 for operation in sums)

    def _weight_levels(self, values: Array) -> str:
        if self.products == "multiply":
            listed = [f"{{{value}}}" for value in values.tolist()]
            size = _BYTES["int32"]
        else:
            terms = shift_terms(torch.from_numpy(values))
            pairs = zip(terms.added.tolist(), terms.subtracted.tolist(), strict=True)
            listed = [f"{{{added}, {subtracted}}}" for added, subtracted in pairs]
            size = 2 * _BYTES["uint32" if self._has_wide_weights else "uint16"]
        return self._constants("struct weight", size, listed, "weight_levels")

    def _pool(self, number: int, operation: Pool) -> list[str]:
        (read,) = operation.inputs
        channels, height, width = self.memory.shape(read)
        is_sum = operation.kind == "sum"
        x, y = self.memory.type(read), self.memory.type(number)
        self._kernel("window")
        self._kernel(
            "pool",
            kind=operation.kind,
            x=x,
            y=y,
            nothing="0" if is_sum else "INT32_MIN",
            take="result += value;" if is_sum else "result = value > result ? value : result;",
        )
        (top, left), (down, right) = operation.padding, operation.stride
        fields = (
            *(channels, height, width, height * width),
            *operation.kernel,
            *(down, right, down * width),
            *(-top, -left, -top * width),
            *operation.shape[1:],
        )
        call = statement(f"{operation.kind}_{x}_{y}", self.memory.pointer(number), self.memory.pointer(read), "&w")
        return ["{", f"    static const struct window w = {{{', '.join(map(str, fields))}}};", f"    {call}", "}"]


@dataclass(frozen=True)
class _Steps:
    declared: Sequence[str]
    advanced: Sequence[str]


@cache
def _kernels() -> dict[str, str]:
    text = (Path(__file__).parent / "kernels.c").read_text(encoding="utf-8")
    parts = re.split(r"^/\* kernel: (\w+) \*/\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (part.rstrip("\n") + "\n" for part in parts[1::2]), strict=True))


def _rows(operation: Operation) -> int:
    # how many channels have constants of their own
    if isinstance(operation, Thresholds):
        return len(operation.thresholds_CT)
    return len(operation.factor_C) if isinstance(operation, Rescale) else operation.shape[0]


def _size(operation: Operation) -> int:
    return int(np.prod(operation.shape))
