"""One simple change of one expression of a file, and every such change."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.USub: ast.UAdd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "add": "sub", "sub": "add", "level": "below", "below": "level"}
DROPPED = ("eta", "up", "tau", "gamma")
GROUPS = (
    {"level", "below", "down", "middle", "low", "high", "start", "end"},
    {"x", "x0", "eps", "guess", "slope", "first"},
)
"""Names of one kind, of which two in a row may change places in a call."""


@dataclass(frozen=True)
class Mutant:
    """One change: of the `place`-th node of the file's tree to `new`."""

    file: str
    function: str
    line: int
    change: str
    place: int
    new: ast.AST

    @property
    def key(self) -> tuple[str, str, str]:
        """What the list of equivalent ones calls it."""
        return self.file, self.function, self.change


def mutants(file: str, source: str) -> list[Mutant]:
    """Every mutant of a file, in its order."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    places = {id(node): place for place, node in enumerate(nodes)}
    parents = {id(child): node for node in nodes for child in ast.iter_child_nodes(node)}
    found = []
    for function, node in _reached(tree, ""):
        for new in _changes(node, parents):
            # the parent too: an operand alone says little
            around = parents[id(node)]
            shown = around if isinstance(around, ast.expr | ast.keyword | ast.Return) else node
            text = f"{ast.unparse(shown)} -> {ast.unparse(replaced(shown, node, new))}"
            found.append(Mutant(file, function, node.lineno, text, places[id(node)], new))
    return found


def _reached(node: ast.AST, function: str) -> Iterator[tuple[str, Any]]:
    """(name of the function, node) of all that is computed: no annotations, decorators, messages or texts."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr | ast.ImportFrom):
                continue
            name = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{function}.{child.name}".lstrip(".")
            if isinstance(child, ast.expr):
                yield name, child
            yield from _reached(child, name)


def _changes(node: ast.AST, parents: dict[int, ast.AST]) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            if isinstance(number, float):
                yield ast.Constant(0.9 * number if number else 1.0)
            else:
                yield ast.Constant(number + 1)
                if isinstance(parents[id(node)], ast.Subscript | ast.Slice | ast.UnaryOp) and number:
                    yield ast.Constant(number - 1)
        case ast.BinOp(left, op, right):
            if type(op) in OPERATORS:
                yield ast.BinOp(left, OPERATORS[type(op)](), right)  # type: ignore[arg-type]
            if isinstance(op, ast.Sub | ast.Div | ast.Pow):
                yield ast.BinOp(right, op, left)
        case ast.UnaryOp(ast.USub(), operand):
            yield ast.UnaryOp(ast.UAdd(), operand)
        case ast.Compare(left, ops, right):
            for k, comparison in enumerate(ops):
                yield ast.Compare(left, [*ops[:k], OPERATORS[type(comparison)](), *ops[k + 1 :]], right)  # type: ignore[list-item]
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OPERATORS[type(op)](), values)  # type: ignore[arg-type]
            for left_out in range(len(values)):
                rest = [value for k, value in enumerate(values) if k != left_out]
                yield rest[0] if len(rest) == 1 else ast.BoolOp(op, rest)
        case ast.Name(name, ast.Load()) if name in DROPPED:
            yield ast.Constant(0.0)
        case ast.Name(("min" | "max") as name, ast.Load()):
            yield ast.Name(NAMES[name], ast.Load())
        case ast.Attribute(ast.Name("torch") as owner, ("add" | "sub") as name, context):
            yield ast.Attribute(owner, NAMES[name], context)
        case ast.Attribute(ast.Name(("level" | "below") as name), field, context):
            yield ast.Attribute(ast.Name(NAMES[name], ast.Load()), field, context)
        case ast.Call(func, args, keywords):
            for k in range(len(args) - 1):
                pair = {arg.id if isinstance(arg, ast.Name) else "" for arg in args[k : k + 2]}
                if len(pair) == 2 and any(pair <= group for group in GROUPS):
                    yield ast.Call(func, [*args[:k], args[k + 1], args[k], *args[k + 2 :]], keywords)
    if isinstance(parents.get(id(node)), ast.If | ast.IfExp | ast.While | ast.comprehension):
        around: Any = parents[id(node)]
        plain = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot | ast.Eq | ast.NotEq)
        if not plain and (node is getattr(around, "test", None) or node in getattr(around, "ifs", [])):
            yield ast.UnaryOp(ast.Not(), node)  # type: ignore[arg-type]


def replaced(tree: Any, old: ast.AST, new: ast.AST) -> Any:
    """A copy of the tree with one node for another."""

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if node is old else self.generic_visit(copy.copy(node))

        def generic_visit(self, node: ast.AST) -> ast.AST:
            for field, value in ast.iter_fields(node):
                if isinstance(value, list):
                    setattr(node, field, [self.visit(v) if isinstance(v, ast.AST) else v for v in value])
                elif isinstance(value, ast.AST):
                    setattr(node, field, self.visit(value))
            return node

    return Replace().visit(tree)


def described(mutant: Mutant) -> str:
    """One line for a person."""
    return f"{mutant.file}:{mutant.line} {mutant.function}: {mutant.change}"
