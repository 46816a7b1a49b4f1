"""NLVR: sentences and images of small files, and of the real ones; what is refused."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.errors import ConfigError, DataError
from gossamer.workloads.multimodal.nlvr import nlvr
from gossamer.workloads.samples import LazySamples
from media import write_nlvr

needs_data = pytest.mark.skipif(
    not os.environ.get("GOSSAMER_DATA"), reason="GOSSAMER_DATA does not name a folder with nlvr"
)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_nlvr(tmp_path)
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path))
    return tmp_path / "nlvr"


def test_every_image_keeps_its_sentence(made: Path) -> None:
    data = nlvr({"height": 5, "width": 20, "length": 8})
    train, test = data.train, data.test
    assert train.modalities == ("image", "text")
    assert train.labels.tolist() == [0] * 6 + [1] * 6 + [0] * 6
    assert train.owner is not None
    assert train.owner.tolist() == [0] * 6 + [1] * 6 + [0] * 6
    images = train.samples["image"]
    assert isinstance(images, LazySamples)
    assert images.shape == (18, 3, 5, 20)
    reds = [colour + order for colour in (0, 10, 200) for order in range(6)]
    assert images[:][:, 0, 0, 0].tolist() == reds
    assert images[torch.tensor([17, 3])][:, 0, 2, 7].tolist() == [205, 3]
    text = train.samples["text"][:]
    assert torch.equal(text[0], text[5])
    assert not torch.equal(text[5], text[6])
    assert test.samples["image"][:][:, 0, 0, 0].tolist() == [100 + order for order in range(6)]
    assert train.present.all()


def test_fewer_images_and_other_files(made: Path) -> None:
    data = nlvr({"images": 2, "train": ["test"], "test": ["dev", "hidden"]})
    assert len(data.train.labels) == 2
    assert data.test.samples["image"][:][:, 0, 0, 0].tolist() == [0, 1, 10, 11, 200, 201]


def test_a_child_process_reads_its_own_file(made: Path) -> None:
    """Parent and child would move each other's place in a file that they share."""
    images = nlvr({}).train.samples["image"]
    first = images[:2]
    if (child := os.fork()) == 0:
        os._exit(0 if all(torch.equal(images[:2], first) for _ in range(50)) else 1)
    same = all(torch.equal(images[:2], first) for _ in range(50))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same


def test_the_digest_follows_the_files(made: Path) -> None:
    def digest() -> str:
        images = nlvr({}).train.samples["image"]
        assert isinstance(images, LazySamples)
        return images.digest

    before = digest()
    assert before == digest()
    with zipfile.ZipFile(made / "nlvr_images.zip", "a") as images:
        images.writestr("note", "changed")
    assert digest() != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 of .*dev.jsonl' is no sentence of NLVR \(JSONDecodeError"),
        ('{"identifier": "0-1", "label": "true"}', r"line 2 of .*\(KeyError: 'sentence'\)"),
        ('{"identifier": "0-1", "sentence": "a", "label": "maybe"}', r"line 2 of .*\(KeyError: 'maybe'\)"),
        (
            '{"identifier": "9-1", "sentence": "a", "label": "true"}',
            r"line 2 of .* has an image 'dev-9-1-0.png', which",
        ),
    ],
)
def test_wrong_lines_are_refused(made: Path, line: str, message: str) -> None:
    path = made / "dev.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n" + line)
    with pytest.raises(DataError, match=message):
        nlvr({})


def test_wrong_files_are_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'dev' in train and in test"):
        nlvr({"test": ["dev"]})
    with pytest.raises(ConfigError, match=r"train.0 = 'val': input should be 'dev', 'test' or 'hidden'"):
        nlvr({"train": ["val"]})
    (made / "hidden.jsonl").write_text("")
    with pytest.raises(DataError, match=r"hidden.jsonl' holds no sentences"):
        nlvr({})
    images = nlvr({"train": ["dev"]}).train.samples["image"]
    content = (made / "nlvr_images.zip").read_bytes()
    (made / "nlvr_images.zip").write_bytes(content[:200] + b"\0" * 400 + content[600:])
    with pytest.raises(DataError, match=r"cannot read 'dev-0-1-\d.png' from|is not an image"):
        images[:6]
    (made / "nlvr_images.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"nlvr_images.zip' as a zip file"):
        nlvr({"train": ["dev"]})
    monkeypatch.delenv("GOSSAMER_DATA")
    with pytest.raises(DataError, match=r"set GOSSAMER_DATA"):
        nlvr({})


@needs_data
def test_the_real_files() -> None:
    data = nlvr({})
    assert (len(data.train.labels), len(data.test.labels)) == (6 * (989 + 985), 6 * 990)
    assert 0.4 < data.test.labels.double().mean() < 0.6
    images = data.train.samples["image"]
    assert images.shape == (11844, 3, 50, 200)
    few = images[torch.tensor([0, 5, 11843])]
    assert np.ptp(few.numpy()) == 255 or few.max() > 200
    text = data.train.samples["text"][:]
    unknown = (data.test.samples["text"][:] == 1).sum() / (data.test.samples["text"][:] > 0).sum()
    assert unknown < 0.02
    assert (text[:, -1] == 0).double().mean() > 0.99
