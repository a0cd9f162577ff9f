"""Pickles of frozen networks: as arguments of other processes, of other versions, and damaged ones."""

import base64
import copy
import io
import pickle
import resource
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastmlp
from fastmlp import FrozenMLP, frozen
from tests.support.axes import DTYPES

X = torch.linspace(-2, 2, 12).view(3, 4)


#: A network and the name of the dtype of its input: tensors are sent in their memory, which is torch's business.
Network = tuple[FrozenMLP, str]


def networks() -> list[Network]:
    """In every dtype, with and without biases, and with a layer of no features."""
    found = []
    for dtype in DTYPES:
        model = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.3), nn.Linear(5, 3, bias=False)).to(dtype)
        found.append((fastmlp.freeze(model), str(dtype)))
    found.append((fastmlp.freeze(nn.Linear(4, 3), dtype=torch.bfloat16), "torch.float32"))
    narrow = fastmlp.MLP(4, [1], 3)
    for name, shape in (("0.weight", (0, 4)), ("0.bias", (0,)), ("2.weight", (3, 0))):
        narrow.get_parameter(name).data = torch.empty(shape)
    found.append((fastmlp.freeze(narrow), "torch.float32"))
    return found


def bits(networks: list[Network]) -> list[bytes]:
    inputs = [X.to(getattr(torch, dtype.removeprefix("torch."))) for _, dtype in networks]
    return [network(x).double().numpy().tobytes() for (network, _), x in zip(networks, inputs, strict=True)]


received: list[Network] = []


def receive(networks: list[Network]) -> None:
    received[:] = networks


def received_bits(_: int) -> list[bytes]:
    return bits(received)


def put_bits(networks: list[Network], queue: Any) -> None:
    queue.put(bits(networks))


class Frozen(Dataset[Tensor]):
    """Rows of a frozen network, computed by a worker."""

    def __init__(self, network: FrozenMLP) -> None:
        self.network = network

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Tensor:
        return self.network(X[i])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes_take_them_as_arguments(method: str) -> None:
    context: Any = mp.get_context(method)
    queue = context.Queue()
    own = networks()
    process = context.Process(target=put_bits, args=(own, queue))
    process.start()
    found = queue.get(timeout=300)
    process.join(300)
    assert process.exitcode == 0
    assert found == bits(own)


def test_process_pools_and_data_loaders_take_them() -> None:
    context: BaseContext = mp.get_context("spawn")
    own = networks()
    with ProcessPoolExecutor(1, mp_context=context, initializer=receive, initargs=(own,)) as pool:
        assert pool.submit(received_bits, 0).result(timeout=300) == bits(own)
    network = own[0][0]
    loader = DataLoader(Frozen(network), batch_size=3, num_workers=1, multiprocessing_context="spawn")
    (found,) = list(loader)
    assert torch.equal(found, network(X))


def test_pickles_hold_no_tensors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of the CPU nor those of another device."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).to(dtype)
    for _ in range(2):
        network = fastmlp.freeze(model)

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj: object) -> None:
                assert not isinstance(obj, Tensor)

        memory = io.BytesIO()
        Pickler(memory).dump(network)
        again = pickle.loads(memory.getvalue())
        x = X.to(dtype)
        assert torch.equal(again(x), network(x))
        assert repr(again) == repr(network)
        assert again.nbytes == network.nbytes
        monkeypatch.setattr(frozen, "_is_packed", lambda device: False)


#: Made before pickles held bytes, of tensors: 3 -> 2 leaky_relu(0.25) -> 1 with weights [[-2, -1, 0], [1, 2, 3]] and
#: [[2, -3]] and biases [0.5, -1] and none.
OLD = (
    "c-q~R&u`N(6vy*xUCCHA*ohm*>=Mx^EA-T9LgQdDU|e#UqAc;6fEUNHQ>l|G^*}3%e8b%M1Nbl4pTNJtpMb=Hm!=&|0*NbFkrh9G"
    "{oeCO-(+ficw=eHAv@<07Z;>(&r5oVb0ynhiMgO9R_~Q_svLP67IEr^mB<KJ@-FP3RT)V_fpbpFaOBlWx!uU>qtOs6xf2o^B_X7}"
    "2+zg>b5I@b>Y6q+-r3~)$D?oeUwwLh&z%}iznU;lnC1jK&{9!SL1Rk75iWT~bEbnJ*oGaF2|;j(^CXLMX1on-2#RrmL!Mn?&ddq3"
    "oL~cjJf)>z8^{PuSY^3jEo24toe9l{Y!g{k1vQ;uvlcfkGc8_T!9Ie<#mgpWGd<{lrtkN9-LBvBeXr;FtjQY}6*E!mSTO4aWIJWr"
    "@3ea4wzTVU1pq!buhRic2k;!InL1HOLk2SE3YkcstA*SG1_Z|f5CHbAXJvv*oIK8A0VMZMlz=m7%Smq?n*Tc0{r;nF-@8H8_!HHY"
    "7N{COsn!&)))aMQ07YX-F}<@Qg~7`I39Sd-Lw~>bceGa8o3sYC2d_OhQ%IlvLh86iC3n~Vg$NutidHUcuRngUptK2&UXLL{Dm78E"
    "lj9-iMnHnl0;?y3FHJc<ubsLl+gXBhk%=*=>kwWn>U!=EcqCbT"
)


def test_older_pickles_are_read() -> None:
    network: FrozenMLP = pickle.loads(zlib.decompress(base64.b85decode(OLD)))
    assert repr(network) == "FrozenMLP(3 -> 2 leaky_relu(negative_slope=0.25) -> 1, torch.float32)"
    assert network(torch.tensor([[1.0, 2.0, 3.0]])).item() == 2 * -3.5 * 0.25 - 3 * 13
    assert torch.equal(copy.deepcopy(network)(torch.ones(3)), network(torch.ones(3)))


State = list[Any]


def replaced(state: State, place: int, layer: int, raw: Any) -> State:
    state[place] = [raw if i == layer else old for i, old in enumerate(state[place])]
    return state


HUGE = 1 << 40
DAMAGED: dict[str, tuple[Callable[[State], State], str]] = {
    "shape": (lambda s: replaced(s, 2, 0, ("float32", (HUGE, 4), s[2][0][2])), r"damaged: .* has 80 bytes"),
    "square": (lambda s: replaced(s, 2, 0, ("float32", (HUGE, HUGE), s[2][0][2])), "damaged"),
    "negative": (lambda s: replaced(s, 2, 0, ("float32", (-5, -4), s[2][0][2])), "damaged"),
    "dtype": (lambda s: replaced(s, 2, 0, ("float64", (5, 4), s[2][0][2])), "damaged"),
    "no dtype": (lambda s: replaced(s, 2, 0, ("nn", (5, 4), s[2][0][2])), "there is no dtype 'nn'"),
    "features from nothing": (lambda s: replaced(s, 2, 0, ("float32", (HUGE, 0), b"")), "more than a frozen network"),
    "features to nothing": (lambda s: replaced(s, 2, 1, ("float32", (0, HUGE), b"")), r"weights\[1\] has shape"),
    "bias": (lambda s: replaced(s, 3, 0, ("float32", (HUGE,), s[3][0][2])), "damaged"),
    "other bias": (lambda s: replaced(s, 3, 0, ("float32", (4,), b"0" * 16)), r"biases\[0\] has shape \[4\], expected"),
    "vector": (lambda s: replaced(s, 2, 0, ("float32", (20,), s[2][0][2])), "expected two dimensions"),
    "other layers": (lambda s: replaced(s, 2, 1, ("float32", (5, 3), s[2][1][2])), "in the last dimension"),
    "fewer weights": (lambda s: [*s[:2], s[2][:1], *s[3:]], "a weight for each of 2 layers, got 1"),
    "no weights": (lambda s: [*s[:2], [], [], [], *s[5:]], "at least one layer"),
    "fewer biases": (lambda s: [*s[:3], s[3][:1], *s[4:]], "expected one activation for each of 1"),
    "fewer activations": (lambda s: [*s[:4], s[4][:1], *s[5:]], "expected one activation for each of 2"),
    "float32 ends": (lambda s: [*s[:5], True, *s[6:]], r"weights in torch.bfloat16 only, got torch.float32"),
    "device": (lambda s: [s[0], "xla", *s[2:]], "the pickle of a frozen network is for xla, and there are no kernels"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_pickles(damage: Callable[[State], State], message: str) -> None:
    """They are refused before memory is taken for what they ask for."""
    network = fastmlp.freeze(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    build, state = network.__reduce__()
    assert torch.equal(build(*state)(X), network(X))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        with pytest.raises((ValueError, RuntimeError), match=message):
            build(*damage(list(copy.deepcopy(state))))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_every_flipped_bit_is_refused_or_read(tmp_path: Path) -> None:
    """In a process of its own, with little memory: nothing but an exception may come of a damaged pickle."""
    code = """
import pickle, resource, torch, fastmlp
from pathlib import Path
network = fastmlp.freeze(torch.nn.Linear(2, 3))
data = bytearray(pickle.dumps(network))
network(torch.zeros(2))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), -1))
read = refused = 0
for place in range(data.find(b"float32"), len(data)):
    for bit in range(8):
        data[place] ^= 1 << bit
        try:
            pickle.loads(bytes(data))
            read += 1
        except Exception:
            refused += 1
        data[place] ^= 1 << bit
print(read > 0, refused > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
