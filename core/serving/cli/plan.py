"""`quire plan`: what would run where, or every reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.core.config import EngineConfig
from quire.core.errors import Reason, UnsupportedError
from quire.core.serving.cli.console import err, out, size, table, write_json
from quire.core.serving.cli.errors import FAILURE
from quire.core.serving.cli.options import with_engine_options

if TYPE_CHECKING:
    from quire.core.planning import Plan


@with_engine_options
def plan(
    config: EngineConfig,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show device, kernels, cache and memory for a model, before any weight is loaded."""
    from quire.core.planning import plan_engine

    try:
        planned = plan_engine(config)
    except UnsupportedError as error:
        _show_refusal(config.model, error.reasons, as_json=as_json)
        raise typer.Exit(FAILURE) from error
    try:
        if as_json:
            write_json(_record(planned.plan))
        else:
            _show(planned.plan)
    finally:
        planned.device.close()


def _show_refusal(model: str, reasons: Sequence[Reason], *, as_json: bool) -> None:
    if as_json:
        write_json({"model": model, "is_supported": False, "reasons": [asdict(r) for r in reasons]})
        return
    rows = [(r.code, r.need, r.have, r.remedy) for r in reasons]
    err().print(table(f"{model} cannot run", ("reason", "needs", "has", "remedy"), rows))


def _show(made: Plan) -> None:
    console = out()
    device = made.device
    console.print(f"model    {made.model} ({made.architecture})", markup=False, soft_wrap=True)
    console.print(
        f"         {made.num_parameters:,} parameters in {made.directory}, run by "
        f"{made.implementation}",
        markup=False,
    )
    console.print(
        f"device   {device.name}:{device.index} {device.info.name}; {device.why}",
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"limits   {made.config.max_model_len} tokens a request, "
        f"{made.config.max_num_seqs} requests and "
        f"{made.config.max_num_batched_tokens} tokens a step",
        markup=False,
        soft_wrap=True,
    )
    console.print(table("Kernels", ("operator", "served by"), sorted(made.kernels.items())))
    cache_columns = ("group", "kind", "layers", "bytes/token", "layout", "attention")
    cache = [
        (c.group, c.kind, c.num_layers, c.bytes_per_token, c.layout, c.attention)
        for c in made.cache
    ]
    console.print(table("Cache", cache_columns, cache))
    memory = [(m.tag, size(m.size_bytes), m.note) for m in made.memory]
    console.print(table("Memory", ("use", "size", "note"), memory))
    changes = [(c.setting, c.asked, c.given, c.why) for c in made.changes]
    console.print(table("Settings filled in", ("setting", "asked", "given", "why"), changes))
    for note in made.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _record(made: Plan) -> dict[str, Any]:
    device = made.device
    return {
        "model": made.model,
        "is_supported": True,
        "directory": str(made.directory),
        "architecture": made.architecture,
        "implementation": made.implementation,
        "num_parameters": made.num_parameters,
        "device": {
            "backend": device.name,
            "index": device.index,
            "name": device.info.name,
            "architecture": device.info.architecture,
            "why": device.why,
        },
        "config": asdict(made.config),
        "changes": [asdict(change) for change in made.changes],
        "kernels": dict(made.kernels),
        "cache": [asdict(row) for row in made.cache],
        "memory": [asdict(row) for row in made.memory],
        "notes": list(made.notes),
    }
