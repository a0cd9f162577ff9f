"""Runtimes for trained networks, which read the ONNX format."""

from typing import Any

import numpy as np

from benchmarks.contenders.base import Contender, linears, relus
from benchmarks.workloads import Workload
from fastmlp.benchmark.peers import onnx_runtime, openvino


class OnnxRuntime(Contender):
    """ONNX Runtime's CPU provider, with input and output bound beforehand."""

    name = "onnxruntime"
    packages = ("onnx", "onnxruntime")
    tasks = ("infer",)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        data = workload.data().input
        self.run = onnx_runtime(onnx_model(workload), [data.numpy()])

    def infer(self) -> np.ndarray[Any, Any]:
        return self.run()[0]


class OpenVino(Contender):
    """OpenVINO's CPU plugin, tuned for latency, with the input set beforehand."""

    name = "openvino"
    packages = ("onnx", "openvino")
    tasks = ("infer",)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        data = workload.data().input
        self.run = openvino(onnx_model(workload), [data.numpy()])

    def infer(self) -> np.ndarray[Any, Any]:
        return self.run()[0]


def onnx_model(workload: Workload) -> bytes:
    """Return the workload's network in the ONNX format, from "input" to "output"."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, parameters, last = [], [], "input"
    layers = list(zip(linears(workload), relus(workload), strict=True))
    for i, (layer, relu) in enumerate(layers):
        names = [f"weight{i}", f"bias{i}"]
        values = (layer.weight, layer.bias)
        parameters += [numpy_helper.from_array(v.detach().numpy(), n) for v, n in zip(values, names, strict=True)]
        result = "output" if i == len(layers) - 1 else f"hidden{i}"
        total = f"sum{i}" if relu else result
        nodes.append(helper.make_node("Gemm", [last, *names], [total], transB=1))
        if relu:
            nodes.append(helper.make_node("Relu", [total], [result]))
        last = result
    widths = {"input": workload.net.widths[0], "output": workload.net.widths[-1]}
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [workload.batch, w]) for n, w in widths.items()]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], parameters)
    # Old enough for every version that reads it to know it.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()
