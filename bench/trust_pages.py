"""docs/any-input.md: what becomes of odd, wrong and damaged input, from the result files of the scripts that try it."""

from typing import Any

from pages import environment, read, table


def any_input() -> str:
    return "\n".join(
        [
            "# On any input",
            "",
            "Written by `python bench/make_results.py` from the files in `bench/results/`; not edited by hand.",
            "",
            "Every situation here ends in the right result, or in one line that names what is wrong, before any long",
            "work. Nothing is lost or half written. `make test` has a short form of each part.",
            "",
            *_situations(read("cases")),
            *_trust(read("trust")),
            *_mutation(read("mutation")),
            *_screens(read("screens")),
        ]
    )


def _situations(run: dict[str, Any]) -> list[str]:
    right = sum(row["right"] for row in run["rows"])
    rows = [[row["situation"], "right" if row["right"] else "**wrong**", _cell(row["outcome"])] for row in run["rows"]]
    return [
        "## Situations from public bug reports",
        "",
        f"`python bench/cases --json bench/results/cases.json` on {environment(run['environment'])}: "
        f"{right} of {len(rows)} right. A decibel figure is the signal-to-noise ratio against the float model, or, "
        "where the row is about exactness, against the same model called plainly.",
        "",
        table(["situation", "", "what happens"], rows),
        "",
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _trust(run: dict[str, Any]) -> list[str]:
    lines = [
        "## Damage, kills, races and random input",
        "",
        f"`make test-trust` on {environment(run['environment'])}. A failure is an output that is neither the old nor "
        "the new one, an error that is no `InputError`, damage that changes the result unnoticed, a hang, or a process "
        "that dies.",
        "",
    ]
    for name, suite in run["suites"].items():
        cases = suite["cases"]
        counts = [key for key, value in next(iter(cases.values())).items() if isinstance(value, int)]
        rows = [
            [case, *(f"{row[count]:,}" for count in counts), str(len(row["failures"]))] for case, row in cases.items()
        ]
        lines += [f"### {NAMES.get(name, name)}", "", EXPLAINED[name], "", table(["", *counts, "failures"], rows), ""]
        failed = [failure for row in cases.values() for failure in row["failures"]]
        lines += [*(f"- failure: {_cell(failure)}" for failure in failed), *([""] if failed else [])]
    return lines


NAMES = {
    "SIGKILL": "Killed before every file-system call",
    "SIGINT": "Interrupted before every file-system call",
    "races": "Two processes at once",
    "fuzz": "Random changes of everything that is read",
    "damage": "Damaged and forged artifacts, read by tqdit",
    "damage, diffusers": "Damaged and forged artifacts, read by diffusers",
    "sanitizer": "CPU kernels under AddressSanitizer",
}
EXPLAINED = {
    "SIGKILL": "Each step that writes is killed before each of its file-system calls. The output is then the old or "
    "the new one, whole, and the next run leaves nothing else behind. `partly`: a folder of images that has some of "
    "them, each whole. `leftovers`: kills that left something, which the next run removed.",
    "SIGINT": "The same with Ctrl-C.",
    "races": "Two processes write one output. One wins, the other says so.",
    "fuzz": "Each input is accepted, or refused by an `InputError`.",
    "damage": "Truncated, flipped, edited, exchanged and missing files; forged ones with every hash made right again. "
    "An artifact is refused in one line, or gives the same pixels; a forgery of legal values gives what its values say "
    "(`legal`).",
    "damage, diffusers": "The same through `DiTPipeline.from_pretrained` and `DiTTransformer2DModel.from_pretrained`, "
    "which read a part of the files before tqdit does: `diffusers` are its own errors, and it builds as many blocks "
    "as a config says, waits for a pipe, and reads a link to /dev/zero for ever, by itself.",
    "sanitizer": "Models of odd shapes, both presets, batches and sides.",
}


def _mutation(run: dict[str, Any]) -> list[str]:
    rows = [
        [name, str(row["possible"]), str(row["mutants"]), str(row["killed"]), f"{row['score']:.1f} %"]
        for name, row in run["modules"].items()
    ]
    mutants, killed = (sum(row[key] for row in run["modules"].values()) for key in ("mutants", "killed"))
    return [
        "## Small faults that the tests find",
        "",
        f"`{run['command']}`: {killed} of {mutants} mutants killed, {100 * killed / mutants:.1f} %. A mutant is one "
        "small fault in a module; it is killed if a test of the module fails. `possible`: all that there are; mutants "
        "that change nothing are left out, each with a reason, in `bench/equivalent_mutants.py`.",
        "",
        table(["module", "possible", "tried", "killed", "score"], rows),
        "",
    ]


def _screens(run: dict[str, Any]) -> list[str]:
    lines = [
        "## What the commands show",
        "",
        f"`python bench/screens.py --json bench/results/screens.json`: the last screen of each on a terminal of "
        f"{run['columns']} columns, on {environment(run['environment'])}.",
        "",
    ]
    for screen in run["screens"]:
        lines += ["```text", f"$ {screen['command']}", *screen["lines"], "```", ""]
    return lines
