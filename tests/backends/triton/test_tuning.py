"""Choosing a configuration: keys, candidates, and the files they are kept in."""

import contextlib
import functools
import json
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton

from tqdit.backends.triton import candidates, configurations, float_launch, launch, naming, timing, tuning
from tqdit.backends.triton.float_launch import FEW_ROWS
from tqdit.backends.triton.layouts import Config
from tqdit.backends.triton.relaunch import Plan
from tqdit.runtime.convert import convert

GPU = "Some GPU 9000"


@pytest.fixture(autouse=True)
def no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TQDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "NATIVE", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget()
    yield configurations.cache_file(GPU)
    forget()


def forget() -> None:
    """What a new process does not know."""
    for function in (configurations.table, tuning._carried, tuning._nearest, tuning._say_once):
        function.cache_clear()


def pick(monkeypatch: pytest.MonkeyPatch, key: str, milliseconds: dict[Config, float]) -> Config:
    """`choose` where every candidate takes the time it is given."""

    def timed(call) -> float:
        call()
        return milliseconds[call.args[0]]

    monkeypatch.setattr(timing, "milliseconds", timed)
    return tuning.choose([key], torch.device("cuda"), lambda: list(milliseconds), lambda config: None)


SLOW, FAST = Config(32, 32, 64), Config(64, 64, 128, registers=168)


def test_the_fastest_is_chosen_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick(monkeypatch, "linear a", {SLOW: 2.0, FAST: 1.0}) == FAST
    configurations.table.cache_clear()
    assert pick(monkeypatch, "linear a", {SLOW: 1.0, FAST: 2.0}) == FAST
    assert pick(monkeypatch, "linear b", {SLOW: 1.0, FAST: 2.0}) == SLOW
    assert set(configurations.read(cache)) == {"linear a", "linear b"}


def test_who_waits_is_told_why_once(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    for key in ("linear a", "linear a", "linear b"):
        pick(monkeypatch, key, {SLOW: 2.0, FAST: 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        f"compiling and timing kernels on {GPU}, up to a minute for a model; kept in {cache} where it can be written"
    ]


def test_files_without_the_last_settings_are_read_with_their_defaults(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = Config(128, 128, 128, stages=6, piece=64, hopper=1)
    cache.write_text('{"configurations": {"old": [128, 128, 128, 8, 4, 2, 32, 168, 1]}}')
    assert pick(monkeypatch, "new", {hopper: 1.0, SLOW: 2.0}) == hopper
    old = Config(128, 128, 128, 8, 4, 2, 32, 168)
    assert configurations.read(cache) == {"old": old, "new": hopper}


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"configurations": []}', '{"configurations": {"a": "xyz"}}',
             '{"configurations": {"a": [1, 2]}}', '{"configurations": {"a": [64, 64, 64, "8", 4, 3, 0, null, 1]}}'],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_warning_and_written_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    cache.write_text(text)
    with pytest.warns(UserWarning, match="damaged"):
        assert pick(monkeypatch, "linear a", {SLOW: 2.0, FAST: 1.0}) == FAST
    assert configurations.read(cache) == {"linear a": FAST}


def test_a_candidate_that_fails_is_passed_over_and_all_failing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Config) -> None:
        if config == FAST:
            raise RuntimeError("out of shared memory")

    monkeypatch.setattr(timing, "milliseconds", lambda call: call() or 1.0)
    assert timing.fastest([FAST, SLOW], run) == [(SLOW, 1.0)]
    with pytest.raises(RuntimeError, match="out of shared memory"):
        timing.fastest([FAST], run)


def test_candidates_compile_in_threads_before_one_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are under way at once, which one thread would wait for in vain; what failed there is judged when timed."""
    both, launched, timed = threading.Barrier(2, timeout=30), [], []

    def run(config: Config) -> None:
        if not timed:
            both.wait()
            launched.append(config)
            raise torch.OutOfMemoryError("as long as others compile")

    def alone(call: functools.partial) -> float:
        timed.extend(call.args)
        call()
        return float(len(timed))

    monkeypatch.setattr(timing, "milliseconds", alone)
    streams, side = [], object()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: streams.append(stream) or contextlib.nullcontext())
    monkeypatch.setattr(timing, "cores", lambda: 2)
    assert timing.fastest([FAST, SLOW], run) == [(FAST, 1.0), (SLOW, 2.0)]
    assert set(launched) == set(timed) == {FAST, SLOW}
    assert streams == [side, side]  # the caller's


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_compiles_where_candidates_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(4096, device="cuda")
    compiled = []

    @triton.jit
    def double(x, out, n, block: triton.language.constexpr):
        places = triton.language.program_id(0) * block + triton.language.arange(0, block)
        triton.language.store(out + places, 2 * triton.language.load(x + places, places < n), places < n)

    def run(config: Config) -> torch.Tensor:
        out = torch.empty_like(a)
        double[(triton.cdiv(len(a), config.block_m),)](a, out, len(a), config.block_m)
        return out

    double.device_caches[torch.cuda.current_device()]  # threads that make it at once would each have their own
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    hook = lambda **_: compiled.append(threading.current_thread())  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    found = timing.fastest([FAST, SLOW], run)
    assert len(compiled) == len(found) == 2
    assert threading.main_thread() not in compiled
    assert all(torch.equal(run(config), 2 * a) for config, _ in found)


def test_running_out_of_memory_is_not_a_fault_of_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Config) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "milliseconds", lambda call: call())
    with pytest.raises(torch.OutOfMemoryError):
        timing.fastest([FAST, SLOW], run)


def test_nothing_is_timed_while_a_graph_is_captured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick(monkeypatch, "linear a", {SLOW: 2.0, FAST: 1.0}) == SLOW
    assert not cache.exists()


def test_kernels_with_other_candidates_have_other_keys() -> None:
    few, many = (naming.float_key(rows, 1152, 1152, 8) for rows in (FEW_ROWS, FEW_ROWS + 1))
    assert few != many
    assert any(config.block_m == 0 for config in candidates.float_input(FEW_ROWS, 1152))
    assert all(config.block_m > 0 for config in candidates.float_input(FEW_ROWS + 1, 1152))


def test_new_forms_have_keys_of_their_own() -> None:
    """So that configurations found for a self-attention, or a layer with a gate, are neither taken nor replaced."""
    own = naming.attention_key(32, 256, 72, 0)
    assert own == "attention 32x256x72, mode 0"
    cross = {naming.cross_attention_key(32, 256, keys, 72, 0, biased) for keys in (256, 77) for biased in (False, True)}
    assert len(cross | {own}) == 5
    assert naming.cross_attention_key(32, 256, 77, 72, 0, True) == naming.cross_attention_key(32, 256, 120, 72, 0, True)
    epilogues = {naming.residual(dtype, gated) for dtype in (torch.float32, torch.bfloat16) for gated in (False, True)}
    assert epilogues > {"residual", "residual bfloat16"}
    assert len(epilogues) == 4


def test_committed_files_are_whole() -> None:
    files = list(configurations.TUNED.glob("*.json"))
    assert files
    for path in files:
        found = configurations.read(path)
        assert len(found) == len(json.loads(path.read_text())["configurations"]) > 40
        few = (key.startswith("float input, few rows") for key, config in found.items() if config.block_m == 0)
        assert all(few)


def test_the_nearest_size_of_the_same_kernel_serves_another(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed where a size within `tuning.FAR` doublings is known, of the same kernel and bits."""

    def near(rows: int, columns: int, depth: int, bits: int = 8) -> Config:
        keys = [naming.linear_key(name, rows, columns, depth, bits, False) for name in ("float", "residual")]
        return tuning.choose_near(keys, torch.device("cuda"), lambda: [SLOW], lambda config: None)

    monkeypatch.setattr(timing, "milliseconds", lambda call: call() or 1.0)
    table = configurations.table(GPU)
    table[naming.linear_key("float", 4096, 3072, 3072, 8, False)] = FAST
    table[naming.linear_key("float", 64, 3072, 3072, 8, False)] = SLOW
    assert near(2048, 4096, 3072) == FAST
    assert near(77, 3072, 3072) == SLOW
    table[naming.linear_key("residual", 2**24, 3072, 3072, 8, False)] = FAST
    assert near(2**25, 3072, 3072) == FAST
    assert len(table) == 3
    for sizes in ((2048, 4096, 3072, 4), (2**24, 3072, 2**24)):
        assert near(*sizes) == SLOW  # timed
    assert len(table) == 5


def test_other_batch_sizes_take_the_configuration_of_the_nearest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed or kept for them, as long as the batch is near and the configuration one of their candidates."""
    monkeypatch.setattr(timing, "milliseconds", lambda call: pytest.fail("timed"))
    table = configurations.table(GPU)
    other = Config(128, 128, 128)
    for rows, config in ((256, SLOW), (4096, FAST), (16384, other)):
        table[naming.linear_key("heads", rows, 384, 128, 8, False, 128, by_row=False)] = config

    def asked(rows: int, *possible: Config, by_row: bool = False) -> Config:
        keys = [naming.linear_key("heads", rows, 384, 128, 8, False, 128, form) for form in {by_row: 0, False: 0}]
        return tuning.choose(keys, torch.device("cuda"), lambda: list(possible), lambda config: None)

    assert asked(512, FAST, SLOW) == SLOW
    assert asked(512, FAST, SLOW) == SLOW, "as before"
    assert asked(8192, SLOW, FAST, other, by_row=True) == FAST, "of the nearest form"
    assert asked(65536, other) == other
    assert asked(1024, SLOW, FAST) == SLOW
    for rows, possible in ((2**18, [other]), (32768, [SLOW, FAST])):  # too far; none of its candidates
        monkeypatch.setattr(timing, "milliseconds", lambda call: 1.0)
        assert asked(rows, *possible) == possible[0]
    assert len(configurations.read(cache)) == 2, "those that were timed"


def test_only_the_first_few_candidates_are_timed_unless_none_of_them_runs(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [Config(16 * number, 64, 64) for number in range(1, 9)]
    broken: set[Config] = set()
    timed = []

    def time(call: functools.partial) -> float:
        call()
        timed.append(call.args[0])
        return 9.0 - len(timed)

    def run(config: Config) -> None:
        if config in broken:
            raise RuntimeError("too much shared memory")

    monkeypatch.setattr(timing, "milliseconds", time)
    cuda = torch.device("cuda")
    assert tuning.choose(["attention 16x16x16"], cuda, lambda: configs, run) == configs[1]
    assert timed == configs[:2]
    broken |= set(configs[:4])
    timed.clear()
    assert tuning.choose(["attention 16x32x16"], cuda, lambda: configs, run) in configs[4:6]
    assert set(timed) == set(configs[4:6])
    broken |= set(configs)
    with pytest.raises(RuntimeError, match="too much shared memory"):
        tuning.choose(["attention 16x64x16"], cuda, lambda: configs, run)
    broken -= set(configs[1:])
    assert tuning.choose(["norm 16x64"], cuda, lambda: configs, run) == configs[1], "the first that runs"


def test_a_gpu_of_the_same_kind_has_the_configurations_of_the_one_that_was_measured(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like, of = next(iter(configurations.LIKE.items()))
    assert configurations.table(like) == configurations.read(configurations.tuned_file(configurations.TUNED, of)) != {}


class Kernels:
    """A call of two kernels, launched as operators are."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, Config]] = []

    def __call__(self) -> None:
        for key in ("linear heads 16x32x32, 8 bits, 1 products", "norm 16x32", "attention 16x32x32, mode 0"):
            with contextlib.suppress(tuning.Deferred):

                def run(config: Config, key: str = key) -> None:
                    self.launched.append((key, config))

                run(tuning.choose([key], torch.device("cuda"), lambda: [SLOW, FAST], run))


def test_kernels_of_a_call_are_compiled_at_once_and_then_known(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = []
    monkeypatch.setattr(timing, "compile_all", lambda launches: together.append([config for _, config in launches]))
    monkeypatch.setattr(timing, "milliseconds", lambda call: float(call.args[0] != FAST))
    call = Kernels()
    tuning.prepare(call)
    assert not call.launched
    assert together[0] == [SLOW, FAST, SLOW, SLOW, FAST], "of the norm the first alone"
    assert list(configurations.read(cache).values()) == [FAST, SLOW, FAST]
    together.clear()
    tuning.prepare(call)
    assert together == [[FAST, SLOW, FAST]], "known ones are compiled, too"
    call()
    assert [config for _, config in call.launched] == [FAST, SLOW, FAST]


def test_a_call_that_cannot_be_prepared_is_made_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def no_memory(launches: object) -> None:
        raise torch.OutOfMemoryError("for so many at once")

    monkeypatch.setattr(timing, "compile_all", no_memory)
    tuning.prepare(Kernels())
    assert tuning._NOTES.jobs is None
    monkeypatch.setattr(timing, "compile_all", lambda launches: None)
    monkeypatch.setattr(timing, "milliseconds", lambda call: float(call.args[0] != FAST))
    call = Kernels()
    call()
    assert [config for _, config in call.launched] == [FAST, SLOW, FAST]


def test_a_whole_model_is_prepared_without_a_launch(cache: Path, monkeypatch: pytest.MonkeyPatch, solved) -> None:
    """Every kernel that its call launches is noted, by the key that the call then asks for."""
    model = convert(solved("paper", "w8a8"), "triton")
    given = torch.randn(2, 1, 8, 8), torch.tensor([500, 20]), torch.tensor([1, 2])
    launches = (launch, "norm_quantize"), (launch, "linear"), (launch, "attend"), (float_launch, "float_input")
    for module, name in launches:
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} is launched"))
    monkeypatch.setattr(Plan, "launch", lambda plan, *_: pytest.fail(f"{plan.kernel} is launched"))
    with tuning.collecting() as jobs:
        output = model(given[0], timestep=given[1], class_labels=given[2]).sample
    assert output.shape == (2, 2, 8, 8)
    kinds = [{job.key.partition(" ")[0] for job in jobs if job.known is known} for known in (False, True)]
    assert kinds == [{"linear", "attention", "norm", "float"}, {"embed", "unembed", "poison"}]
    assert len({job.key for job in jobs}) == len(jobs) >= 11
    assert all(job.candidates for job in jobs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of undefined numbers
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
def test_a_model_is_prepared_and_computes_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch, solved, model_inputs
) -> None:
    """With the configurations that were found; the call itself times nothing."""
    model, given = convert(solved("plus", "w8a8"), "triton"), {name: x[:1] for name, x in model_inputs.items()}
    monkeypatch.setattr(tuning, "NATIVE", False)
    expected = model(**given).sample
    monkeypatch.setattr(tuning, "NATIVE", True)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(timing, "cores", lambda: 1)
    timed: list[Config] = []

    def time(call: functools.partial) -> float:
        call()
        timed.append(call.args[0])
        return float(len(timed))

    monkeypatch.setattr(timing, "milliseconds", time)
    tuning.prepare(lambda: model(**given))
    assert len(timed) > len(configurations.read(cache)) >= 9
    before = len(timed)
    torch.testing.assert_close(model(**given).sample, expected, rtol=1e-5, atol=1e-5)
    assert len(timed) == before
