"""Runtimes for trained networks, which read the ONNX format."""

import sys
from typing import Any

import numpy as np
import torch

from benchmarks.contenders.base import Contender, linears, relus
from benchmarks.workloads import Workload


class OnnxRuntime(Contender):
    """ONNX Runtime's CPU provider, with input and output bound beforehand."""

    name = "onnxruntime"
    packages = ("onnx", "onnxruntime")
    tasks = ("infer",)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        session = onnxruntime.InferenceSession(onnx_model(workload), options, providers=["CPUExecutionProvider"])
        self.output = np.empty((workload.batch, workload.net.widths[-1]), np.float32)
        self.input = onnxruntime.OrtValue.ortvalue_from_numpy(workload.data().input.numpy())
        self.binding = session.io_binding()
        self.binding.bind_ortvalue_input("input", self.input)
        self.binding.bind_output("output", "cpu", 0, np.float32, self.output.shape, self.output.ctypes.data)
        self.run = session.run_with_iobinding

    def infer(self) -> np.ndarray[Any, Any]:
        self.run(self.binding)
        return self.output


class OpenVino(Contender):
    """OpenVINO's CPU plugin, tuned for latency, with the input set beforehand."""

    name = "openvino"
    packages = ("onnx", "openvino")
    tasks = ("infer",)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        # It would send usage statistics, from a process that it forks while others are timed. An
        # absent package is one that it does without.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # by itself it takes bfloat16 where the processor has it
        }
        model = core.compile_model(core.read_model(onnx_model(workload)), "CPU", settings)
        self.input = workload.data().input.numpy()
        self.request = model.create_infer_request()
        self.request.set_input_tensor(openvino.Tensor(self.input, shared_memory=True))
        self.output = self.request.get_output_tensor(0).data
        # The pair of calls costs microseconds less than `infer`, which looks through its arguments.
        self.start, self.wait = self.request.start_async, self.request.wait

    def infer(self) -> np.ndarray[Any, Any]:
        self.start()
        self.wait()
        return self.output


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
