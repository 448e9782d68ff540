"""What the end of a run adds to TensorBoard, read back from the event files."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2


@pytest.fixture
def events(finished_once):
    def read(stage):
        folder = finished_once[0] / "run" / "tensorboard" / stage
        found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
        return found.Reload()

    return read


def test_tensorboard_has_every_page(events):
    result, qat = events("result"), events("qat")
    images = {"sensitivity", "allocation", "weights_and_levels", "codebooks", "accuracy", "summary"}
    assert set(result.Tags()["images"]) == images
    assert "config/text_summary" in result.Tags()["tensors"]
    assert {"1_loss/train", "1_loss/validation", "3_learning_rate/lr"} <= set(qat.Tags()["scalars"])
    assert "2_accuracy/validation_top1_percent" in qat.Tags()["scalars"]
    assert "6_codebook/layer3.0.conv2/0" in qat.Tags()["scalars"]
    assert "7_weights/conv1" in qat.Tags()["histograms"]
    assert "weights_and_levels" in qat.Tags()["images"]
    assert "custom_scalars__config__" in qat.Tags()["tensors"]


def test_hparams_hold_a_session_and_the_final_figures(events):
    result = events("result")
    content = result.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["weights"].string_value == "AdqWeightQuantizer"
    assert session.hparams["budget/average_weight_bits"].number_value == 2.81
    assert 10 <= len(session.hparams) <= 20
    (figure,) = result.Scalars("result/qat_top1_percent")
    assert 0 <= figure.value <= 100
