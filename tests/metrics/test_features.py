# SPDX-License-Identifier: Apache-2.0
"""Feature networks: the random one is frozen and orders pictures sensibly; Inception equals torchvision's graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from facelab.errors import UserError
from facelab.metrics.features import (
    InceptionFeatures,
    RandomFeatureNet,
    image_distances,
    read_tensor_file,
    resize_clean,
    resize_pytorch_fid,
)
from facelab.metrics.inception import InceptionV3


def blobs(count: int, seed: int) -> torch.Tensor:
    """Smooth coloured discs of random place and colour, 32 px, uint8."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, 32)
    centre = torch.rand(count, 2, 1, 1, generator=generator) - 0.5
    distance = (axis.view(1, 1, 32) - centre[:, 0]).square() + (axis.view(1, 32, 1) - centre[:, 1]).square()
    color = torch.rand(count, 3, 1, 1, generator=generator)
    return ((-4 * distance)[:, None].exp() * color * 255).to(torch.uint8)


# ---------------------------------------------------------------- the random network


def test_random_features_are_frozen():
    """Numbers recorded when 'random-conv-v1' was named: a change of the network needs a new name."""
    ramp = (torch.arange(3 * 48 * 48) % 251).to(torch.uint8).view(1, 3, 48, 48)
    features = RandomFeatureNet()(ramp)[0]
    assert features.shape == (512,) and features.dtype == torch.float32
    recorded = [0.1894074, 0.6347323, 0.3311597, 0.4935741, 0.1944726, 0.9607501]
    np.testing.assert_allclose(features[[0, 40, 70, 150, 260, 505]], recorded, rtol=1e-5)


def test_random_features_depend_on_seed_and_not_on_global_state():
    pictures = blobs(2, 0)
    torch.manual_seed(5)
    first = RandomFeatureNet()(pictures)
    torch.manual_seed(6)
    assert RandomFeatureNet()(pictures).equal(first)
    other = RandomFeatureNet(seed=1)
    assert not other(pictures).equal(first) and other.name == "random-conv-v1-seed1"


def test_random_frechet_grows_with_the_damage_and_is_named_for_what_it_is():
    net, real, fresh = RandomFeatureNet(), blobs(200, 1), blobs(200, 2)
    grain = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))

    def distance(fake):
        result = image_distances(net, real.split(64), fake.split(64))
        assert set(result) == {"frechet_random", "features", "real_count", "fake_count"}
        assert result["features"] == "random-conv-v1" and result["real_count"] == 200
        return result["frechet_random"]

    def noisy(amount):
        return (fresh + amount * grain).clamp(0, 255).to(torch.uint8)

    same = distance(fresh)
    assert 1.3 * same < distance(noisy(20)) < 0.6 * distance(noisy(40))
    assert 1.5 * same < distance((fresh * 0.8).to(torch.uint8))  # darker
    assert 1.5 * same < distance(fresh.roll((4, 3), dims=(2, 3)))  # off centre
    assert 2 * same < distance(fresh[:20].repeat(10, 1, 1, 1))  # few modes


def test_kernel_distance_is_added_on_request():
    result = image_distances(
        RandomFeatureNet(), [blobs(30, 1)], [blobs(30, 2), blobs(30, 3)], kernel_subsets=4, kernel_subset_size=20
    )
    assert result["fake_count"] == 60 and {"kernel_random", "kernel_random_std"} < set(result)


def test_empty_sets_and_wrong_pictures_are_refused():
    with pytest.raises(UserError, match="at least 2 pictures of each set, got 0"):
        image_distances(RandomFeatureNet(), [blobs(3, 0)], [])
    with pytest.raises(ValueError, match="uint8"):
        RandomFeatureNet()(torch.zeros(1, 3, 8, 8))


# ---------------------------------------------------------------- Inception


def randomized(network: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        spread = value[0].numel() ** -0.5 * 1.4 if value.ndim == 4 else 0.2
        value.copy_(torch.randn(value.shape, generator=generator) * spread)
        if name.endswith(("bn.weight", "running_var")):
            value.copy_(1 + value.abs())


def test_graph_and_names_equal_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    theirs = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=False).eval()
    randomized(theirs, 0)
    ours = InceptionV3(pooling="torchvision")
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)  # strict: exactly the same names
    picture = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(1))
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        expected, got = theirs(picture), ours(picture)
        fid = InceptionV3(pooling="fid")
        fid.load_state_dict(state)
        other = fid(picture)
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert float((other - expected).norm() / expected.norm()) > 0.01  # the FID network pools otherwise


def test_fid_pooling_leaves_the_padding_out_and_ends_in_a_maximum():
    network = InceptionV3("fid")
    ones = torch.ones(1, 4, 5, 5)
    for name, kind in (("Mixed_5b", 1.0), ("Mixed_7b", 1.0)):
        block = network.get_submodule(name)
        block.branch_pool = torch.nn.Identity()
        torch.testing.assert_close(block._pooled(ones), ones * kind)
    spike = torch.zeros(1, 1, 5, 5)
    spike[0, 0, 2, 2] = 9
    block = network.get_submodule("Mixed_7c")
    block.branch_pool = torch.nn.Identity()
    assert float(block._pooled(spike).sum()) == 81  # nine neighbours see the maximum, an average would keep 9
    with_padding = InceptionV3("torchvision").get_submodule("Mixed_5b")
    with_padding.branch_pool = torch.nn.Identity()
    assert float(with_padding._pooled(ones)[0, 0, 0, 0]) == pytest.approx(4 / 9)


def state_file(path, classes=1008, drop=None, change=None):
    """A small file: every tensor is one repeated number."""
    shapes = {k: v.shape for k, v in InceptionV3("fid").state_dict().items()}
    shapes["fc.weight"], shapes["fc.bias"] = (classes, 2048), (classes,)
    state = {
        k: torch.tensor((1 + i / 1000) / max(s[1:].numel() if len(s) == 4 else 1, 1)).expand(s)
        for i, (k, s) in enumerate((k, torch.Size(s)) for k, s in shapes.items())
        if k != drop
    }
    if change:
        state[change] = torch.tensor(1.0).expand(3, 3)
    torch.save(state, path)
    return path, state


def test_inception_reads_a_state_dictionary(tmp_path):
    path, state = state_file(tmp_path / "fid.pth")
    net = InceptionFeatures(path)
    loaded = net.network.state_dict()
    for name in (
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_6c.branch7x7dbl_4.bn.running_mean",
        "Mixed_7c.branch_pool.bn.bias",
    ):
        assert loaded[name].equal(state[name])
    assert (net.frechet_name, net.kernel_name, net.name) == ("fid", "kid", "inception-2015-12-05/pytorch-fid")
    assert not any(p.requires_grad for p in net.parameters()) and not net.train().network.Mixed_5b.training
    features = net(blobs(1, 0))
    assert features.shape == (1, 2048) and bool(torch.isfinite(features).all())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": 1000}, "ImageNet weights give no FID"),
        ({"drop": "Mixed_5d.branch1x1.bn.weight"}, "Mixed_5d.branch1x1.bn.weight must be .* nothing of that name"),
        ({"change": "Mixed_7a.branch3x3_1.conv.weight"}, r"Mixed_7a.branch3x3_1.conv.weight must be .* got \(3, 3\)"),
        ({"drop": "fc.weight"}, "no fc.weight of 1008 rows"),
    ],
)
def test_other_networks_are_refused_in_one_line(tmp_path, arguments, words):
    path, _ = state_file(tmp_path / "net.pth", **arguments)
    with pytest.raises(UserError, match=words) as caught:
        InceptionFeatures(path)
    assert "\n" not in str(caught.value)


def test_damaged_and_hostile_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such weight file"):
        read_tensor_file(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="damaged or holds more than tensors"):
        read_tensor_file(tmp_path / "text.pth")
    whole = state_file(tmp_path / "a.pth")[0].read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        read_tensor_file(tmp_path / "half.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="must hold a state dictionary"):
        read_tensor_file(tmp_path / "list.pth")
    (tmp_path / "hostile.pth").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(UserError, match="damaged or holds more than tensors"):
        read_tensor_file(tmp_path / "hostile.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_archives_give_their_tensors_and_nothing_runs(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1, bias=False))
    torch.jit.trace(network, torch.zeros(1, 3, 2, 2)).save(tmp_path / "net.pt")
    assert read_tensor_file(tmp_path / "net.pt")["0.weight"].equal(network[0].weight)
    with pytest.raises(UserError, match="not the FID Inception network: Conv2d_1a_3x3.conv.weight"):
        InceptionFeatures(tmp_path / "net.pt")


# ---------------------------------------------------------------- resizing


def test_resizing_rules_differ_where_they_should():
    flat = torch.full((1, 3, 500, 400), 51, dtype=torch.uint8)
    for rule in (resize_pytorch_fid, resize_clean):
        resized = rule(flat)
        assert resized.shape == (1, 3, 299, 299)
        torch.testing.assert_close(resized, torch.full_like(resized, 0.2), rtol=1e-6, atol=1e-6)
    stripes = torch.zeros(1, 3, 1196, 1196, dtype=torch.uint8)
    stripes[..., ::2] = 255  # shrunk fourfold: antialiasing gives grey everywhere
    assert float(resize_clean(stripes).std()) < 0.02
    assert float(resize_clean(stripes).mean()) == pytest.approx(0.5, abs=0.01)


def test_bilinear_without_antialias_by_hand():
    # 598 -> 299 px: each output is the mean of two neighbours in each direction
    picture = torch.randint(0, 256, (1, 3, 598, 598), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.avg_pool2d(picture.float() / 255, 2)
    torch.testing.assert_close(resize_pytorch_fid(picture), expected, rtol=1e-5, atol=1e-5)
    # 1196 -> 299 px: only the middle two of four in each direction are seen, which is the lack of antialias
    large = torch.randint(0, 256, (1, 3, 1196, 1196), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    middle = large[..., 1:, 1:].float().unfold(2, 2, 4).unfold(3, 2, 4).mean(dim=(-1, -2)) / 255
    torch.testing.assert_close(resize_pytorch_fid(large), middle, rtol=1e-5, atol=1e-5)


def test_torch_is_not_quoted_where_it_would_have_code_run(tmp_path):
    """Its message advises to load the file again with its code."""
    (tmp_path / "text.pth").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(UserError, match="expected tensors by name") as caught:
        read_tensor_file(tmp_path / "text.pth")
    assert "weights_only" not in str(caught.value)
