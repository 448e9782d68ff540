import pytest
from export_helpers import DIGITS

from adq_train.deploy.datasets import check_data_source, load_data
from adq_train.errors import UserError


def test_data_sets_of_this_package_may_be_named():
    check_data_source(DIGITS)
    check_data_source({"_target_": "adq_train.data.image_folder.Folders"})


@pytest.mark.parametrize(
    "section",
    [
        {"_target_": "os.system"},
        {"_target_": "adq_train.data.cifar.CIFAR10"},  # torchvision's, unpickles
        {"_target_": "adq_train.data.cifar.torch.load"},
        {"_target_": "adq_train.data.digits.HeldOut"},  # imported there, not a data set
        {"_target_": "adq_train.data.nothing.Digits"},
        {"_target_": "adq_train.data.base.Loading"},  # cannot load anything
        {"_target_": 7},
        {},
        "os.system",
    ],
)
def test_nothing_else_may(section):
    with pytest.raises(UserError, match="is not a data set of adq-train"):
        check_data_source(section)


def test_nor_may_parts_of_a_section():
    section = {**DIGITS, "test_images": {"_target_": "antigravity.x"}}
    with pytest.raises(UserError, match=r"data\.test_images\._target_: .* nothing was imported"):
        check_data_source(section)


def test_a_wrong_section_is_an_error():
    with pytest.raises(UserError, match="test_images"):
        load_data({**DIGITS, "test_images": "many"}, 10)
