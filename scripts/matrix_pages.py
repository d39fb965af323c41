"""What the matrices of encoder-decoders and of models that see have in common: rows, file, page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model_matrix import in_a_process

BEGIN_MARK, END_MARK = "<!-- matrix: begin -->", "<!-- matrix: end -->"


def parse(description: str, default_json: str) -> argparse.Namespace:
    """The arguments of a matrix."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("architectures", nargs="*", help="model types; none: all that are missing")
    parser.add_argument("--json", default=default_json, help="results, read and written")
    parser.add_argument("--markdown", help="a page between whose marks the table is written")
    parser.add_argument("--limit-s", type=int, default=120, help="seconds for one architecture")
    return parser.parse_args()


def run_matrix(
    arguments: argparse.Namespace,
    names: Sequence[str],
    run: Callable[[str], dict[str, Any]],
    labels: Mapping[str, str],
) -> int:
    """Runs what was asked, or what the file lacks; 1 if an architecture gave a wrong token."""
    import transformers

    path = Path(arguments.json)
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    missing = [name for name in names if name not in results]
    for name in arguments.architectures or missing:
        results[name] = in_a_process(name, arguments.limit_s, run)
        print(f"{name:32} {results[name]['status']:14}", flush=True)
        content = {
            "transformers": transformers.__version__,
            "results": dict(sorted(results.items())),
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.markdown:
        page = Path(arguments.markdown)
        table = render(results, transformers.__version__, labels)
        page.write_text(with_table(page.read_text(), table))
    return int(any(row["status"] == "wrong" for row in results.values()))


def refusal(directory: Path) -> dict[str, Any] | None:
    """The row of a checkpoint that is refused at load; None: describing it refuses nothing."""
    from quire.core.errors import QuireError, UnsupportedError
    from quire.core.models.registry import describe

    try:
        describe(directory)
    except UnsupportedError as error:
        return refused(error)
    except QuireError:
        return None
    return None


def refused(error: Any) -> dict[str, Any]:
    """The row of an `UnsupportedError`: all that was needed, and what there is."""
    detail = "; ".join(f"{reason.need}: {reason.have}" for reason in error.reasons)
    return {"status": "refused", "detail": detail[:600]}


def render(results: Mapping[str, Any], version: str, labels: Mapping[str, str]) -> str:
    """The table."""
    by_status: dict[str, int] = {}
    for row in results.values():
        by_status[row["status"]] = by_status.get(row["status"], 0) + 1
    counts = ", ".join(f"{by_status[s]} {s.replace('_', ' ')}" for s in labels if s in by_status)
    lines = [
        f"With transformers {version}, {len(results)} architectures: {counts}.",
        "",
        "| architecture | result | remark |",
        "|---|---|---|",
    ]
    for name, row in sorted(results.items()):
        remark = row.get("detail", "").replace("|", "/").replace("\n", " ")
        lines.append(f"| {name} | {labels[row['status']]} | {remark[:240].strip()} |")
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """A page whose text between the marks is the table."""
    before, _, rest = page.partition(BEGIN_MARK)
    _, _, after = rest.partition(END_MARK)
    return f"{before}{BEGIN_MARK}\n{table}\n{END_MARK}{after}"
