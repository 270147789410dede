"""Print the tables of traced models: races of blocks, inspections and comparisons on recorded calls."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdit.cli.console import add_row, cell, console_of, table_of

if TYPE_CHECKING:
    from tqdit.quality.called import Compared, FolderComparison
    from tqdit.speed.blocks import Raced

PARTS = {
    "call": "a call of these blocks",
    "linears": "linear layers of one block of each kind",
    "all blocks": "all blocks of the published model, computed from one of each kind",
}


def print_races(found: Sequence["Raced"]) -> None:
    """Print the figures of blocks of published models, one table for each part that was timed."""
    console = console_of()
    for one in found:
        size = " x ".join(map(str, one.patches))
        kinds = ", ".join(f"{count} {name}" for name, count in one.blocks.items())
        console.print(f"{one.model} ({one.kind}): {size} patches, {one.text_tokens} text tokens; {kinds}", markup=False)
        if one.bytes_of_bf16 is not None:
            console.print(
                f"weights of the whole model: {(one.weight_bytes or 0) / 1e9:.2f} GB, {one.bytes_of_bf16:.3f} of bf16"
            )
        for part in dict.fromkeys(row.part for row in one.rows):
            rows = [row for row in one.rows if row.part == part]
            table = table_of((PARTS.get(part, f"one block of {part}"),), ("ms p20", "p50", "p80", "x best bf16"))
            for row in rows:
                figures = [cell(ms, 2) for ms in (row.p20_ms, row.p50_ms, row.p80_ms)]
                add_row(table, (row.entrant,), [*figures, cell(row.speedup_over_bf16, 2)])
            console.print(table)
        for name, reason in one.skipped.items():
            console.print(f"skipped {name}: {reason}", markup=False)
        console.print()


def print_call_comparison(result: "FolderComparison") -> None:
    """Print how far artifacts are from their float model on recorded calls, then by the images of a pipeline."""
    console = console_of()
    for part in result.transformers:
        _print_transformer(console, part)
    if result.images:
        table = table_of(("model",), ("PSNR dB", "worst", "prompts"))
        for row in result.images:
            add_row(table, (row.name,), [cell(row.mean_db, 1), cell(row.worst_db, 1), str(len(row.each_db))])
        console.print(table)
        console.print("PSNR: images of the same seeds, against those of the float model.")


def _print_transformer(console: Any, part: "Compared") -> None:
    found = part.comparison
    groups = [f"{low:g}\nto {high:g}" for low, high, _ in found.groups]
    table = table_of(("model",), ("of\nbf16", "SQNR\ndB", "worst\ncall"))
    for row in found.rows:
        figures = [cell(part.sizes.get(row.name), 3), cell(row.sqnr_db, 1), cell(row.worst_db, 1)]
        add_row(table, (row.name,), figures)
    console.print(f"{part.component} ({found.kind})", markup=False)
    console.print(table)
    console.print()
    for start in range(0, len(groups), 5):  # of eighty columns
        table = table_of((f"SQNR dB by {found.timestep}",), groups[start : start + 5])
        for row in found.rows:
            add_row(table, (row.name,), [cell(db, 1) for db in row.by_group[start : start + 5]])
        console.print(table)
    which = "that no calibration used" if part.fresh else "of the calibration: there are no others"
    noise = " bfloat16: the float model rounded to bf16." if part.dtype == "float32" else ""
    console.print(f"{found.calls} calls {which}; all models in {part.dtype}, against the float model.{noise}")
    console.print()


def print_traced_inspection(result: Mapping[str, Any], every_site: bool = False) -> None:
    """Print what a traced artifact is: a summary, its sites by what feeds them, and what stays in float and why."""
    console, facts = console_of(), result["traced"]
    for label, text in _summary(result):
        console.print(f"{label:<12} {text}", markup=False)
    console.print()
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for site in result["sites"]:
        if site["role"] != "weight":  # in the row of its input
            groups.setdefault(_kind(site), []).append(site)
    table = table_of(("fed by", "inputs", "weights"), ("sites", "layers"))
    for kind, sites in groups.items():
        add_row(table, kind, [str(len(sites)), str(sum(site["layers"] for site in sites))])
    console.print(table)
    for reason, count in facts["left"].items():
        console.print(f"in float: {count} x {reason}", markup=False)
    for site, note in facts["notes"].items():
        console.print(f"{site}: {note}", markup=False, soft_wrap=True)
    for site in result["sites"] if every_site else ():
        console.print(f"{site['name']}\n      {', '.join(_kind(site))}; {site['kernel']}", markup=False, soft_wrap=True)
    for name, reason in facts["left_layers"].items() if every_site else ():
        console.print(f"{name}\n      in float: {reason}", markup=False, soft_wrap=True)


def _kind(site: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return what sites have in common that are one row: what feeds them, the grid of inputs, and that of weights."""
    from tqdit.spec import Grid

    if site["role"] in ("weight", "weight_only"):
        return (
            site["feed"] or "not coded",
            "float",
            f"{site['bits']} bits {site['granularity']}",
        )
    parts = [f"{site['bits']} bits {site['grid']}"]
    if not Grid(site["grid"]).per_row:
        parts.append(site["granularity"])
    if site["groups"] > 1:
        parts.append(f"{site['groups']} time groups")
    parts += ["channel factors"] * bool(site["channels"])
    parts += [f"rotated by {site['rotation']}"] * bool(site["rotation"])
    return site["feed"] or "unknown", ", ".join(parts), f"{site['weight_bits']} bits {site['weight_granularity']}"


def _summary(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts, size, half = result["traced"], result["size_bytes"], result["float32_bytes"] / 2
    provenance = result["provenance"]
    left = sum(facts["left"].values())
    calls = (provenance.get("calibration_sha256") or "")[:12]
    return [
        (result["name"], f"{result['shape']}, {result['preset'] or 'no preset'}, {result['bits']}"),
        ("size", f"{size / 1e6:.2f} MB, {size / half:.3f} of bf16"),
        (
            "layers",
            f"{facts['integer_layers']} in integers, {facts['weight_only_layers']} with integer weights alone, "
            f"{left} in float",
        ),
        ("time groups", f"{result['time_groups']}, of the argument '{facts['timestep']}'"),
        ("calibration", f"recorded calls, sha256 {calls}" if calls else "none"),
        ("source", f"{provenance.get('source') or ''} sha256 {(provenance.get('source_sha256') or '')[:12]}"),
        ("runs on", f"{result['device']}, backend {result['backend']}"),
    ]
