"""Labelled image grids: what touches what, names that a font has and those that none has."""

import numpy as np
import pytest
from PIL import Image

from sampling import fonts
from sampling.grid import class_grid, class_labels, make_grid

RED = np.full([8, 8, 3], (255, 0, 0), "uint8")


@pytest.fixture
def no_system_fonts(monkeypatch):
    """Only Pillow's own font is there."""
    monkeypatch.setattr(fonts, "_files", lambda: [])
    fonts._font_of.cache_clear()
    yield
    fonts._font_of.cache_clear()


def red_boxes(picture):
    """Counts the images, by their corners, and lists the columns where they begin."""
    pixels = np.asarray(picture)
    is_red = (pixels == (255, 0, 0)).all(axis=-1)
    corners = is_red & ~np.roll(is_red, 1, axis=0) & ~np.roll(is_red, 1, axis=1)
    return corners.sum(), sorted({*np.nonzero(corners)[1].tolist()})


def has_text(pixels):
    return bool((pixels.max(axis=-1) < 100).any())  # black on white, and red is neither


def test_a_gap_is_white_and_an_empty_place_too():
    picture = make_grid([Image.fromarray(RED), None, Image.fromarray(RED)], 2, gap=3)
    assert picture.size == (3 * 3 + 16, 3 * 3 + 16) and not has_text(np.asarray(picture))
    assert red_boxes(picture) == (2, [3])
    assert np.array_equal(np.asarray(make_grid(np.stack([RED] * 3), 2))[8:, 8:], np.zeros([8, 8, 3]))  # plain: black


def test_one_row_a_class_with_its_name_at_the_left(no_system_fonts):
    rows = np.stack([RED] * 6)
    picture = class_grid(rows, [3, 7], {3: "cat, tom", 7: "x" * 500}, 3)
    count, lefts = red_boxes(picture)
    pixels = np.asarray(picture)
    assert count == 6 and len(lefts) == 3 and picture.width < 400  # a long name is cut
    for half in np.array_split(pixels, 2):
        assert has_text(half[:, : lefts[0]]) and not has_text(half[:, lefts[0] :])
    above = class_grid(rows, range(6), {}, 1)  # one image a class: the names above them
    assert red_boxes(above)[0] == 6 and above.width > above.height and has_text(np.asarray(above)[:12])


def test_a_number_of_labels_that_does_not_fit():
    with pytest.raises(ValueError, match="3 row_labels: expected 2"):
        make_grid(np.stack([RED] * 4), 2, row_labels=["a", "b", "c"])


def test_names_that_no_font_has_show_the_class_id(no_system_fonts):
    labels = {0: "cat, tom", 1: "\u7b11\u8138", 2: "my \u8138", 4: "what?", 5: " "}
    assert class_labels(range(6), labels) == ["cat", "class 1", "2: my ?", "class 3", "what?", "class 5"]


@pytest.mark.skipif(not any("cjk" in path.lower() for path in fonts._files()), reason="no CJK font here")
def test_chinese_names_where_a_font_has_them():
    assert class_labels([0], {0: "\u7b11\u8138"}) == ["\u7b11\u8138"]
    (one, other) = (np.asarray(make_grid(RED[None], 1, row_labels=[name])) for name in ("\u7b11\u8138", "\u8138\u7b11"))
    assert has_text(one[:, :30]) and not np.array_equal(one, other)  # boxes would be the same
