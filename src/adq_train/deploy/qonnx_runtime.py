"""qonnx's own executor, behind what every runtime has here. Torch is not imported."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any, ClassVar

from adq_train.deploy.formats import require
from adq_train.deploy.onnx_checks import check_operations, check_places

EXTRA = "fpga"
# Of all tensors of some images, which the executor keeps, and of the comparisons of one node.
MOST_BYTES = 1 << 28


class QonnxGraph:
    """A QONNX file, run node by node.

    Args:
        path: The file.
        threads: Not heeded: the executor starts onnxruntime for each node, as it likes.

    Raises:
        MissingPackageError: The package qonnx is not installed.
        ValueError: It is no such file, or has operations that may run code, or values elsewhere.
    """

    packages: ClassVar[tuple[str, ...]] = ("onnx", "qonnx", "qonnx.core.onnx_exec")

    def __init__(self, path: Path, threads: int) -> None:
        onnx = require("onnx", EXTRA)
        self.execute = require("qonnx.core.onnx_exec", EXTRA).execute_onnx
        try:
            check_places(onnx.load(str(path), load_external_data=False), path)
            proto = onnx.load(str(path))
        except importlib.import_module("google.protobuf.message").DecodeError as error:
            raise ValueError(f"it is no ONNX file: {error}") from error
        check_operations(proto)
        self.metadata = {x.key: x.value for x in proto.metadata_props}
        self.model = importlib.import_module("qonnx.core.modelwrapper").ModelWrapper(proto)
        self.names = proto.graph.input[0].name, proto.graph.output[0].name
        self.inputs, self.outputs = (
            [None, *self.model.get_tensor_shape(name)[1:]] for name in self.names
        )
        kept, compared = 0, [0]
        for node in proto.graph.node:
            kept += 4 * math.prod(self.model.get_tensor_shape(node.output[0]) or ())
            if node.op_type == "MultiThreshold":
                values, thresholds = (self.model.get_tensor_shape(x) for x in node.input)
                compared.append(math.prod(values) * thresholds[1])
        self.together = max(1, MOST_BYTES // max(1, kept + max(compared)))
        self.sized: dict[int, Any] = {}

    def run(self, images: Any) -> Any:
        """Maps images (N, C, H, W) to logits, arrays of float32."""
        import numpy as np

        parts = range(0, len(images), self.together)
        logits = [self.tensors(images[i : i + self.together])[self.names[1]] for i in parts]
        return np.concatenate(logits).astype(np.float32)

    def tensors(self, images: Any, everything: bool = False) -> dict[str, Any]:
        """The logits of some images by their name, or every tensor on the way to them."""
        found: dict[str, Any] = self.execute(
            self._for(len(images)), {self.names[0]: images}, everything
        )
        return found

    def _for(self, count: int) -> Any:
        """The model for so many images at once; the executor takes no others."""
        if count not in self.sized:
            change = importlib.import_module("qonnx.transformation.change_batchsize")
            shapes = importlib.import_module("qonnx.transformation.infer_shapes")
            model = self.model.transform(change.ChangeBatchSize(count))
            if len(self.sized) > 3:  # whole batches, the last one, and what is left of each
                self.sized.clear()
            self.sized[count] = model.transform(shapes.InferShapes())
        return self.sized[count]
