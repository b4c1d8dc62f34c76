"""Encoder features, the third array of a set: as they are loaded, extracted, converted and checked."""

import numpy as np
import pytest
from support.feature_sets import add_encoder, dataset, everything, load, sampler, write_set

from objectives import make_batch


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A set of 40 pairs with twins and encoder features `(4, 6)`: its folder, the features, those of the twins."""
    folder = tmp_path_factory.mktemp("pairs")
    latents, mirrored = write_set(folder, flip=True)
    return folder, np.stack([latents, mirrored]), np.stack(add_encoder(folder, flip=True))


def test_each_latent_comes_with_the_features_of_its_image_or_of_its_mirror_image(pairs):
    folder, rows, features = pairs
    data = dataset(folder, flip=True, encoder_features=True)
    latents, labels, found = everything(data, np.arange(100, 140))
    twin = (latents == rows[1]).all(axis=(1, 2, 3)).astype(int)
    assert 0 < twin.sum() < 40 and found.dtype == np.float16
    assert (found == features[twin, np.arange(40)]).all() and (labels == np.arange(40) % 10).all()
    plain = dataset(folder, flip=True)
    assert plain.encoder is None and all(map(np.array_equal, everything(plain, np.arange(100, 140)), (latents, labels)))
    assert (data[-1][2] == features[0, -1]).all()
    batch = make_batch(everything(data))
    assert (batch.extras["features"] == features[0]).all() and make_batch(everything(plain)).extras == {}


def test_parts_of_a_set_keep_rows_and_features_together(pairs):
    folder, rows, features = pairs
    data = dataset(folder, flip=True, encoder_features=True)
    train, held_out = data.subset([3, 4]).split(2)
    for part in (train, held_out, train.in_memory()):
        latents, _, found = everything(part, np.arange(len(part)))
        place = [np.argwhere((rows == latent).all(axis=(2, 3, 4)))[0] for latent in latents]
        assert (found == features[tuple(np.transpose(place))]).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_passes_them_on(num_workers, pairs, monkeypatch):
    data = dataset(pairs[0], flip=True, encoder_features=True)
    monkeypatch.setattr("features.loader.free_shared_memory", lambda: 1 << 30)
    batches = load(data, num_workers)
    whole = [data.read(*each) for each in sampler(data).batches()]
    assert len(batches) == 9 and all(map(np.array_equal, sum(batches, ()), sum(whole, ())))


def test_mistakes_are_one_line_with_the_command(tmp_path):
    write_set(tmp_path, 4, flip=True)
    command = f"tools/extract_features.py --data_path IMAGES --encoder ENCODER --feature_path {tmp_path}"
    with pytest.raises(
        ValueError, match="has no encoder features, the config takes 16 tokens of width 8; make them:"
    ) as e:
        dataset(tmp_path, encoder_features=(16, 8))
    assert f"{command} --name imagenet64 --token_grid 4" in str(e.value)
    add_encoder(tmp_path)
    with pytest.raises(ValueError, match='holds encoder features of 4 tokens of width 6, .* write "width": 6 in its'):
        dataset(tmp_path, encoder_features=(4, 8))
    with pytest.raises(ValueError, match="make others: .* --token_grid 4 --replace_encoder"):
        dataset(tmp_path, encoder_features=(16, 6))
    with pytest.raises(
        ValueError, match="imagenet64_encoder: has none of the mirrored images; train without: --no_flip"
    ):
        dataset(tmp_path, encoder_features=(4, 6), flip=True)
    (tmp_path / "imagenet64_encoding").mkdir()
    with pytest.raises(ValueError, match="the extraction of encoder features is not finished; run the same command"):
        dataset(tmp_path, encoder_features=True)
    dataset(tmp_path)  # nothing is looked at
