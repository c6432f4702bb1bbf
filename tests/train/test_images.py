"""Training on images: reading rows, views, and networks that learn scikit-learn's digits."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import surgery
from surgery.api.programs import TrainingError
from surgery.train.data_context import Setting
from surgery.train.images import Images, views
from surgery.train.objectives import Classification, Contrastive, Distill
from tests.train.conftest import prepared
from tests.train.test_loop import fit


class Net(nn.Module):
    def __init__(self, width: int = 16, classes: int | None = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(), nn.Flatten(), nn.Linear(2 * width * 16, 32),
        )  # fmt: skip
        self.head = nn.Linear(32, classes) if classes else nn.Identity()

    def forward(self, image):
        return self.head(F.relu(self.body(image)))


class Taller(Net):
    def forward(self, image):
        return super().forward(image[..., :8])


def program(**options):
    torch.manual_seed(0)
    net = surgery.capture(Net(**options), (torch.rand(2, 1, 8, 8),), {"image": {0: "batch"}})
    return net.apply(surgery.Full())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """600 images of 8 × 8 as a Parquet file of PNGs, as `datasets` writes it."""
    images, labels = load_digits(return_X_y=True)
    pictures = [Image.fromarray((each.reshape(8, 8) * 15).astype(np.uint8)) for each in images[:600]]
    path = tmp_path_factory.mktemp("digits") / "digits.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": pictures, "label": labels[:600].tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def test_what_is_read_of_a_row(tmp_path):
    reader = Images("image", 3, 2, 2, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    whole = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    Image.fromarray(whole).save(tmp_path / "a.png")
    same = [
        whole, whole.tolist(), whole.transpose(2, 0, 1), (whole / 255).tolist(), Image.fromarray(whole),
        str(tmp_path / "a.png"),
    ]  # fmt: skip
    read = [reader.read(value, "image") for value in same]
    assert set(read) == {whole.transpose(2, 0, 1).tobytes()}
    wanted = (torch.tensor(whole).permute(2, 0, 1).float() / 255 - 0.5) / 0.25
    assert torch.equal(reader.inputs(reader.pixels(read[:2]))["image"], torch.stack([wanted, wanted]))
    grey = np.full((6, 4), 100, dtype=np.uint8)
    assert reader.read(grey, "image") == bytes([100] * 12)
    for value, said in (
        ("nowhere.png", "cannot be read as an image"),
        (np.zeros((2, 2, 2), dtype=np.uint8), r"numbers of shape \[2, 2, 2\]"),
        (np.full((2, 2), 300), "pixels from 300 to 300"),
        (np.full((2, 2), -1.5), "pixels from -1.5"),
        ({"a": 1}, "which is not an image"),
    ):
        with pytest.raises(TrainingError, match=said):
            reader.read(value, "image")


def test_a_folder_of_images(tmp_path):
    """One folder for each class, as `datasets` reads it: labels are numbered by the folders' names."""
    for label, shade in (("dark", 10), ("light", 200)):
        (tmp_path / label).mkdir()
        for number in range(2):
            Image.fromarray(np.full((5, 7), shade, dtype=np.uint8)).save(tmp_path / label / f"{number}.png")
    examples, setting = prepared(program(), Classification(), tmp_path)
    batch = Classification().collate(examples[range(4)], setting, torch.Generator())
    shades = batch["inputs"]["image"].mean((1, 2, 3))
    assert torch.equal(batch["labels"], (shades > 0.5).long())
    assert batch["labels"].tolist().count(0) == 2


def test_how_models_take_images():
    plain = Setting.of(program())
    assert plain.images == Images("image", 1, 8, 8, (0.0,), (1.0,))
    timm = Setting.of(surgery.load("timm:resnet18", random=True)).images
    assert (timm.channels, timm.height) == (3, 224)
    assert timm.mean == (0.485, 0.456, 0.406)  # ImageNet's, which timm writes into its configuration


def test_views_are_other_views_of_the_same():
    def draw():
        return torch.Generator().manual_seed(0)

    images = torch.rand(64, 3, 16, 16, generator=draw())
    seen = views(images, draw())
    assert torch.equal(seen, views(images, draw()))
    assert seen.shape == images.shape
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
    moved = (seen - images).abs().mean((1, 2, 3))
    assert float(moved.min()) > 0.05
    # What does not depend on place, or on light, is kept: an image of one colour is of one colour.
    flat = views(torch.full((8, 1, 6, 6), 0.5), draw())
    assert float((flat - flat.mean((2, 3), keepdim=True)).abs().max()) < 1e-6


def test_simclr_is_nt_xent(digits):
    objective = Contrastive(loss="simclr", temperature=0.5)
    net = program(classes=None)
    examples, setting = prepared(net, objective, digits)
    first = examples[range(6)]
    batch = objective.collate([*first, first[0]], setting, torch.Generator().manual_seed(1))
    assert batch["inputs"]["image"].shape == (14, 1, 8, 8)
    with torch.no_grad():
        found = float(objective.loss(net.module(), batch))
        vectors = F.normalize(net.module()(batch["inputs"]["image"]), dim=1)
    similar, terms = (vectors @ vectors.T / 0.5).exp().double(), []
    for i in range(14):
        partner = (i + 7) % 14
        equal = {0, 6, 7, 13}  # the views of one image that is there twice
        negatives = [j for j in range(14) if j not in (i, partner) and not (i in equal and j in equal)]
        terms.append(-torch.log(similar[i, partner] / (similar[i, partner] + similar[i, negatives].sum())))
    # fp32 against fp64.
    assert found == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)


def test_a_network_learns_without_labels(digits, tmp_path):
    """On held-out images, the nearest of 400 has the same digit more often than before training."""
    images, labels = load_digits(return_X_y=True)
    pixels, labels = torch.tensor(images / 16 * (240 / 255)).float().view(-1, 1, 8, 8), torch.tensor(labels)

    def precision(net):
        with torch.no_grad():
            vectors = F.normalize(net.module()(pixels), dim=1)
        nearest = (vectors[1000:] @ vectors[:400].T).argmax(1)
        return float((labels[nearest] == labels[1000:]).float().mean())

    net = program(classes=None)
    before = precision(net)
    result = fit(
        net,
        Contrastive(loss="simclr", temperature=0.2, crop=0.7, keep_sides=True),
        digits,
        tmp_path,
        steps=150,
        batch=64,
        lr=3e-3,
    )
    assert result.metrics["mrr"] > result.before["mrr"] + 0.1
    assert precision(net) > before


def test_a_student_learns_classes_and_from_a_teacher(digits, tmp_path):
    teacher = program()
    result = fit(teacher, Classification(), digits, tmp_path / "a", steps=120, batch=32, lr=3e-3)
    assert result.metrics["accuracy"] > 0.85
    student = program(width=4)
    taught = Distill(teacher="the network before", of="classification", alpha=1.0).taught_by(teacher)
    result = fit(student, taught, digits, tmp_path / "b", steps=120, batch=32, lr=3e-3)
    assert result.metrics["agreement"] > result.before["agreement"] + 0.3
    taller = surgery.capture(Taller(), (torch.rand(2, 1, 8, 12),), {"image": {0: "batch"}})
    with pytest.raises(TrainingError, match="the teacher's image format differs"):
        fit(taller.apply(surgery.Full()), taught, digits, tmp_path / "c", steps=1)


class Normed(Net):
    """A network whose norm keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(1, nn.BatchNorm2d(16))


@pytest.mark.parametrize("trained", [False, True])
def test_a_pruned_network_with_batch_norm_trains(trained, digits, tmp_path):
    """The replaced weights and running statistics are no part of the training, of a base or of a trained program."""
    torch.manual_seed(0)
    net = surgery.capture(Normed(), (torch.rand(2, 1, 8, 8),), {"image": {0: "batch"}})
    if trained:
        fit(net, Classification(), digits, tmp_path / "first", steps=2)
    net = net.apply(surgery.PruneFilters(target="body.0", ratio=0.5))
    means = (
        net.module().get_buffer(next(n for n, b in net.module().named_buffers() if b.shape == (8,))).clone()
    )
    result = fit(net, Classification(), digits, tmp_path / "run", batch=16, steps=30)
    assert result.metrics["loss"] < result.before["loss"]
    now = [b for _, b in net.module().named_buffers() if b.shape == (8,)]
    assert len(now) == 2
    assert not torch.equal(now[0], means)


def test_what_is_refused(digits, bert_folder, tmp_path):
    with pytest.raises(TrainingError, match="--loss simclr needs images, but the model takes input_ids"):
        prepared(surgery.load(f"hf:{bert_folder}"), Contrastive(loss="simclr", anchor="label"), digits)
    with pytest.raises(TrainingError, match=r"row 0: column 'label' contains numbers of shape \[\], which"):
        prepared(program(), Classification(text="label", label="label"), digits)
    wide = surgery.capture(nn.Conv2d(5, 2, 1), (torch.rand(2, 5, 4, 4),))
    with pytest.raises(TrainingError, match="the model takes 5 channels, but images have 1 or 3"):
        prepared(wide, Contrastive(loss="simclr"), digits)
