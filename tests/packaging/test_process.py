"""The library as a neighbour: threads, one OpenMP runtime, fork, memory, the guard at import."""

import gc
import json
import os
import subprocess
import sys
import threading
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastmlp
from fastmlp._load import Torch, check_build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def in_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_openmp_runtime_after_parallel_work() -> None:
    code = """
import torch, fastmlp
torch.set_num_threads(2)
x, layer = torch.randn(1024, 512), fastmlp.Linear(512, 512)
layer(x).sum().backward()
(x @ x.t()).sum()
names = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
print(sorted(n for n in names if any(k in n.rsplit("/", 1)[-1] for k in ("libgomp", "libiomp", "libomp"))))
"""
    runtimes = in_process(code)
    assert runtimes.count(".so") == 1, runtimes
    assert "torch" in runtimes


COUNT_THREADS = """
import os, torch, fastmlp
torch.set_num_threads({threads})
layer = fastmlp.Linear({width}, {width}, activation="relu")
x = torch.randn({rows}, {width})
before = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    layer(x)
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_small_work_never_wakes_a_thread() -> None:
    assert in_process(COUNT_THREADS.format(threads=4, width=64, rows=32)) == "0"


def test_number_of_threads_is_obeyed() -> None:
    assert in_process(COUNT_THREADS.format(threads=1, width=1024, rows=1024)) == "0"
    assert in_process(COUNT_THREADS.format(threads=3, width=1024, rows=1024)) == "2"


def test_called_from_many_threads() -> None:
    """Each thread its own input, one shared module; forward, backward and inference."""
    module = fastmlp.MLP(32, [64, 64], 8, "tanh")
    inputs = [torch.randn(50 + i, 32) for i in range(8)]
    expected = [module(x).detach() for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            y = module(inputs[i])
            torch.autograd.grad(y.sum(), list(module.parameters()))
            with torch.no_grad():
                same = torch.equal(module(inputs[i]), expected[i])
            if not same or not torch.equal(y, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_gil_is_released() -> None:
    """Another Python thread makes progress while one long call runs."""
    layer, x = fastmlp.Linear(2048, 2048), torch.randn(4096, 2048)
    started, ticks = threading.Event(), []

    def work() -> None:
        started.set()
        with torch.no_grad():
            layer(x)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        while thread.is_alive():
            ticks.append(0)
            thread.join(0.001)
    finally:
        torch.set_num_threads(before)
    # Without the GIL's release the first join would return only when the call is over.
    assert len(ticks) > 10


class Transformed(Dataset[torch.Tensor]):
    """Items that are outputs of a network, computed in the loader's workers."""

    def __init__(self) -> None:
        self.module = fastmlp.Linear(512, 512, activation="relu")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.module(torch.full((512, 512), float(i)))


# Two workers on whatever processor: the warning is about their speed where there is one core.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")
def test_in_loader_workers_after_fork() -> None:
    data = Transformed()
    expected = torch.stack([data[i] for i in range(4)])  # the parent has used its threads before the fork
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.stack(list(loader)), expected)


def test_memory_does_not_grow() -> None:
    code = """
import resource, torch, fastmlp
torch.set_num_threads(1)
module = fastmlp.MLP(64, [128, 96], 10, "gelu")
def once(i):
    x = torch.randn(256 + i % 7, 64, requires_grad=True)
    module(x).sum().backward()
    with torch.no_grad():
        module(x)
for i in range(300): once(i)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(3000): once(i)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(in_process(code)) < 4096  # KiB; one leaked output a call would be 30 MiB


def test_memory_of_a_frozen_network_does_not_grow() -> None:
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 8))
    frozen = fastmlp.freeze(model)
    x, wide = torch.randn(100, 64), torch.randn(100, 128)[:, ::2]
    array, out = x.numpy(), torch.empty(100, 8)

    def calls(count: int) -> None:
        for _ in range(count):
            frozen(x)
            frozen(array)
            frozen(x, out)
            frozen(wide)
            with pytest.raises(RuntimeError):
                frozen(out)

    def resident() -> int:
        with open("/proc/self/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * 4096

    def changes(count: int) -> None:
        for value in range(count):
            model[0].bias.data = torch.full((200,), float(value))
            frozen(x)

    tracemalloc.start()
    # Once as often as later, so that what is remembered for reports of errors is remembered.
    calls(1000)
    changes(50)
    gc.collect()
    before, physical = tracemalloc.get_traced_memory()[0], resident()
    calls(1000)
    changes(50)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    # Less than the smallest object of Python for each call of one kind.
    assert grown < 1000 * 16
    # A result of each call would be 3 MB, the weights of each reading 3 MB.
    assert resident() - physical < 1 << 20


def test_memory_of_a_step_does_not_grow() -> None:
    code = """
import gc, resource, torch, fastmlp
from torch import nn
torch.set_num_threads(1)
model = fastmlp.MLP(64, [128, 96], 10, "gelu")
optimizers = [fastmlp.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]
steps = [fastmlp.TrainStep(model, nn.CrossEntropyLoss(), optimizer) for optimizer in optimizers]
def once(i):
    x, y = torch.randn(128 + i % 7, 64), torch.randint(0, 10, (128 + i % 7,))
    for step in steps:
        step(x, y)
    made = fastmlp.TrainStep(model, nn.CrossEntropyLoss(), optimizers[i % 2], keep_grads=False)
    made(x, y)
    optimizers[0].step()
for i in range(300): once(i)
gc.collect()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(3000): once(i)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(in_process(code)) < 4096  # KiB; gradients of each call would be 260 MiB


def test_offsets_beyond_32_bits() -> None:
    """A row more than 2^31 elements away from the first, without that much memory."""
    storage = torch.empty((1 << 31) + 64, dtype=torch.float32)
    x = storage.as_strided((2, 16), ((1 << 31) + 16, 1))
    x.copy_(torch.randn(2, 16))
    layer = fastmlp.Linear(16, 4, activation="tanh")
    torch.testing.assert_close(layer(x), layer(x.clone()))


BUILT = Torch("2.13.0+cpu", True, None)


def check(tmp_path: Path, built: Torch, found: Torch) -> None:
    info = tmp_path / "_build.json"
    info.write_text(json.dumps({"torch": built.version, "cxx11_abi": built.cxx11_abi, "cuda_version": built.cuda}))
    check_build(info, found)


@pytest.mark.parametrize(
    ("built", "found"),
    [
        (BUILT, BUILT),
        (BUILT, BUILT._replace(version="2.13.0")),
        (BUILT, BUILT._replace(version="2.13.1+cu130", cuda="13.0")),
        (BUILT._replace(cuda="13.0"), BUILT._replace(cuda="13.1")),
    ],
)
def test_a_torch_of_the_same_minor_version_will_do(tmp_path: Path, built: Torch, found: Torch) -> None:
    check(tmp_path, built, found)


@pytest.mark.parametrize(
    ("built", "found", "words"),
    [
        (BUILT, BUILT._replace(version="2.14.0"), "built with torch 2.13.0[+]cpu, but torch 2.14.0 is installed"),
        (BUILT, BUILT._replace(version="2.1.0"), "built with torch 2.13.0[+]cpu, but torch 2.1.0 is installed"),
        (BUILT, BUILT._replace(cxx11_abi=False), "but torch 2.13.0[+]cpu, _GLIBCXX_USE_CXX11_ABI=0 is installed"),
        (BUILT._replace(cuda="13.0"), BUILT, "built with torch 2.13.0[+]cpu with CUDA 13.0, but torch 2.13.0[+]cpu is"),
        (
            BUILT._replace(cuda="13.0"),
            BUILT._replace(cuda="12.8"),
            "with CUDA 13.0, but .* with CUDA 12.8 is installed",
        ),
    ],
)
def test_another_torch_is_named_at_import(tmp_path: Path, built: Torch, found: Torch, words: str) -> None:
    with pytest.raises(ImportError, match=f"{words}.*pip install"):
        check(tmp_path, built, found)


def test_what_is_not_built_is_named_at_import(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"not built.*pip install"):
        check_build(tmp_path / "absent.json", BUILT)


def test_the_guard_comes_before_the_binary(tmp_path: Path) -> None:
    """A copy of the package whose build names another torch, and whose binary is garbage."""
    source = Path(fastmlp.__file__).parent
    package = tmp_path / "fastmlp"
    package.mkdir()
    for file in source.glob("*.py"):
        (package / file.name).write_bytes(file.read_bytes())
    (package / "_C.so").write_bytes(b"not a library")
    (package / "_build.json").write_text(json.dumps({"torch": "1.2.3", "cxx11_abi": True, "cuda_version": None}))
    done = subprocess.run(
        [sys.executable, "-c", "import fastmlp"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode != 0
    assert f"built with torch 1.2.3, but torch {torch.__version__}" in done.stderr


def test_import_is_quiet_and_light() -> None:
    """Nothing printed, no extras imported."""
    code = "import sys, fastmlp; print([m for m in ('sklearn', 'matplotlib', 'rich') if m in sys.modules])"
    assert in_process(code) == "[]"


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    fastmlp.show_config()
    shown = capsys.readouterr().out
    for word in (fastmlp.__version__, torch.__version__, f"isa {fastmlp.get_isa()}", "runs;", "float64", "gelu"):
        assert word in shown


def test_data_parallel_copies_share_nothing() -> None:
    module = nn.Sequential(fastmlp.Linear(4, 3, activation="relu"))
    shared = module.share_memory()
    assert shared(torch.zeros(1, 4)).shape == (1, 3)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system offers no huge pages"
)
def test_large_results_and_scratch_take_huge_pages() -> None:
    """64 MiB of result, and of scratch in backward, without a page fault for each 4 KiB of them."""
    code = (
        "import resource, torch, fastmlp\n"
        "mlp, x = fastmlp.MLP(8, [64, 64], 64), torch.randn(1 << 18, 8)\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "y = mlp(x[:9]); y.backward(torch.ones_like(y))\n"  # torch imports modules at the first such call
        "with torch.no_grad(): start = faults(); y = mlp(x); print(faults() - start)\n"
        "y = mlp(x); seed = torch.ones_like(y); start = faults(); y.backward(seed); print(faults() - start)\n"
    )
    forward, backward = map(int, in_process(code).split())
    small_pages = (64 << 20) // os.sysconf("SC_PAGESIZE")
    assert forward < small_pages / 4
    assert backward < small_pages / 4


@pytest.mark.parametrize(
    "change",
    [
        "model[0].weight.data = model[0].weight.detach().clone()",
        "model.double(); model.float()",
        "model[2].weight = nn.Parameter(torch.randn(4, 64))",
        "optimizer.state[model[0].weight]['exp_avg'] = torch.zeros(64, 8)",
    ],
)
def test_steps_while_another_thread_exchanges_tensors(change: str) -> None:
    """The step that is running keeps the memory that it works on."""
    code = f"""
import threading, time, torch, fastmlp
from torch import nn
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.Adam(model.parameters())
step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
x, y = torch.randn(33, 8), torch.randn(33, 4)
step(x, y)
stop = threading.Event()
def exchange():
    while not stop.is_set():
        {change}
thread = threading.Thread(target=exchange)
thread.start()
end, steps = time.time() + 3, 0
while time.time() < end or steps == 0:
    try:
        step(x, y)
        steps += 1
    except RuntimeError as error:
        assert "dtype" in str(error), error
stop.set()
thread.join()
print(steps)
"""
    assert int(in_process(code)) > 0


def test_a_model_that_holds_its_step_is_freed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.step = fastmlp.TrainStep(self, nn.MSELoss(), optimizer)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.layer(x))

    reference = weakref.ref(Net())
    gc.collect()
    assert reference() is None


def test_a_frozen_network_sees_steps_of_torch_that_count_no_version() -> None:
    """Its fused kernels count none; ours calls them while a hook watches."""
    model = nn.Linear(3, 3)
    frozen = fastmlp.freeze(model)
    optimizer = fastmlp.optim.Adam(model.parameters(), lr=0.1, fused=True)
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    optimizer.register_step_pre_hook(lambda *arguments: None)
    x = torch.randn(4, 3)
    before = frozen(x)
    model(x).sum().backward()
    optimizer.step()
    after = frozen(x)
    assert not torch.equal(after, before)
    step(x, torch.zeros(4, 3))
    assert not torch.equal(frozen(x), after)
