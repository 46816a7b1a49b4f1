"""Data sets from files: folders of images, tables, arrays, Hugging Face data sets on disk, LEAF."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gossamer
from federation import assert_same
from gossamer.errors import ConfigError, DataError, GossamerError
from gossamer.storage.runlog import read_config
from gossamer.workloads import samples
from gossamer.workloads.digests import digest_of
from gossamer.workloads.files import arrays, hugging_face, image_folder, table
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.leaf import LETTERS, leaf
from gossamer.workloads.samples import ArraySource, LazySamples, channel_moments, moments_in_pieces


def save_images(folder: Path, sizes: tuple[int, ...] = (6,), count: int = 10) -> None:
    """Write `count` images of each of two classes, alternating between sizes."""
    from PIL import Image

    source = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shape = (sizes[number % len(sizes)], 6, 3)
            pixels = source.normal(60 if name == "cat" else 190, 20, shape).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")


def train(data: Any, directory: Path, **changes: Any) -> gossamer.Run:
    given = {
        "rounds": 2,
        "clients": {"num": 3, "per_round": 2},
        "train": {"lr": 0.1},
        "engine": {"workers": 0},
    } | changes
    return gossamer.run(data=data, out=directory, **{"model": "softmax"} | given)


class TestImageFolder:
    def test_splits_and_classes(self, tmp_path: Path) -> None:
        save_images(tmp_path / "both" / "train")
        save_images(tmp_path / "both" / "test", count=2)
        data = image_folder({"path": str(tmp_path / "both")})
        assert tuple(data.train_images.shape) == (20, 3, 6, 6)
        assert data.train_labels.tolist() == [0] * 10 + [1] * 10
        assert data.test_labels.tolist() == [0, 0, 1, 1]
        save_images(tmp_path / "one", sizes=(6, 7))
        data = image_folder({"path": str(tmp_path / "one"), "size": 4, "mode": "L", "test_share": 0.3})
        assert tuple(data.train_images.shape) == (14, 1, 4, 4)
        assert data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
        images = data.train_images
        assert isinstance(images, Tensor)
        assert data.mean == pytest.approx((float(images.float().mean()),))

    def test_read_while_training_gives_the_same_bits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_images(tmp_path / "images")
        data = {"name": "image-folder", "path": str(tmp_path / "images")}
        whole = train(data, tmp_path / "whole")
        monkeypatch.setattr(samples, "SMALL_BYTES", 100)
        assert image_folder({"path": str(tmp_path / "images")}).is_lazy
        lazily = train(data, tmp_path / "lazily", on_round=lambda record: record["round"] == 1)
        assert_same(whole, gossamer.resume(lazily.directory, overrides=["engine.workers=2"]))
        (tmp_path / "images" / "cat" / "00.png").write_bytes((tmp_path / "images" / "cat" / "01.png").read_bytes())
        short = train(data, tmp_path / "short", on_round=lambda record: True)
        (tmp_path / "images" / "cat" / "00.png").write_bytes((tmp_path / "images" / "dog" / "01.png").read_bytes())
        with pytest.raises(GossamerError, match="the data, or their partition, are not those"):
            gossamer.resume(short.directory)

    def test_paths_are_relative_to_the_working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_images(tmp_path / "images")
        monkeypatch.chdir(tmp_path)
        run = train({"name": "image-folder", "path": "images"}, tmp_path / "run")
        assert read_config(run.directory)["workload"]["dataset"]["path"] == str(tmp_path / "images")

    @pytest.mark.parametrize(
        ("spoil", "options", "sentence"),
        [
            (lambda root: None, {"path": "nowhere"}, "'nowhere' is no folder"),
            (lambda root: (root / "cat" / "00.png").write_bytes(b"?"), {}, r"image '.*00\.png' is not an image"),
            (lambda root: save_images(root / "x", (5,)), {}, "holds no images"),
            (lambda root: (root / "cat").rename(root / "train"), {}, "'.*train' holds no folders"),
        ],
    )
    def test_what_is_refused(
        self, tmp_path: Path, spoil: Callable[[Path], Any], options: dict[str, Any], sentence: str
    ) -> None:
        save_images(tmp_path / "images")
        spoil(tmp_path / "images")
        if "train" in sentence:
            (tmp_path / "images" / "test").mkdir()
        if "no images" in sentence:
            for path in (tmp_path / "images").glob("*/*.png"):
                path.unlink()
        with pytest.raises(DataError, match=sentence):
            image_folder({"path": str(tmp_path / "images")} | options)

    def test_unequal_sizes(self, tmp_path: Path) -> None:
        save_images(tmp_path / "images", sizes=(6, 7))
        with pytest.raises(DataError, match=r"has 7 x 6 pixels, but others 6 x 6: give workload\.dataset\.size"):
            image_folder({"path": str(tmp_path / "images")})


class TestTable:
    ROWS = "height,label,weight\n" + "\n".join(f"{i},{'ab'[i % 2]},{-i / 2}" for i in range(20))

    def test_features_are_standardised_and_classes_in_order(self, tmp_path: Path) -> None:
        (tmp_path / "table.csv").write_text(self.ROWS)
        data = table({"path": str(tmp_path / "table.csv")})
        assert (len(data.train_labels), len(data.test_labels), data.shape, data.num_labels) == (16, 4, (2,), 2)
        made = ImageClassification(
            {"dataset": {"name": "table", "path": str(tmp_path / "table.csv")}, "model": "softmax"},
            num_clients=2, partition="iid", seed=0,
        )  # fmt: skip
        x = made.batch(np.arange(2), np.tile(np.arange(8), (2, 1))).samples["x"].view(16, 2)
        assert torch.allclose(x.mean(0), torch.zeros(2), atol=1e-6)
        assert torch.allclose(x.std(0, correction=0), torch.ones(2), atol=1e-6)
        (tmp_path / "test.csv").write_text("height,label,weight\n1,b,2\n")
        given = table({"path": str(tmp_path / "table.csv"), "test_path": str(tmp_path / "test.csv")})
        assert (given.test_labels.tolist(), len(given.train_labels)) == ([1], 20)

    def test_classes_that_are_numbers(self, tmp_path: Path) -> None:
        (tmp_path / "table.csv").write_text("x,y\n" + "\n".join(f"{i},{i % 3 * 9}" for i in range(30)))
        data = table({"path": str(tmp_path / "table.csv"), "label": "y"})
        assert isinstance(data.train_images, Tensor)
        assert (data.train_images[:, 0] % 3 == data.train_labels).all()

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("height,label\n1,a\nx,b\n", r"line 3 of .* has 'x' in the column 'height': give numbers alone"),
            ("height,label\n1,a\n1\n", "line 3 of .* has 1 values for 2 columns"),
            ("height;label\n1;a\n", "has one column, 'height;label': separate columns by commas"),
            ("height,class\n1,a\n", r"has the columns \['height', 'class'\] and 1 rows: give the name of its column"),
            ("label\na\n", "has no column besides 'label'"),
            ("height,label\nnan,a\n2,b\n", "not finite"),
            ("", r"has the columns \[\] and 0 rows"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, text: str, sentence: str) -> None:
        (tmp_path / "table.csv").write_text(text)
        with pytest.raises(DataError, match=sentence):
            table({"path": str(tmp_path / "table.csv")})
        with pytest.raises(DataError, match="No such file"):
            table({"path": str(tmp_path / "nothing.csv")})


class TestArrays:
    def test_an_archive_and_a_folder_read_while_training(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = np.random.default_rng(0)
        made = {name: source.integers(0, 255, (n, 1, 4, 4), np.uint8) for name, n in (("x_train", 30), ("x_test", 10))}
        made |= {"y_train": np.arange(30) % 3, "y_test": np.arange(10) % 3}
        np.savez(tmp_path / "all.npz", **made)
        (tmp_path / "all").mkdir()
        for name, array in made.items():
            np.save(tmp_path / "all" / f"{name}.npy", array, allow_pickle=False)
        whole = train({"name": "arrays", "path": str(tmp_path / "all.npz")}, tmp_path / "whole")
        monkeypatch.setattr(samples, "SMALL_BYTES", 100)
        data = arrays({"path": str(tmp_path / "all")})
        assert isinstance(data.train_images, LazySamples)
        assert isinstance(data.train_images.source, ArraySource)
        lazy = {"name": "arrays", "path": str(tmp_path / "all")}
        assert_same(whole, train(lazy, tmp_path / "lazy"))
        held_out = train(lazy, tmp_path / "held-out", workload={"validation": 0.2})
        assert "validation_accuracy" in held_out.metrics[-1]
        before = digest_of(data)
        made["x_train"][7, 0, 1, 1] ^= 1
        np.save(tmp_path / "all" / "x_train.npy", made["x_train"], allow_pickle=False)
        assert digest_of(arrays({"path": str(tmp_path / "all")})) != before

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [("nothing.npz", "No such file"), ("text.npz", "no file of NumPy's"), ("few.npz", "has no array 'x_train'")],
    )
    def test_what_is_refused(self, tmp_path: Path, name: str, sentence: str) -> None:
        (tmp_path / "text.npz").write_text("text")
        np.savez(tmp_path / "few.npz", x=np.zeros(3))
        with pytest.raises(DataError, match=sentence):
            arrays({"path": str(tmp_path / name)})

    def test_moments_in_pieces_are_those_of_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = torch.randn(100, 3, 5, generator=torch.Generator().manual_seed(0)) * 3 + 100
        mean, std = channel_moments(values)
        monkeypatch.setattr(samples, "SMALL_BYTES", 0)
        monkeypatch.setattr(samples, "PIECE_BYTES", 500)
        in_pieces = channel_moments(values)
        assert in_pieces[0] == pytest.approx(mean, rel=1e-12)
        assert in_pieces[1] == pytest.approx(std, rel=1e-12)
        assert in_pieces != (mean, std)  # so that this is another way


def test_moments_do_not_depend_on_the_number_of_threads() -> None:
    values, threads = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    found = set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found |= {channel_moments(values), moments_in_pieces(values)}
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1  # a single piece


def test_a_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    source = np.random.default_rng(0)
    columns = {"x": source.normal(size=(20, 3)).tolist(), "label": [0, 1] * 10, "note": ["a"] * 20}
    one = datasets.Dataset.from_dict(columns)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "saved"))
    data = hugging_face({"path": str(tmp_path / "saved"), "sample": "x", "label": "label"})
    assert (data.shape, len(data.test_labels), data.name) == ((3,), 20, "saved")
    with pytest.raises(DataError, match=r"item 0 of the training data is a dict: give a pair"):
        hugging_face({"path": str(tmp_path / "saved")})
    with pytest.raises(ConfigError, match=r"Column .*'y'"):
        hugging_face({"path": str(tmp_path / "saved"), "sample": "y", "label": "label"})
    with pytest.raises(DataError, match="cannot read the data set"):
        hugging_face({"path": str(tmp_path)})
    saved = {"name": "hugging-face", "path": str(tmp_path / "saved"), "sample": "x", "label": "label"}
    whole = train(saved, tmp_path / "whole")
    monkeypatch.setattr(samples, "SMALL_BYTES", 100)
    assert hugging_face({name: value for name, value in saved.items() if name != "name"}).is_lazy
    assert_same(whole, train(saved, tmp_path / "lazily"))


def save_leaf(root: Path, users: dict[str, tuple[Any, Any]]) -> None:
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
        text = {"users": list(users), "num_samples": [len(y) for _, y in users.values()], "user_data": data}
        (root / split / "all_data.json").write_text(json.dumps(text))


def tweets(user: str, *texts: str) -> list[list[str]]:
    """Return samples as LEAF's ``data/sent140/preprocess`` writes them: a row of Sentiment140 without its polarity."""
    when, number = "Mon Apr 06 22:19:45 PDT 2009", 1467810369
    return [[str(number + i), when, "NO_QUERY", user, text, "training"] for i, text in enumerate(texts)]


class Counting(nn.Module):
    """A bag of words, whose parameter `num_tokens` is filled in."""

    def __init__(self, num_tokens: int, num_classes: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(num_tokens, num_classes, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.bag(x)
        return logits


class TestLeaf:
    def test_each_client_has_its_own_test_data(self, tmp_path: Path) -> None:
        """Client 1 is tested on its own four samples, of which a model that always says 0 gets one right."""
        x = np.random.default_rng(0).random((4, 784)).tolist()
        save_leaf(tmp_path, {"b": (x, [0, 1, 2, 3]), "a": (x[:2], [0, 0]), "c": ([], [])})
        data = leaf({"path": str(tmp_path)})
        assert (data.num_labels, data.shape) == (62, (1, 28, 28))
        assert data.owner is not None
        assert data.owner.tolist() == [0, 0, 1, 1, 1, 1]
        made = ImageClassification(
            {"dataset": {"name": "leaf", "path": str(tmp_path)}, "model": "softmax"},
            num_clients=2, partition="natural-id", seed=0,
        )  # fmt: skip
        params = {"output.weight": torch.zeros(62, 784), "output.bias": -torch.arange(62.0)}
        found = made.metrics(made.evaluate(params, {}, 0))
        assert found["local_accuracy"] == pytest.approx((1 + 1 / 4) / 2)
        assert found["worst_client_accuracy"] == pytest.approx(1 / 4)
        assert found["accuracy"] == pytest.approx(3 / 6)
        run = train({"name": "leaf", "path": str(tmp_path)}, tmp_path / "run",
                    clients={"num": 2, "per_round": 2, "partition": "natural-id"},
                    workload={"validation": 0.4})  # fmt: skip
        assert "validation_local_accuracy" in run.metrics[-1]

    def test_letters(self, tmp_path: Path) -> None:
        save_leaf(tmp_path, {"romeo": (["to be or ", "not to be"], ["n", "!"]), "julia": (["o romeo, "], ["r"])})
        data = leaf({"path": str(tmp_path), "num_users": 1})
        assert data.train_labels.tolist() == [LETTERS.index("r")]
        model = nn.Sequential(nn.Embedding(80, 2), nn.Flatten(), nn.Linear(18, 80))
        clients = {"num": 2, "per_round": 2, "partition": "natural-id"}
        run = train({"name": "leaf", "path": str(tmp_path)}, tmp_path / "run", model=model, clients=clients)
        assert len(run.metrics) == 2

    def test_words_of_tweets(self, tmp_path: Path) -> None:
        """Tokens: 2 is ``!`` (four times), 3 and 4 are the words that occur twice; ``go`` is beyond the five."""
        users = {"bob": (tweets("bob", "Good good! go"), [1]), "al": (tweets("al", "it's !!! it's bad"), [0])}
        save_leaf(tmp_path, users)
        data = leaf({"path": str(tmp_path), "max_words": 5, "num_tokens": 5})
        assert isinstance(data.train_images, Tensor)
        assert data.train_images.tolist() == [[4, 2, 2, 2, 4], [3, 3, 2, 1, 0]]
        assert (data.train_labels.tolist(), data.num_labels, data.num_tokens) == ([0, 1], 2, 5)
        save_leaf(tmp_path / "raw", {"al": (tweets("al", "a", "b", "c"), ["0", 2, 4])})
        assert leaf({"path": str(tmp_path / "raw")}).train_labels.tolist() == [0, 0, 1]

    @pytest.mark.parametrize("model", ["transformer", Counting])
    def test_tweets_are_learnt(self, tmp_path: Path, model: Any) -> None:
        happy, sad = ("so good", "what a good day", "good!"), ("so bad", "what a bad day", "bad!")
        save_leaf(tmp_path / "tweets", {user: (tweets(user, *happy, *sad), [1, 1, 1, 0, 0, 0]) for user in "abc"})
        if model == "transformer":
            model = {"name": "transformer", "stream": 8, "num_heads": 2, "num_blocks": 1, "hidden": 8}
        run = train({"name": "leaf", "path": str(tmp_path / "tweets"), "max_words": 6}, tmp_path / "run", model=model,
                    clients={"num": 3, "per_round": 3, "partition": "natural-id"}, rounds=20, algorithm="fedavg",
                    train={"lr": 0.3, "batch_size": 6}, evaluation={"every": 20})  # fmt: skip
        assert run.metrics[-1]["local_accuracy"] == 1.0
        assert run.params[next(name for name in run.params if name in ("embedding.weight", "bag.weight"))].shape[0] == 9

    @pytest.mark.parametrize(
        ("users", "sentence"),
        [
            ({"a": ([["id", "a tweet"]], [1])}, "nor texts as of Shakespeare or Sent140"),
            ({"a": ([*tweets("a", "fine"), [7] * 6], [1, 0])}, r"the sample \[7, .*, whose entry 4 is no text"),
            ({"a": (tweets("a", "fine"), [3])}, "the label 3 of a tweet: give 0 or 1"),
            ({"a": (["ß"], ["a"])}, "another letter than LEAF's 80"),
            ({"a": ([[1.0]], [1, 2])}, "has 1 samples but 2 labels"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, users: dict[str, Any], sentence: str) -> None:
        save_leaf(tmp_path / "leaf", users)
        with pytest.raises(DataError, match=sentence):
            leaf({"path": str(tmp_path / "leaf")})
        with pytest.raises(DataError, match=r"holds no \.json files"):
            leaf({"path": str(tmp_path)})
        with pytest.raises(DataError, match="exceeds the 1 users"):
            leaf({"path": str(tmp_path / "leaf"), "num_users": 9})


def test_images_of_a_model_that_needs_them(tmp_path: Path) -> None:
    features = (np.zeros((20, 3)), np.arange(20) % 2)
    with pytest.raises(ConfigError, match=r"is for images .*, but samples have the shape \(3,\)"):
        train(features, tmp_path / "a", model="cnn")
    with pytest.raises(ConfigError, match="'crop-flip' is for images"):
        train(features, tmp_path / "b", workload={"augment": "crop-flip"})
    tokens = (np.ones((20, 3), np.int64), np.arange(20) % 2)
    with pytest.raises(ConfigError, match="takes no samples of whole numbers: take transformer"):
        train(tokens, tmp_path / "c")
    with pytest.raises(ConfigError, match=r"'transformer' is for tokens, .* shape \(3,\) are none"):
        train(features, tmp_path / "d", model="transformer")
    with pytest.raises(ConfigError, match="num_tokens = 1, but the data have 2 tokens: raise it"):
        train(tokens, tmp_path / "e", model={"name": "transformer", "num_tokens": 1})
