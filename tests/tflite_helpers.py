"""Programs of hand-made integer layers, run by LiteRT's kernels."""

import numpy as np
import pytest

from adq_train.deploy.tflite_file import Program, file_bytes
from adq_train.deploy.tflite_ops import Emitter, Grid

LITERT = pytest.importorskip("ai_edge_litert.interpreter")
# XNNPACK, as users get it, and the plain kernels, whose arithmetic microcontrollers have.
KERNELS = {
    "xnnpack": LITERT.OpResolverType.AUTO,
    "reference": LITERT.OpResolverType.BUILTIN_REF,
}
IMAGES = Grid(0.0517, -128, 127)


def run_file(content, images, kernels="xnnpack", everything=False):
    """Runs images (N, H, W, C) or (N, C); the output, or every tensor by its name."""
    interpreter = LITERT.Interpreter(
        model_content=content,
        experimental_op_resolver_type=KERNELS[kernels],
        experimental_preserve_all_tensors=everything,
        num_threads=1,
    )
    (inputs,), (outputs,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(inputs["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(inputs["index"], images.astype(np.float32))
    interpreter.invoke()
    if not everything:
        return interpreter.get_tensor(outputs["index"])
    details = [x for x in interpreter.get_tensor_details() if x["name"]]
    return {x["name"]: interpreter.get_tensor(x["index"]) for x in details}


def run_layers(codes, grid, layers, kernels="xnnpack"):
    """Runs layers on given codes.

    Args:
        codes: (N, H, W, C) or (N, C) integers within the grid.
        grid: What the codes are on.
        layers: Maps an Emitter and its input's Codes to the last Codes.
        kernels: A name of KERNELS.

    Returns:
        The last codes, or what they stand for where that has 16 bits, and their step.
    """
    emitter = Emitter()
    images = emitter.input("images", (1, *codes.shape[1:]))
    last = layers(emitter, emitter.rescale(images, grid, "codes"))
    output = emitter.output(last, "logits")
    content = file_bytes(Program(tuple(emitter.operations), images.value, output), {})
    values = run_file(content, codes * np.float32(grid.step), kernels)
    return values if last.value.dtype == "int16" else np.rint(values / last.step), last.step
