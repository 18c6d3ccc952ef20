# SPDX-License-Identifier: Apache-2.0
"""compute_metrics: every metric of a tiny model, what is refused in one line, miou by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from facelab.api import FaceModel, load
from facelab.cameras.camera import Camera
from facelab.checkpoints.format import load_checkpoint
from facelab.cli.measure import fade_in, pose_encoder
from facelab.cli.metrics import compute_metrics
from facelab.data.synthetic import SyntheticHeads
from facelab.inference.pictures import save_label_png
from facelab.methods import load_method
from facelab.metrics.features import RandomFeatureNet, image_distances


def compute(*arguments: object) -> Result:
    return CliRunner().invoke(compute_metrics, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    result = compute(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


def test_all_metrics_of_a_tiny_model(run_folder: Path, tmp_path: Path):
    out = tmp_path / "metrics.json"
    names = "frechet_random,kernel_random,pose,depth,consistency"
    small = ("--num-images", 6, "--image-size", 16, "--batch", 4, "--depth-heads", 2, "--depth-candidates", 3)
    result = compute(run_folder, "--metrics", names, *small, "--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    metrics = content["metrics"]
    assert list(metrics) == names.split(",") and "fid" not in result.output.replace("frechet", "")
    assert metrics["frechet_random"]["features"] == "random-conv-v1" and metrics["frechet_random"]["fake_count"] == 6
    assert metrics["pose"]["held_out"]["count"] == 6 == metrics["pose"]["generated"]["count"]
    assert metrics["pose"]["image_size"] == 16 == metrics["depth"]["image_size"], "as trained, at the checkpoint's step"
    assert metrics["depth"]["candidates"] == 3 and metrics["depth"]["heads"] == 2
    exact = metrics["consistency"]["exact_depth"]
    assert exact["without_overlap"] == 0 and 0 < exact["mean_error"] < 0.01
    best = metrics["depth"]["perfect_generator"]
    assert best["rmse"] < best["plane_rmse"] and best["mask_iou"] > 0.7
    assert content["model"]["step"] == 15 and content["data"] == {
        "source": "synthetic",
        "heads_seed": 1_000_000,
        "real_count": 6,
    }
    assert len(content["deviations"]) == 5 and {"facelab", "torch"} <= set(content["versions"])
    for line in ("frechet_random ", "pose.held_out.mean_yaw", "depth.perfect_generator.rmse", "consistency.mean_error"):
        assert line in result.output
    again = compute(run_folder, "--metrics", "frechet_random", *small, "--batch", 5, "--device", "cpu", "--out", out)
    assert again.exit_code == 0
    value = json.loads(out.read_text())["metrics"]["frechet_random"]["value"]
    assert value == pytest.approx(metrics["frechet_random"]["value"], rel=1e-3), "the batch changes nothing"


def test_a_folder_of_pictures_is_compared_as_the_library_does(run_folder: Path, tmp_path: Path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    heads = SyntheticHeads(9, 16).batch(range(5))
    for i in range(5):
        Image.fromarray(heads.image[i].permute(1, 2, 0).numpy()).save(data / "images" / f"{i}.png")
        Image.fromarray(heads.mask[i].numpy().astype(np.uint8)).save(data / "masks" / f"{i}.png")
    (data / "dataset.json").write_text('{"crop": 1.0}')
    out = tmp_path / "m.json"
    result = compute(run_folder, "--data", data, "--num-images", 4, "--num-real", 99, "--image-size", 16, "--out", out)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert content["data"] == {"source": str(data), "real_count": 5}
    from facelab.cameras.pose_sampling import PosePrior
    from facelab.metrics.evaluate import GeneratedHeads, uint8_pictures

    model = load(run_folder)
    fake = GeneratedHeads(model.generator, model.settings(16, 1), PosePrior(), 12.0)
    expected = image_distances(RandomFeatureNet(), [heads.image], uint8_pictures(fake, 4))
    assert content["metrics"]["frechet_random"]["value"] == pytest.approx(expected["frechet_random"], rel=1e-4)


def test_fid_and_kid_with_a_file_of_the_right_structure(run_folder: Path, tmp_path: Path):
    from safetensors.torch import save_file

    from facelab.metrics.inception import InceptionV3

    state = {name: tensor.half() for name, tensor in InceptionV3("fid").state_dict().items() if tensor.ndim}
    file = tmp_path / "inception.safetensors"
    save_file({**state, "fc.weight": torch.zeros(1008, 2048, dtype=torch.float16)}, file)
    out = tmp_path / "m.json"
    small = ("--num-images", 2, "--image-size", 16, "--batch", 2, "--kernel-subsets", 2, "--device", "cpu")
    result = compute(run_folder, "--metrics", "kid,fid,frechet_random", "--inception", file, *small, "--out", out)
    assert result.exit_code == 0, result.output
    metrics = json.loads(out.read_text())["metrics"]
    assert list(metrics) == ["kid", "fid", "frechet_random"]
    assert metrics["fid"]["features"] == metrics["kid"]["features"] == "inception-2015-12-05/pytorch-fid"
    assert metrics["frechet_random"]["features"] == "random-conv-v1"
    assert metrics["fid"]["value"] > 0 and metrics["kid"]["subsets"] == 2


def test_what_cannot_be_measured_is_said_in_one_line(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FACELAB_HOME", str(tmp_path))
    line = refused(run_folder, "--metrics", "fid")
    assert "pt_inception-2015-12-05" in line and "frechet_random" in line and "without" in line
    assert "no file at" in refused(run_folder, "--metrics", "kid", "--inception", tmp_path / "nothing.pth")
    broken = tmp_path / "inception.pth"
    broken.write_bytes(b"no weights")
    assert "damaged" in refused(run_folder, "--metrics", "fid", "--inception", broken, "--num-images", 2)
    assert "Did you mean 'pose'" in refused(run_folder, "--metrics", "poze")
    assert "no metric chosen" in refused(run_folder, "--metrics", ",")
    assert "needs a MODEL" in refused("--metrics", "pose")
    assert "no checkpoint at" in refused(tmp_path / "absent")
    assert "--data synthetic" in refused(run_folder, "--metrics", "depth", "--data", tmp_path)
    assert "no data set at" in refused(run_folder, "--data", tmp_path / "absent", "--num-images", 2)
    assert not (tmp_path / "metrics.json").exists()


def test_pose_needs_the_discriminator(run_folder: Path, tmp_path: Path):
    from facelab.cli.export import export

    bare = export(run_folder, tmp_path / "bare")
    assert "--with-discriminators" in refused(bare, "--metrics", "pose", "--num-images", 2)
    whole = load(export(run_folder, tmp_path / "whole", dtype="fp32", with_discriminators=True))
    picture = torch.rand(2, 3, 16, 16)
    encode, size = pose_encoder(whole)
    method, stored = load_method("fenerf"), load_checkpoint(run_folder)
    discriminator = method.build(whole.config)["d_image"]
    discriminator.load_state_dict(stored.weights["d_image"])
    assert size == 16
    # step 15, 16 px since step 10, fading for 20 steps: a quarter; the same from the run and from the export
    expected = discriminator(picture, 0.25).pose
    torch.testing.assert_close(encode(picture), expected)
    torch.testing.assert_close(pose_encoder(load(run_folder))[0](picture), expected)
    assert not torch.allclose(expected, discriminator(picture, 1.0).pose)
    assert fade_in(method, stored.meta, 15) == 0.25 and fade_in(method, stored.meta, 90) == 1.0


def test_miou_of_two_folders_by_hand(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = np.array([[1, 1], [2, 2]], dtype=np.uint8)
    second = np.array([[1, 2], [2, 2]], dtype=np.uint8)
    Image.fromarray(first).save(tmp_path / "a" / "0.png")  # class numbers
    save_label_png(tmp_path / "b" / "0.png", second)  # the same in a palette file
    folders = ("--metrics", "miou", "--predictions", tmp_path / "a", "--targets", tmp_path / "b")
    out = tmp_path / "m.json"
    values = {}
    for kind in ("present", "original"):
        result = compute(*folders, "--kind", kind, "--out", out)
        assert result.exit_code == 0, result.output
        miou = json.loads(out.read_text())["metrics"]["miou"]
        assert miou["kind"] == kind and miou["count"] == 1
        values[kind] = miou["value"]
    # skin: 1 of 2 pixels; nose: 2 of 3
    assert values["present"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert values["original"] == pytest.approx((1 / 2 + 2 / 3) / 19, rel=1e-5)
    assert miou["per_class"]["skin"] == 0.5 and miou["per_class"]["hair"] is None


def test_mask_folders_that_do_not_fit(tmp_path: Path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()

    def miou() -> str:
        return refused("--metrics", "miou", "--predictions", a, "--targets", b, "--out", tmp_path / "m.json")

    assert "--predictions DIR --targets DIR" in refused("--metrics", "miou")
    assert "--targets is missing" in refused("--metrics", "miou", "--predictions", a)
    assert "no masks in" in miou()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(a / "0.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(b / "1.png")
    assert "0 stands in" in miou()
    (b / "1.png").rename(b / "0.png")
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(b / "0.png")
    assert "one size, got 4x4 and 4x5" in miou()
    Image.fromarray(np.full((4, 4), 37, np.uint8)).save(b / "0.png")
    assert "mask value 37" in miou()
    assert not (tmp_path / "m.json").exists()


@pytest.fixture(scope="module")
def eg3d_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny EG3D with super-resolution, not trained, whose fields are dense enough to be seen."""
    from facelab.api import FaceModel
    from facelab.config import load_staged, resolve_curriculum, to_dict

    folder = tmp_path_factory.mktemp("eg3d")
    overrides = ["model.resolution=128", "model.superresolution=2x", "render.resolution=16", "conditioning.pose=true"]
    method = load_method("eg3d")
    staged = load_staged(method.config_type, [resolve_curriculum("eg3d", "debug")], overrides)
    config = staged.at(0)
    generator = method.build_generator(config)
    with torch.no_grad():
        list(generator.field_net.parameters())[-1][0] += 8
    meta = {"config": to_dict(staged), "step": 0, "images": 0}
    return FaceModel(method, generator, config, meta, folder).save(folder / "model.safetensors")


def test_metrics_of_a_tiny_eg3d(eg3d_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from facelab.cli import measure

    monkeypatch.setattr(measure, "READER_HEADS", 64)
    names = "frechet_random,precision_recall_random,pose,depth,consistency"
    small = ("--num-images", 5, "--batch", 3, "--depth-heads", 2, "--depth-candidates", 3, "--out", tmp_path / "m.json")
    result = compute(eg3d_model, "--metrics", names, *small, "--device", "cpu")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert metrics["frechet_random"]["image_size"] == 128 == metrics["pose"]["image_size"]
    assert metrics["precision_recall_random"]["fake_count"] == 5
    face = load(eg3d_model)
    frontal = Camera.on_sphere(torch.pi / 2, torch.pi / 2, 13.0, 2.7)
    assert (
        metrics["depth"]["image_size"] == face.sample(camera=frontal, settings=face.settings(None, 1)).depth.shape[-1]
    )
    assert metrics["pose"]["encoder"].startswith("ridge") and metrics["pose"]["held_out"]["count"] == 5
    assert metrics["pose"]["held_out"]["mean_direction"] < metrics["pose"]["held_out"]["chance_direction"]
    assert 0.1 < metrics["depth"]["depth_range"] < 1.2, "in EG3D's units, 2.7 times as large"
    assert metrics["consistency"]["exact_depth"]["compared"] > 0.3
    again = compute(eg3d_model, "--metrics", "frechet_random", *small, "--device", "cpu")
    assert again.exit_code == 0
    repeated = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert repeated["frechet_random"] == metrics["frechet_random"]
    line = refused(eg3d_model, "--image-size", 64)
    assert "makes pictures of 128 pixels" in line


def test_eg3d_is_compared_with_a_data_set_and_its_cameras(eg3d_model: Path, tmp_path: Path):
    from facelab.data.eg3d_prepare import synthetic_items, write_items

    write_items(tmp_path / "set.zip", synthetic_items(6, 32, 0))
    options = ("--data", tmp_path / "set.zip", "--num-images", 4, "--out", tmp_path / "m.json", "--device", "cpu")
    result = compute(eg3d_model, "--metrics", "frechet_random", *options)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "m.json").read_text())["data"] == {
        "source": str(tmp_path / "set.zip"),
        "real_count": 4,
    }
    assert "fitted on synthetic heads" in refused(eg3d_model, "--metrics", "pose", *options)


def test_networks_that_need_a_file_say_so(eg3d_model: Path, tmp_path: Path):
    assert "identity needs --arcface FILE" in refused(eg3d_model, "--metrics", "identity")
    assert "precision_recall_random works without" in refused(eg3d_model, "--metrics", "precision_recall")
    assert "there is no file" in refused(eg3d_model, "--metrics", "identity", "--arcface", tmp_path / "no.pth")


def test_identity_through_the_command(eg3d_model: Path, tmp_path: Path):
    from facelab.nn.pretrained.arcface import ArcFace, published_names

    ours = ArcFace().state_dict()
    torch.save({theirs: ours[name] for name, theirs in published_names(ours).items()}, tmp_path / "arc.pth")
    options = ("--arcface", tmp_path / "arc.pth", "--num-images", 3, "--batch", 2, "--out", tmp_path / "m.json")
    result = compute(eg3d_model, "--metrics", "identity", *options, "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "m.json").read_text())["metrics"]["identity"]
    assert found["count"] == 3 and -1 <= found["between_heads"] <= 1 and found["value"] <= 1
    assert found["network"] == "arcface-ir-se50" and found["seed"] == 0


def test_clip_score_through_the_command(eg3d_model: Path, tmp_path: Path):
    from facelab.nn.pretrained.random_diffusion import write_tokenizer
    from tests.nn.test_clip import clip_model

    assert "got no --clip" in refused(eg3d_model, "--metrics", "clip_score", "--prompt", "a man")
    assert "got no --prompt" in refused(eg3d_model, "--metrics", "clip_score", "--clip", tmp_path, "--prompt", " ")
    assert "holds no CLIP" in refused(eg3d_model, "--metrics", "clip_score", "--clip", tmp_path, "--prompt", "a man")
    words = {"vocab_size": 514, "max_position_embeddings": 20, "eos_token_id": 513, "bos_token_id": 512}
    clip_model(**words).save_pretrained(tmp_path / "clip")
    write_tokenizer(tmp_path / "clip")
    options = ("--clip", tmp_path / "clip", "--prompt", "a man", "--num-images", 3, "--batch", 2)
    result = compute(eg3d_model, "--metrics", "clip_score", *options, "--out", tmp_path / "m.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "m.json").read_text())["metrics"]["clip_score"]
    assert found["count"] == 3 and len(found["per_view"]) == 2 and found["prompt"] == "a man"
    assert found["lowest_view"] == min(found["per_view"]) and -1 <= found["lowest_view"] <= found["value"] <= 1


def test_real_pictures_are_not_mirrored_whatever_the_training_did(eg3d_model: Path, tmp_path: Path):
    """As published distances are measured: the original leaves the mirror images out."""
    from dataclasses import replace

    from facelab.data.eg3d_prepare import synthetic_items, write_items

    model = load(eg3d_model)
    config = replace(model.config, data=replace(model.config.data, mirror=True))
    mirrored = FaceModel(load_method("eg3d"), model.generator, config, {}, eg3d_model).save(
        tmp_path / "mirrored.safetensors"
    )
    write_items(tmp_path / "set.zip", synthetic_items(5, 32, 0))
    options = ("--data", tmp_path / "set.zip", "--num-images", 4, "--num-real", 50, "--out", tmp_path / "m.json")
    result = compute(mirrored, *options, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "m.json").read_text())["data"]["real_count"] == 5


def test_metrics_and_flags_of_the_original_are_translated(eg3d_model: Path):
    assert "here: fid with --num-images 50000" in refused(eg3d_model, "--metrics", "fid50k_full")
    assert "here: precision_recall with" in refused(eg3d_model, "--metrics", "pr50k3_full")
    assert "MODEL is the first argument" in refused("--network", eg3d_model)
    assert "--psi" in refused(eg3d_model, "--psi", "nan")
