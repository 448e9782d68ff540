import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adq_train.errors import UserError
from adq_train.training.batch_norm import (
    batch_norms_after,
    first_images,
    kept_statistics,
    reestimate_batch_norm,
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.Dropout(),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Flatten(),
        nn.BatchNorm1d(48),
        nn.Linear(48, 5),
    )
    net[1].running_mean.normal_()
    net[2].eval()
    return net.train()


def test_statistics_are_the_averages_over_the_batches(net):
    batches = [torch.randn(n, 2, 6, 6) + n for n in (4, 9, 2)]
    reestimate_batch_norm(net, batches)
    with torch.no_grad():
        first = [net[0](x) for x in batches]
        flat = [x.transpose(0, 1).flatten(1).double() for x in first]
        mean = sum(x.mean(1) for x in flat) / 3
        variance = sum(x.var(1, unbiased=True) for x in flat) / 3
        # The second norm sees what the first makes of the same batch, not of the averages.
        seen = [
            nn.functional.batch_norm(
                nn.functional.batch_norm(
                    x, None, None, net[1].weight, net[1].bias, training=True, eps=net[1].eps
                ),
                *(None, None),
                *(net[3].weight, net[3].bias),
                training=True,
            ).flatten(1)
            for x in first
        ]
    assert torch.allclose(net[1].running_mean, mean.float(), atol=1e-6)
    assert torch.allclose(net[1].running_var, variance.float(), rtol=1e-5)
    assert torch.allclose(net[5].running_mean, sum(x.mean(0) for x in seen) / 3, atol=1e-6)
    assert torch.allclose(net[5].running_var, sum(x.var(0) for x in seen) / 3, rtol=1e-4)


def test_all_but_the_statistics_is_left_as_it_was(net):
    net[1].eval()
    net[2].eval()
    modes = [module.training for module in net.modules()]
    state = {name: x.clone() for name, x in net.state_dict().items()}
    reestimate_batch_norm(net, [torch.randn(4, 2, 6, 6)])
    assert [module.training for module in net.modules()] == modes
    assert (net[1].momentum, net[5].momentum) == (0.3, 0.1)
    changed = {n for n, x in net.state_dict().items() if not torch.equal(x, state[n])}
    assert changed == {
        f"{i}.{name}" for i in (1, 5) for name in ("running_mean", "running_var")
    } | {"1.num_batches_tracked", "5.num_batches_tracked"}


def test_it_does_not_depend_on_earlier_statistics_or_dropout(net):
    batches = [torch.randn(4, 2, 6, 6) for _ in range(2)]
    reestimate_batch_norm(net, batches)
    first = {name: x.clone() for name, x in net.state_dict().items()}
    net[1].running_mean.fill_(100)
    reestimate_batch_norm(net, batches)
    assert all(torch.equal(x, first[name]) for name, x in net.state_dict().items())


def test_a_batch_without_a_variance_is_refused_and_modes_are_restored(net):
    net.eval()
    with pytest.raises(UserError, match=r"batch norm cannot be estimated: .*use larger batches"):
        reestimate_batch_norm(net, [torch.randn(1, 2, 6, 6)])
    assert not any(module.training for module in net.modules())
    assert net[5].momentum == 0.1


def test_the_norms_behind_a_layer_go_by_the_order_of_the_calls():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early, self.twice = (nn.BatchNorm1d(3) for _ in range(3))
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.late(self.twice(self.layer(self.twice(self.early(x)))))

    net = Crossed()
    assert batch_norms_after(net, "layer", torch.randn(2, 3)) == [net.late]
    assert net.training
    assert not net.layer._forward_hooks


def test_statistics_come_back_after_the_block(net):
    norms = [net[1], net[5]]
    state = {name: x.clone() for name, x in net.state_dict().items()}
    with kept_statistics(norms):
        reestimate_batch_norm(net, [torch.randn(4, 2, 6, 6)])
        assert not torch.equal(net[1].running_mean, state["1.running_mean"])
    assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())


class Parts:
    """Batches of given sizes, whose images are numbered through."""

    def __init__(self, sizes):
        self.parts = torch.arange(sum(sizes)).split(sizes)

    def epoch(self, epoch):
        return ((images, None) for images in self.parts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 60), st.integers(1, 30))
def test_first_images_come_in_order_and_in_batches_of_about_one_size(sizes, wanted, together):
    found = list(first_images(Parts(sizes), 0, wanted, together))
    whole = torch.cat(found)
    assert torch.equal(whole, torch.arange(len(whole)))
    there = sum(sizes)
    assert min(wanted, there) <= len(whole) <= min(wanted + max(sizes) - 1, there)
    if wanted <= there and together <= wanted:
        assert all(len(x) >= together for x in found[:-1])
        assert max(map(len, found)) < wanted / (wanted // together) + max(sizes)


def test_alone_batches_stay_as_they_are():
    found = list(first_images(Parts([4, 4, 4]), 0, 7))
    assert [len(x) for x in found] == [4, 4]


def test_a_batch_without_any_image_is_no_batch_of_the_estimate():
    class Broken(Parts):
        def epoch(self, epoch):
            yield torch.empty(0, 3, 1, 1), None
            yield from ((torch.zeros(len(x), 3, 4, 4), None) for x, _ in super().epoch(epoch))
            yield torch.empty(0, 3, 1, 1), None

    assert [len(x) for x in first_images(Broken([4, 3]), 0, 99, 5)] == [7]
    assert [len(x) for x in first_images(Broken([4, 3]), 0, 99)] == [4, 3]
