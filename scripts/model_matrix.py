#!/usr/bin/env python3
"""Try every causal-LM architecture of transformers on the real engine, and write down the result.

    python scripts/model_matrix.py --markdown docs/models.md [NAME ...]

Of each architecture a tiny random model is made, run with concurrent requests of many lengths
(chunked, prefix-shared, in a cache too small for all) in float32, and compared token by token with
`generate`. A process for each, with a limit of time and of memory. What is in the JSON file already
is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "models"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LENGTHS = (15, 31, 47, 63)
NUM_TOKENS = 20
MARGIN = 1e-3
"""A reference whose best two logits are nearer than this decides nothing."""
MEMORY_BYTES = 10 << 30
_CACHES = (6, 7, 8, 10, 12, 16, 24, 40)
"""Sizes of a cache in blocks, the smallest first: the first that holds the longest request."""
_WAYS = """\
*paged*: one flat token batch, attention served by the device. *cached*: request by request, with a
transformers cache filled from pages, states included; slower. *recomputed*: the whole text for
every token; slower by far. Which way is taken is said by `quire plan` as far as a dry run tells,
and settled at load, where the model is held against its own logits: one that differs is refused.
Preemptions and tokens from cached prefixes are counted over the runs of a row, whose prompts are
all cut into chunks; a model of states alone never grows, so nobody is preempted. Linear layers,
gated MLPs and RMS norms that the device's operators compute alike are computed by them. A package
adds a family of its own by the entry point `quire.models`, named as the architecture;
`--model-impl native` or `transformers` chooses."""
_TRIES = 3
"""Scarce caches until somebody is preempted."""
LABELS = {
    "exact": "exact",
    "exact_uncached": "exact (as `generate` without a cache; with one it gives other tokens)",
    "refused": "refused at load",
    "no_reference": "no verdict: transformers itself does not run the tiny model",
    "wrong": "WRONG TOKENS",
    "failed": "fails with an error",
}


def main() -> int:
    """Runs the matrix; 1 if an architecture gave a wrong token."""
    arguments = _parse()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from tiny_architectures import causal_architectures

    import_everything()

    path = Path(arguments.json)
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    asked = arguments.architectures or [
        name for name in causal_architectures() if name not in results
    ]
    for name in asked[arguments.part :: arguments.parts]:
        results[name] = in_a_process(name, arguments.limit_s)
        print(f"{name:32} {results[name]['status']:14} {results[name].get('way', '')}", flush=True)
        _write(path, results)
    if arguments.markdown:
        Path(arguments.markdown).write_text(render(results, transformers.__version__))
    return int(any(row["status"] == "wrong" for row in results.values()))


def import_everything() -> None:
    """What every child needs, so that it imports its own architecture alone."""
    import importlib

    from tiny_architectures import make_tiny_architecture

    reference(make_tiny_architecture("llama"), use_cache=True)
    for name in ("backends.cpu", "core.engine.llm", "core.worker.worker", "core.models.loading"):
        importlib.import_module(f"quire.{name}")
    importlib.import_module("quire.core.models.transformers_adapter")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("architectures", nargs="*", help="model types; none: all that are missing")
    parser.add_argument(
        "--json", default="docs/reports/models.json", help="results, read and written"
    )
    parser.add_argument("--markdown", help="a page to write the table to")
    parser.add_argument("--limit-s", type=int, default=120, help="seconds for one architecture")
    parser.add_argument("--part", type=int, default=0, help="which part of the list, from 0")
    parser.add_argument("--parts", type=int, default=1, help="of how many parts")
    return parser.parse_args()


def _write(path: Path, results: dict[str, Any]) -> None:
    """Keeps what another process of the same matrix has written in the meantime."""
    import transformers

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"transformers": transformers.__version__, "results": dict(sorted(results.items()))}
    path.write_text(json.dumps(content, indent=1) + "\n")


def in_a_process(
    name: str, limit_s: int, run: Callable[[str], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """One architecture in a child of this process, which has imported everything already."""
    begin = time.perf_counter()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(name, writer, limit_s, run or run_architecture)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        why = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no answer"
        return {"status": "failed", "detail": f"the process ended with {why}", "made": _today()}
    result: dict[str, Any] = json.loads(text)
    result["made"] = _today()
    result["seconds"] = round(time.perf_counter() - begin, 1)
    return result


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _child(name: str, writer: int, limit_s: int, run: Callable[[str], dict[str, Any]]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.alarm(limit_s)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        result = run(name)
    except BaseException as error:  # reported as this architecture's result
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        said = re.sub(r"/\S*/tmp\w+", "its folder", str(error))
        result = {"status": "failed", "detail": f"{type(error).__name__}: {said} ({where})"[:600]}
    with os.fdopen(writer, "w") as pipe:
        pipe.write(json.dumps(result))
    os._exit(0)


def run_architecture(
    name: str,
    make: Callable[[str], Any] | None = None,
    ask_also: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """What became of one architecture.

    `make`: of tiny models, by default of causal ones. `ask_also`: asked of the running engine,
    whose answer is the row's `also`.
    """
    from matrix_pages import refusal
    from tiny_architectures import make_tiny_architecture
    from tiny_models import make_tiny_tokenizer

    from quire.core.errors import UnsupportedError

    try:
        model = (make or make_tiny_architecture)(name)
    except Exception as error:  # transformers' own code on a shrunk config
        return {"status": "no_reference", "detail": f"{type(error).__name__}: {error}"[:400]}
    with tempfile.TemporaryDirectory() as directory:
        try:
            expected, margins = reference(model, use_cache=True)
        except Exception as error:  # a refusal counts also where the reference fails
            detail = f"{type(error).__name__}: {error}"[:400]
            model.save_pretrained(directory)
            return refusal(Path(directory)) or {"status": "no_reference", "detail": detail}
        model.save_pretrained(directory)
        make_tiny_tokenizer().save_pretrained(directory)
        try:
            answer = run_tightly(Path(directory), ask_also)
        except UnsupportedError as error:
            detail = "; ".join(f"{r.have}" for r in error.reasons)
            return {"status": "refused", "detail": detail[:600]}
    answer.pop("block_bytes")
    verdict = compare(answer.pop("tokens"), expected, margins)
    if verdict != "exact" and compare_uncached(model, answer["again"]) == "exact":
        verdict = "exact_uncached"
    answer["is_repeatable"] = answer.pop("again") is not None
    return {"status": verdict, "class": type(model).__name__, **answer}


def prompts() -> list[list[int]]:
    """Token ids of several lengths; two share a prefix, two are the same."""
    import numpy as np

    rng = np.random.default_rng(7)
    made = [rng.integers(4, 500, size=length).tolist() for length in LENGTHS]
    return [*made, made[-1][:48] + made[0], made[2]]


def reference(model: Any, *, use_cache: bool) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of `generate`, one request at a time, and the margin of each."""
    import torch
    from transformers import GenerationConfig

    # Nothing but the model: some families' defaults force a last token.
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=2)
    rows, margins = [], []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
        # What comes before: the prompt, or a decoder's own first tokens.
        rows.append(out.sequences[0, -NUM_TOKENS:].tolist())
        best = [step[0].float().topk(2).values for step in out.logits]
        margins.append([float(two[0] - two[1]) for two in best])
    return rows, margins


def run_tightly(directory: Path, ask_also: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Tokens of the real engine in a cache too small for all requests.

    A first run in a large one tells what a block takes, whichever way the model settled on.
    """
    from quire.core.errors import ConfigError

    answer = run_engine(directory, 64 << 20, ask_also)
    num_tight = 0
    for num_blocks in _CACHES:
        try:
            tight = run_engine(directory, num_blocks * answer["block_bytes"], None)
        except ConfigError:
            continue  # one request does not fit
        answer["tokens"] += tight["tokens"]
        for key in ("num_preemptions", "num_cached_tokens"):
            answer[key] += tight[key]
        num_tight += 1
        # States do not grow: where one request alone fits, the others wait instead.
        if tight["num_preemptions"] or num_tight == _TRIES:
            break
    runs = answer["tokens"]
    answer["again"] = runs[0] if all(run == runs[0] for run in runs) else None
    return answer


def run_engine(
    directory: Path, cache_bytes: int, ask_also: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """Tokens of the real engine, twice: the second time every prefix is there."""
    from quire import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
    settings: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "model_impl": "transformers", "max_num_seqs": 4,
        "max_num_batched_tokens": 24, "max_model_len": 96, "block_size": 16, "num_threads": 1,
    }  # fmt: skip
    with LLM(model=str(directory), cache_memory_bytes=cache_bytes, **settings) as llm:
        runs, num_cached = [], 0
        for _ in range(2):
            outputs = llm.generate(asked, params, use_tqdm=False)
            runs.append([list(output.outputs[0].token_ids) for output in outputs])
            num_cached += sum(output.num_cached_tokens or 0 for output in outputs)
        statistics = llm.statistics()
        forward = llm.facts.providers.get("forward", "")
        also = {} if ask_also is None else {"also": ask_also(llm)}
        return {
            **also,
            "tokens": runs,
            "again": runs[0] if runs[0] == runs[1] else None,
            "num_preemptions": statistics.num_preemptions,
            "num_cached_tokens": num_cached,
            "block_bytes": statistics.memory_bytes["cache"] // llm.facts.num_blocks[0],
            "way": forward.removeprefix("transformers (").removesuffix(")"),
        }


def compare(
    runs: list[list[list[int]]], expected: list[list[int]], margins: list[list[float]]
) -> str:
    """`exact` if every run gives the reference's tokens, up to where it is itself undecided."""
    for run in runs:
        for got, want, margin in zip(run, expected, margins, strict=True):
            if not got or len(got) > len(want):
                return "wrong"  # nothing was compared, or not all
            for index, (a, b) in enumerate(zip(got, want, strict=False)):
                if a != b and margin[index] >= MARGIN:
                    return "wrong"
                if a != b:
                    break
    return "exact"


def compare_uncached(model: Any, run: list[list[int]] | None) -> str:
    """The same against a reference that computes the whole text for each token."""
    if run is None:
        return "wrong"
    return compare([run], *reference(model, use_cache=False))


def render(results: dict[str, Any], version: str) -> str:
    """The page."""
    by_status: dict[str, list[str]] = {}
    for name, row in sorted(results.items()):
        by_status.setdefault(row["status"], []).append(name)
    found = [status for status in LABELS if status in by_status]
    counts = ", ".join(f"{len(by_status[s])} {s.replace('_', ' ')}" for s in found)
    lines = [
        "# Models that run through transformers' own code",
        "",
        f"Written by `scripts/model_matrix.py` with transformers {version}: {len(results)} causal",
        "language models, tiny and random, in float32 on the `cpu` device, with",
        f"{len(LENGTHS) + 2} concurrent requests (chunked, prefix-shared, in a cache too small for",
        "all of them), compared token by token with `generate`.",
        "",
        f"{counts}.",
        "",
        _WAYS,
        "",
        "| architecture | result | way | preempted | from prefixes | remark |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(results.items()):
        remark = row.get("detail", "").replace("|", "/").replace("\n", " ")
        counts = (str(row.get(key, "")) for key in ("num_preemptions", "num_cached_tokens"))
        cells = (name, LABELS[row["status"]], row.get("way", ""), *counts, remark[:240])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *render_native()]) + "\n"


def render_native() -> list[str]:
    """The table of native families, from the registry's own tables."""
    from quire.core.models.families import known_architectures
    from quire.core.models.hybrid.families import FAMILIES
    from quire.core.models.state_space.spec import ARCHITECTURES

    kinds = {
        "attention, with MLPs or experts": known_architectures(),
        "states alone": ARCHITECTURES,
        "attention and states": tuple(FAMILIES),
    }
    rows = [f"| `{name}` | {kind} |" for kind, names in kinds.items() for name in sorted(names)]
    return [
        "## Native families",
        "",
        "These run by the operators of a device instead, unless `--model-impl transformers` is",
        "given. A config that a family does not serve (Mamba-2's limited time steps, say) goes the",
        "other way by itself. Models with states take no `--quantization`.",
        "",
        "| architecture | layers |",
        "|---|---|",
        *rows,
    ]


if __name__ == "__main__":
    sys.exit(main())
