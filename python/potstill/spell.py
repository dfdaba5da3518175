"""A formula of divergences.py spelled as C++: `python -m potstill.spell > csrc/divergences.inc`.

The C++ row kernels (CPU and CUDA) include the result. The language is what a formula needs: single assignments, tuples
of two, arithmetic, comparisons, numbers, and calls of primitives or of helper functions, which are spelled too.
Anything else is refused by line. (kernels/triton_formula.py makes Triton device functions of the same source.)
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

from potstill import divergences

PRIMITIVES = ("abs", "exp", "expm1", "log", "log1p", "where")
BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.BitAnd: "&", ast.BitOr: "|"}
COMPARE = {ast.Gt: ">", ast.GtE: ">=", ast.Lt: "<", ast.LtE: "<=", ast.Eq: "==", ast.NotEq: "!="}
HEADER = """\
// Made from python/potstill/divergences.py by `python -m potstill.spell`; do not edit.
// The tables come first, X(name, parameters): the divergences, then what else the CPU kernels serve. The functions
// follow where POTSTILL_FN (function attributes) is defined; they need two<V> {V a; V b;}, lit<V>(double), and for V:
// abs, exp, expm1, log1p, where. `outer` maps a row's sums to (the divergence, its derivative by the terms' sum), by
// the divergence's place in the table; it needs `log` too.
"""


def helpers(formula: Callable[..., Any]) -> list[FunctionType]:
    """The plain Python functions a formula calls, callees first."""
    found: list[FunctionType] = []
    for name in formula.__code__.co_names:
        callee = formula.__globals__.get(name)
        if isinstance(callee, FunctionType) and name not in PRIMITIVES:
            found += [f for f in [*helpers(callee), callee] if f not in found]
    return found


class _Function:
    """Spells one function."""

    def __init__(self, function: Callable[..., Any]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        self.tree, self.names = tree, [a.arg for a in tree.args.args]
        self.callable = {*PRIMITIVES, *(f.__name__ for f in helpers(function))}

    def refuse(self, node: ast.AST, what: str) -> Exception:
        line = getattr(node, "lineno", 0)
        return SyntaxError(f"{self.tree.name}, line {line}: {what} cannot be spelled as C++ (see potstill/spell.py)")

    def expression(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name) if name in self.names:
                return name
            case ast.Constant(value=int() | float() as value):
                return f"lit<V>({float(value)!r})"
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"(-{self.expression(operand)})"
            case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
                return f"({self.expression(left)} {BINARY[type(op)]} {self.expression(right)})"
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARE:
                return f"({self.expression(left)} {COMPARE[type(op)]} {self.expression(right)})"
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in self.callable:
                return f"{name}({', '.join(map(self.expression, args))})"
        raise self.refuse(node, f"`{ast.unparse(node)}`")

    def body(self) -> tuple[list[str], bool]:
        """(lines, whether two values are returned)."""
        lines = []
        for node in self.tree.body:
            match node:
                case ast.Expr(value=ast.Constant(value=str())):
                    continue
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if name not in self.names:
                    lines.append(f"const V {name} = {self.expression(value)};")
                    self.names.append(name)
                case ast.Assign(
                    targets=[ast.Tuple(elts=[ast.Name(id=a), ast.Name(id=b)])], value=ast.Call() as call
                ) if a not in self.names and b not in self.names:
                    lines.append(f"const auto [{a}, {b}] = {self.expression(call)};")
                    self.names += [a, b]
                case ast.Return(value=ast.Tuple(elts=[first, second])):
                    return [*lines, f"return {{{self.expression(first)}, {self.expression(second)}}};"], True
                case ast.Return(value=ast.expr() as value):
                    return [*lines, f"return {self.expression(value)};"], False
                case _:
                    raise self.refuse(node, f"`{ast.unparse(node)}`")
        raise self.refuse(self.tree, "a function without return")


def cpp_function(function: Callable[..., Any]) -> str:
    """The function as a C++ template over the value type V."""
    spelled = _Function(function)
    arguments = ", ".join(f"V {name}" for name in spelled.names)
    lines, pair = spelled.body()
    body = "\n".join(f"  {line}" for line in lines)
    result = "two<V>" if pair else "V"
    return f"template <class V>\nPOTSTILL_FN {result} {spelled.tree.name}({arguments}) {{\n{body}\n}}\n"


def in_order() -> list[divergences.Divergence]:
    """The table, divergences first: a compiled kernel is told a divergence by its place here."""
    return sorted(divergences.TABLE.values(), key=lambda d: d.kind != "divergence")


def outer_function() -> str:
    """The C++ function that finds a divergence's outer function by its place in the table."""
    cases = []
    for place, entry in enumerate(in_order()):
        if entry.outer:
            values = "".join(f", lit<V>(params[{i}])" for i in range(len(entry.parameters)))
            cases.append(f"  if (divergence == {place}) return {entry.outer.__name__}(total, slope{values});\n")
    head = "template <class V>\nPOTSTILL_FN two<V> outer(int divergence, V total, V slope, const double* params) {\n"
    return head + "".join(cases) + "  return {total, lit<V>(1.0)};\n}\n"


def cpp_source() -> str:
    """csrc/divergences.inc: the table as an X-macro X(name, parameters), then every helper and formula of it."""
    functions: list[Callable[..., Any]] = []
    for entry in in_order():
        for top in (entry.formula, entry.outer):
            called: list[Callable[..., Any]] = [*helpers(top), top] if top else []
            functions += [f for f in called if f not in functions]
    table = ""
    for macro, kept in (("POTSTILL_DIVERGENCES", True), ("POTSTILL_OTHERS", False)):
        lines = [f"  X({d.name}, {len(d.parameters)})" for d in in_order() if (d.kind == "divergence") == kept]
        table += f"#define {macro}(X) \\\n" + " \\\n".join(lines) + "\n"
    return "\n".join(
        [HEADER, table, "#ifdef POTSTILL_FN\n", *map(cpp_function, functions), outer_function(), "#endif\n"]
    )


if __name__ == "__main__":
    print(cpp_source(), end="")
