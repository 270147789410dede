"""The part of the result pages that is about speed on a GPU."""

from typing import Any

from gpu_time_pages import gpu_time
from pages import ROOT, environment, read, table
from tqdit.speed.baselines import FAMILIES

# Workload -> (preset, bits) -> the least speed-up asked for over the faster of the compiled bf16 models.
TARGETS = {
    "256-b64": {("plus", "w8a8"): 1.9, ("paper", "w8a8"): 1.5, ("plus", "w6a6"): 2.0},
    "256-b2": {("plus", "w8a8"): 1.9, ("paper", "w8a8"): 1.6, ("plus", "w6a6"): 1.8},
    "512-b16": {("plus", "w8a8"): 1.8, ("paper", "w8a8"): 1.5, ("plus", "w6a6"): 2.0},
}
BASELINE = "bfloat16"  # stands for the fastest bf16 of a run
TUNED = "bf16-autotuned"  # whose memory is compared
TOPS_TARGET = 1150  # of the int8 products with 16384 rows
FP8_TARGET = 1.7  # of `plus` W8A8 over torchao's fp8
MEMORY_TARGET = 0.5  # peak of a call at 64 samples, of the baseline's
ATTENTION_TARGET = 2.0  # over bf16 scaled_dot_product_attention, head_dim 72
LINEARS = ("qkv", "out", "fc1", "fc2")
MOST_OF_FP32 = {("w8a8", "triton"): 0.26, ("w4a8", "triton-packed"): 0.14}


def gpu_speed() -> list[str]:
    run, kernels = read("h200"), read("h200-kernels")
    where = run["environment"]
    return [
        "## Speed on an H200",
        "",
        "Milliseconds of one denoiser call of DiT-XL/2 (random codes, plausible scales), all contenders of a workload "
        "timed in turn within one run (`python bench/gpu.py bench/results/h200.json`); a workload such as `256-b64` "
        "is 256 × 256 pixels and 64 samples, two an image under guidance. bf16 is compiled in two ways, q, k and v as "
        "one layer, one embedder for all blocks, captured as a CUDA graph as ours is: bf16-autotuned whole, with every "
        "kernel tuned (max-autotune), and bf16-compiled block by block in torch.compile's default mode. `× bf16` is "
        "over the fastest compiled bf16 of the run. `of floor`: the integer products at torch's own int8 peak in the "
        "same run, and the reading of the other weights, over the median. How it works: [gpu.md](gpu.md).",
        "",
        f"on {environment(where)}; int8 peak of torch {where['int8_peak_gops'] / 1e3:.0f} TOPS, copies "
        f"{where['read_gb_per_s']:.0f} GB/s.",
        "",
        "Quantized models have their residual stream in bf16, as the baselines have. img/s: of a sampling run of 50 "
        "steps with guidance, all images of it as one batch. MB: on the GPU, after loading and at most during a call, "
        "in a process of its own.",
        "",
        table(["workload", "model", "runs in", "ms p20", "p50", "p80", "× bf16", "× bf16-eager", "of floor",
               "img/s", "MB loaded", "MB peak"],
              [_row(row) for row in run["rows"]]),
        "",
        *_torchao(run),
        table(["aim", "target", "measured", "met"],
              [*_speed_aims(run), *_memory_aims(run), *_kernel_aims(kernels), *_weight_aims()]),
        "",
        *gpu_time(),
        *_stream_quality(),
        "### By kernel",
        "",
        "`python bench/gpu_kernels.py`, every kernel of DiT-XL/2 by itself; bytes and operations are those it cannot "
        "do without, `of roofline` their time at this run's measured peaks "
        f"({kernels['environment']['copy_tb_per_s']:.2f} TB/s of a copy; "
        f"{kernels['environment']['int8_tops']:.0f} TOPS, the fastest of our own products) over the "
        f"measured one. Weights came {kernels.get('weights', 'from the L2 cache, if they fit')}. The adaLN layers "
        "run once a call, the rest once or twice a block.",
        "",
        table(["workload", "kernel", "µs", "MB", "10⁹ operations", "TOPS", "of roofline"],
              [_kernel_row(row) for row in kernels["rows"]]),
        "",
        "### Bytes of weights on the device",
        "",
        "`TRITON_INTERPRET=1 python bench/gpu_weights.py`, every tensor of the converted model:",
        "",
        table(["bits", "backend", "MB", "of fp32"],
              [[row["bits"].upper(), row["backend"], f"{row['bytes'] / 1e6:.0f}", f"{row['of_fp32']:.3f}"]
               for row in read("gpu-weights")["rows"]]),
        "",
        (ROOT / "bench" / "gpu-notes.md").read_text(encoding="utf-8").strip(),
        "",
    ]  # fmt: skip


def _row(row: dict[str, Any]) -> list[str]:
    over = _ratios(row)
    model = f"{row['bits'].upper()} {row['preset']}" if row["integer"] else "float"
    return [
        row["workload"], model, row["backend"], *(f"{row[f'p{p}_ms']:.2f}" for p in (20, 50, 80)),
        *(f"{over[name]:.2f}" if name in over else "–" for name in (BASELINE, "bf16-eager")),
        f"{row['floor_fraction']:.2f}" if row["floor_fraction"] else "–",
        f"{row['images_per_second']:.1f}" if row["images_per_second"] else "–",
        *(f"{row[key] / 1e6:.0f}" if row[key] else "–" for key in ("resident_bytes", "peak_bytes")),
    ]  # fmt: skip


def _ratios(row: dict[str, Any]) -> dict[str, float]:
    """Return how much faster than each baseline a model is, and under `BASELINE` than the fastest bf16 of its run."""
    bf16 = [row["speedup_over"][family] for family in (BASELINE, "bfloat16-blocks") if family in row["speedup_over"]]
    return {**row["speedup_over_each"], **({BASELINE: min(bf16)} if bf16 else {})}


def _stream_quality() -> list[str]:
    """What the stream's dtype does to a model, measured on a CPU: the operations are the same."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        run = read(f"stream-{dtype}-cpu")
        for row in run["models"]:
            figures = [f"{row[key]:.2f}" for key in ("eps_sqnr_db", "psnr_db")]
            rows.append([f"{row['bits'].upper()} {row['preset']}", dtype, *figures])
    settings = run["settings"]
    return [
        "### Quality with a residual stream in bf16",
        "",
        f"The artifacts of `make demo`, `tqdit compare fashion-dit ... --dtype`, {settings['num']} images of "
        f"{settings['steps']} steps, on {environment(run['environment'])}:",
        "",
        table(["model", "stream", "ε SQNR (dB)", "PSNR (dB)"], sorted(rows, reverse=True)),
        "",
    ]


def _torchao(run: dict[str, Any]) -> list[str]:
    """How torchao's models were run, and which were not."""
    asked = (*FAMILIES["bfloat16-blocks"], *FAMILIES["torchao"])
    missing = [name for name in asked if all(row["backend"] != name for row in run["rows"])]
    lines = ["Not measured: " + ", ".join(missing) + ".", ""] if missing else []
    if "256-b64 torchao" not in run["commands"]:
        return lines
    return [
        "torchao's models have a run of their own, and ratios hold within a run: the GPU's clocks are not fixed. They "
        "are compiled as bf16's are, but block by block, with fp8 products of ATEN alone (for each Triton has a "
        "hundred candidates, minutes of timing), and with the final layer in bf16; bf16-blocks is bf16 "
        "compiled in that way.",
        "",
        *lines,
    ]


def _memory_aims(run: dict[str, Any]) -> list[list[str]]:
    peaks = {(row["backend"], row["preset"], row["bits"]): row["peak_bytes"] for row in run["rows"]
             if row["workload"] == "256-b64"}  # fmt: skip
    ours, theirs = peaks.get(("triton", "plus", "w8a8")), peaks.get((TUNED, None, None))
    if not ours or not theirs:
        return []
    found = ours / theirs
    name = f"256-b64, peak memory of plus W8A8 of that of {TUNED}"
    return [[name, f"≤ {MEMORY_TARGET}", f"{found:.3f}", "yes" if found <= MEMORY_TARGET else "no"]]


def _speed_aims(run: dict[str, Any]) -> list[list[str]]:
    aims = []
    for row in run["rows"]:
        over = _ratios(row)
        of_baseline = TARGETS.get(row["workload"], {}).get((row["preset"], row["bits"]))
        wanted = {BASELINE: of_baseline, "torchao-fp8": FP8_TARGET}
        for baseline, target in wanted.items():
            if target and baseline in over:
                said = "the fastest compiled bf16" if baseline == BASELINE else baseline
                name = f"{row['workload'].split()[0]}, {row['preset']} {row['bits'].upper()} over {said}"
                met = "yes" if over[baseline] >= target else "no"
                aims.append([name, f"≥ {target}×", f"{over[baseline]:.2f}×", met])
    return aims


def _kernel_aims(kernels: dict[str, Any]) -> list[list[str]]:
    rows = {(row["workload"], row["name"]): row for row in kernels["rows"]}
    aims = []
    for name in LINEARS:
        found = rows["256-b64", name]["tera_per_s"]
        met = "yes" if found >= TOPS_TARGET else "no"
        aims.append([f"int8 product {name} with its epilogue", f"≥ {TOPS_TARGET} TOPS", f"{found:.0f} TOPS", met])
    for workload in ("256-b64", "512-b16"):
        found = kernels["sdpa_bf16_us"][workload] / rows[workload, "attention, uniform"]["us"]
        met = "yes" if found >= ATTENTION_TARGET else "no"
        aims.append([f"attention {workload} over bf16 SDPA", f"≥ {ATTENTION_TARGET}×", f"{found:.2f}×", met])
    return aims


def _weight_aims() -> list[list[str]]:
    found = {(row["bits"], row["backend"]): row["of_fp32"] for row in read("gpu-weights")["rows"]}
    return [
        [f"weights on the device, {bits.upper()} in {backend}", f"≤ {most} of fp32", f"{found[bits, backend]:.3f}",
         "yes" if found[bits, backend] <= most else "no"]
        for (bits, backend), most in MOST_OF_FP32.items()
    ]  # fmt: skip


def _kernel_row(row: dict[str, Any]) -> list[str]:
    operations = row["operations"]
    return [
        row["workload"], row["name"], f"{row['us']:.1f}", f"{row['bytes'] / 1e6:.0f}",
        f"{operations / 1e9:.0f}" if operations else "–", f"{row['tera_per_s']:.0f}" if row["tera_per_s"] else "–",
        f"{row['fraction']:.2f}",
    ]  # fmt: skip


def gpu_summary() -> str:
    """Return the table of how much faster a call is on a GPU."""
    run = read("h200")
    rows = [
        [row["workload"], f"{row['bits'].upper()} {row['preset']}", f"{row['p50_ms']:.1f}",
         f"{row['speedup_over'][BASELINE]:.2f}×", f"{row['speedup_over_each']['bf16-eager']:.2f}×"]
        for row in run["rows"] if "bf16-eager" in row["speedup_over_each"] and row["bits"] != "w4a8"
    ]  # fmt: skip
    over_fp8 = [
        row["speedup_over_each"]["torchao-fp8"] for row in run["rows"] if "torchao-fp8" in row["speedup_over_each"]
    ]
    return (
        "DiT-XL/2 on one H200, residual stream in bf16, ms of a denoiser call (workload: pixels and samples), over "
        "the faster of two ways to compile bf16 (one with max-autotune), with CUDA graphs, and over eager bf16:\n\n"
        + table(["workload", "model", "ms", "× bf16 compiled", "× bf16 eager"], rows)
        + "".join(
            f"\n\nW8A8 plus at 256-b64 is {ratio:.2f}× as fast as torchao's fp8 compiled block by block, in one run."
            for ratio in over_fp8
        )
    )
