"""The README's table: one row for each gain, with what it is compared with and where it was measured."""

from typing import Any

from pages import read, table

BITS = ("w8a8", "w6a6", "w4a8")
WORKLOADS = {
    "256-b64": "256 pixels, 64 samples",
    "256-b2": "256 pixels, 2 samples",
    "512-b16": "512 pixels, 16 samples",
}
HEADER = ["", *(bits.upper() for bits in BITS), "float", "measured"]
Row = list[str]


def readme_table() -> str:
    """Return the table and the sentences below it."""
    rows = [*_quality(), *_size(), *_on_a_cpu(), *_on_a_gpu()]
    return (
        f"{table(HEADER, rows)}\n\n"
        "W8A8: weights and activations of 8 bits. All of the preset `plus`. PSNR: of images to those of float32 from "
        "the same noise. Equivalent: the verdict of a test whose rules were fixed beforehand. × is over the fastest "
        "bf16 of the same run, compiled, on the H200 in two ways ([with `paper` and torchao]"
        "(docs/results.md#speed-on-an-h200)). The row of 2 cores is of `plus` as it was before it had "
        "scales of rows; [today's takes no longer](docs/quality.md#what-it-costs)."
    )


def _quality() -> list[Row]:
    """Return the rows about images."""
    first = read("equivalence-h200")["trials"][0]["models"]
    colour = read("colour-bf16-h200")
    small = {row["bits"]: row for row in colour["models"] if row["preset"] == "plus"}

    def verdict(name: str) -> str:
        return "yes" if first[name]["verdict"]["equivalent"] else "no"

    where, other = _link("quality.md", "the-equivalence-test"), _link("quality.md", "a-second-model")
    return [
        ["images' PSNR, `fashion-dit` (dB)", *(f"{first[bits]['psnr_db']:.1f}" for bits in BITS),
         f"bf16 {first['bfloat16']['psnr_db']:.1f}", where],
        ["images equivalent to float32's", *map(verdict, BITS), f"bf16 {verdict('bfloat16')}", where],
        ["images' PSNR, a colour model (dB)", *(_or_dash(small, bits, "psnr_db", ".1f") for bits in BITS),
         f"bf16 {colour['bfloat16']['psnr_db']:.1f}", other],
    ]  # fmt: skip


def _size() -> list[Row]:
    """Return the rows about bytes: of the file, and of a loaded model."""
    plus = {row["bits"]: row for row in read("ablation-quality")["rows"] if row["variant"] == "plus"}
    run = read("cpu-dit-xl-2")
    memory = {row["backend"]: row["resident_bytes"] / 1e6 for row in run["rows"]}
    ours = next(row["resident_bytes"] / 1e6 for row in run["rows"] if row.get("preset") == "plus")
    return [
        ["file, of float32's", *(f"{plus[bits]['size_ratio']:.2f}" for bits in BITS), "bf16 0.50",
         _link("quality.md", "the-parts-of-plus")],
        ["memory of DiT-XL/2, loaded (MB)", f"{ours:.0f}", "–", "–",
         f"bf16 {memory['bf16-compiled']:.0f}, float32 {memory['float32-compiled']:.0f}",
         _link("results.md", "speed-on-a-cpu")],
    ]  # fmt: skip


def _on_a_cpu() -> list[Row]:
    """Return the rows about the time of a call of DiT-XL/2 on CPUs."""
    run = read("cpu-dit-xl-2")
    ours = next(row for row in run["rows"] if row.get("preset") == "plus")
    floats = {row["backend"]: row["p50_ms"] for row in run["rows"] if not row["integer"]}
    bf16, float32 = (min(ms for name, ms in floats.items() if name.startswith(kind)) for kind in ("bf16", "float32"))
    amx = read("cpu-amx")
    race = {row["name"]: row for row in amx["race"]}
    integers, compiled = race["amx-int8"], race["bf16-compiled"]
    return [
        [f"a call on {run['environment']['cores']} CPU cores, batch {ours['batch']} (ms)",
         f"{ours['p50_ms']:.0f} ({ours['speedup_over']['bfloat16']:.2f}×)", "–", "–",
         f"bf16 {bf16:.0f}, float32 {float32:.0f}", _link("results.md", "speed-on-a-cpu")],
        [f"a call on {amx['environment']['cores']} CPU cores with AMX, batch 2 (ms)",
         f"{integers['p50_ms']:.0f} ({integers['speedup_over_bf16_compiled']:.2f}×)", "–", "–",
         f"bf16 {compiled['p50_ms']:.0f}", _link("results.md", "the-same-on-16-cores-with-amx")],
    ]  # fmt: skip


def _on_a_gpu() -> list[Row]:
    """Return the rows about the time of a call of DiT-XL/2 on an H200."""
    found = read("h200")["rows"]
    rows = []
    for workload, said in WORKLOADS.items():
        of_it = [row for row in found if row["workload"] == workload]
        ours = {row["bits"]: row for row in of_it if row.get("preset") == "plus"}
        bf16 = min(row["p50_ms"] for row in of_it if row["backend"] in ("bf16-compiled", "bf16-autotuned"))
        cells = [f"{ours[b]['p50_ms']:.1f} ({bf16 / ours[b]['p50_ms']:.2f}×)" if b in ours else "–" for b in BITS]
        rows.append(
            [f"a call on an H200, {said} (ms)", *cells, f"bf16 {bf16:.1f}", _link("results.md", "speed-on-an-h200")]
        )
    return rows


def _or_dash(rows: dict[str, dict[str, Any]], bits: str, key: str, form: str) -> str:
    return format(rows[bits][key], form) if bits in rows else "–"


def _link(page: str, anchor: str) -> str:
    return f"[{page.removesuffix('.md')}](docs/{page}#{anchor})"
