"""Count the lines of code under a folder: those that are neither blank, nor comment, nor docstring.

python scripts/count_code.py [src/ddpm_lab]
"""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(source: str) -> int:
    """How many lines of a Python source hold a token of code."""
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in SILENT
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):  # docstrings, those of attributes too: strings that are whole statements
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "src/ddpm_lab")
    counted: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        sums = counted[str(path.parent.relative_to(root))]
        for index, count in enumerate((1, len(source.splitlines()), code_lines(source))):
            sums[index] += count
    print(f"{'folder':<16}{'files':>7}{'lines':>8}{'code':>8}")
    for folder, (files, lines, code) in counted.items():
        print(f"{folder:<16}{files:>7}{lines:>8}{code:>8}")
    files, lines, code = (sum(sums[index] for sums in counted.values()) for index in range(3))
    print(f"{'in all':<16}{files:>7}{lines:>8}{code:>8}")


if __name__ == "__main__":
    main()
