"""Count lines of code per method: our file beside those of the same method in Avalanche and in Mammoth.

A line counts if it holds anything other than a comment or a docstring. What a file imports is not counted: neither our
base classes (`Distillation`, `Importance`, ...) nor theirs.

    pip download --no-deps avalanche-lib && unzip avalanche_lib-*.whl -d peers
    git clone https://github.com/aimagelab/mammoth peers/mammoth
    python benchmarks/lines.py --avalanche peers/avalanche --mammoth peers/mammoth
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

OURS = Path(__file__).parent.parent / "cl_runner" / "strategies"
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
PEERS = {  # ours -> Avalanche's below training/, Mammoth's below models/
    "agem": ("plugins/agem.py", "agem.py"),
    "bic": ("plugins/bic.py", "bic.py"),
    "der": ("", "der.py"),
    "derpp": ("supervised/der.py", "derpp.py"),
    "er": ("plugins/replay.py", "er.py"),
    "er_ace": ("supervised/er_ace.py", "er_ace.py"),
    "ewc": ("plugins/ewc.py", "ewc_on.py"),
    "fecam": ("plugins/update_fecam.py", ""),
    "gdumb": ("plugins/gdumb.py", "gdumb.py"),
    "gem": ("plugins/gem.py", "gem.py"),
    "icarl": ("supervised/icarl.py", "icarl.py"),
    "l2p": ("supervised/l2p.py", "l2p.py"),
    "lfl": ("plugins/lfl.py", ""),
    "lucir": ("", "lucir.py"),
    "lwf": ("plugins/lwf.py", "lwf.py"),
    "mas": ("plugins/mas.py", ""),
    "mir": ("plugins/mir.py", ""),
    "ncm": ("plugins/update_ncm.py", ""),
    "rwalk": ("plugins/rwalk.py", ""),
    "si": ("plugins/synaptic_intelligence.py", "si.py"),
    "slda": ("supervised/deep_slda.py", ""),
}


def lines_of_code(source: str) -> int:
    """The number of lines that hold code."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            first = body[0].value
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avalanche", type=Path, help="the package's folder")
    parser.add_argument("--mammoth", type=Path, help="the repository's folder")
    given = parser.parse_args()
    print("| method | ours | Avalanche | Mammoth |\n|---|---|---|---|")
    for name, (avalanche, mammoth) in PEERS.items():
        files = [
            OURS / f"{name}.py",
            given.avalanche / "training" / avalanche if given.avalanche and avalanche else None,
            given.mammoth / "models" / mammoth if given.mammoth and mammoth else None,
        ]
        counts = [str(lines_of_code(file.read_text())) if file and file.is_file() else "–" for file in files]
        print(f"| {name} | {' | '.join(counts)} |")


if __name__ == "__main__":
    main()
