"""features/images.py, features/image_source.py: the official crop, every kind of image, folders, lists, tar files."""

import io
import os
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from support.golden import load_golden

from features.image_source import ImageSource, encodable, open_source
from features.images import center_crop, dim_note, load_pixels, parse_background, see_through_note


def picture(width, height):
    """The pictures of the golden crops."""
    y, x, c = np.ogrid[:height, :width, :3]
    return Image.fromarray(((7 * x + 13 * y + 31 * c + x * y // 5) % 256).astype("uint8"))


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", load_golden("center_crop"))
def test_center_crop_is_the_official_one(case, golden):
    size, width, height = (int(number) for number in case.replace("x", "_").split("_"))
    assert np.array_equal(np.asarray(center_crop(picture(width, height), size)), golden("center_crop")[case])


def test_an_image_too_narrow_to_scale_is_refused():
    with pytest.raises(ValueError, match="1 x 10000 pixels are too narrow to be scaled to a side of 256"):
        center_crop(Image.new("RGB", (1, 10_000)), 256)


def saved(path, image, **options):
    image.save(path, **options)
    return load_pixels(str(path), 8)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_colours_are_read_as_the_official_loader_does(tmp_path):
    """`convert("RGB")`: alpha dropped, not blended; CMYK by the plain formula; EXIF orientation not applied."""
    rgb = picture(12, 8)
    plain = saved(tmp_path / "rgb.png", rgb)
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(np.arange(96, dtype="uint8").reshape(8, 12)))
    assert np.array_equal(saved(tmp_path / "alpha.png", alpha), plain)

    grey = rgb.convert("L")
    assert np.array_equal(saved(tmp_path / "grey.png", grey), saved(tmp_path / "grey.bmp", grey.convert("RGB")))
    assert np.array_equal(saved(tmp_path / "grey_alpha.png", alpha.convert("LA")), saved(tmp_path / "l.png", grey))
    palette = alpha.convert("P")
    assert np.array_equal(saved(tmp_path / "palette.png", palette), saved(tmp_path / "p.png", palette.convert("RGB")))

    ink = np.zeros((8, 8, 4), "uint8")
    ink[..., 0], ink[..., 3] = 255, 51  # cyan, a fifth black
    cmyk = saved(tmp_path / "cmyk.tif", Image.fromarray(ink, "CMYK"))
    assert (cmyk == [0, 204, 204]).all()

    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert np.array_equal(saved(tmp_path / "turned.png", rgb, exif=exif), plain)
    one = saved(tmp_path / "one.png", Image.new("RGB", (1, 1), (1, 2, 3)))
    assert one.shape == (8, 8, 3) and (one == [1, 2, 3]).all()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_transparent_images_are_laid_over_a_background_or_told_of(tmp_path):
    """All ways in which a file is transparent: an alpha channel, of colour or grey, a palette's, a key colour."""
    rgba = Image.new("RGBA", (8, 8), (200, 100, 0, 0))
    rgba.paste((10, 20, 30, 255), (0, 0, 8, 4))
    rgba.putpixel((0, 7), (200, 100, 0, 51))
    palette = rgba.convert("RGB").convert("P", palette=Image.ADAPTIVE)
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((7, 7)))
    rgba.convert("RGB").save(tmp_path / "key.png", transparency=(200, 100, 0))
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(tmp_path / "opaque.png")
    see_through = []
    for path in sorted(tmp_path.iterdir()):
        plain = load_pixels(str(path), 8, see_through=see_through)
        laid = load_pixels(str(path), 8, background=[0, 0, 255])
        assert np.array_equal(laid[:4], plain[:4])
        assert (laid[7, 7] == (plain[7, 7] if path.name == "opaque.png" else [0, 0, 255])).all()
    assert [os.path.basename(path) for path in see_through] == ["key.png", "la.png", "p.png", "rgba.png"]
    assert see_through_note(see_through).startswith("4 images with transparent parts")
    assert (load_pixels(str(tmp_path / "rgba.png"), 8, background=[0, 0, 255])[7, 0] == [40, 20, 204]).all()


def test_background_is_white_black_or_three_numbers():
    assert [*map(parse_background, (None, "white", "black", "1,20,255"))] == [None, [255] * 3, [0] * 3, [1, 20, 255]]
    for text in ("red", "1,2", "1,2,256", "-1,2,3", "#ffffff"):
        with pytest.raises(ValueError, match=f"--background {text}: expected "):
            parse_background(text)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_keeps_its_high_byte(suffix, tmp_path):
    """Pillow's own conversion makes everything above 255 white."""
    high = (np.arange(64).reshape(8, 8) * 4).astype("uint16")
    pixels = saved(tmp_path / f"x.{suffix}", Image.fromarray(high * 256 + 7))
    assert (pixels == high[..., None]).all()


def test_integers_of_a_small_range_are_told_of(tmp_path):
    grey = (np.arange(64).reshape(8, 8) * 4).astype("uint16")
    images = {"u16.png": grey, "i32.tif": grey.astype("int32"), "scan12.tif": grey * 16, "night.png": grey * 17}
    for name, array in images.items():
        Image.fromarray(array).save(tmp_path / name)
    colour = np.repeat(grey.astype(">u2")[..., None], 3, axis=2)
    rows = b"".join(b"\0" + row.tobytes() for row in colour)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "rgb16.png").write_bytes(png)
    Image.fromarray(np.zeros((8, 8), "uint8")).save(tmp_path / "black.png")
    dim = []
    for path in sorted(tmp_path.iterdir()):
        load_pixels(str(path), 8, dim=dim)
    assert [os.path.basename(path) for path in dim] == ["i32.tif", "rgb16.png", "scan12.tif", "u16.png"]
    assert dim_note(dim).startswith("4 images with 16 or 32 bits") and "rgb16.png" in dim_note(dim)


def test_numbers_of_unknown_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="f.tif: cannot be read as an image .32-bit floats"):
        saved(tmp_path / "f.tif", Image.fromarray(np.ones((8, 8), "float32")))
    with pytest.raises(ValueError, match="i.tif: cannot be read as an image .integers outside 0..65535"):
        saved(tmp_path / "i.tif", Image.fromarray(np.full((8, 8), 70_000, "int32")))


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"", "no image format that Pillow knows"),
        (lambda data: b"<html>404</html>", "no image format that Pillow knows"),
    ],
)
def test_what_pillow_cannot_read_is_named_with_a_reason_that_never_changes(spoil, reason, tmp_path):
    picture(300, 200).save(tmp_path / "x.jpg")
    data = spoil((tmp_path / "x.jpg").read_bytes())
    messages = set()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"dir/x.jpg: cannot be read as an image .*{reason}") as error:
            load_pixels("dir/x.jpg", 8, data)
        messages.add(str(error.value))
    assert len(messages) == 1  # it goes to the manifest: no addresses


# ---------------------------------------------------------------------------------------------------------------------
# Folders and lists
# ---------------------------------------------------------------------------------------------------------------------

NAMES = ["cat/a b.png", "cat/b,c.png", "dog/sub/ü.png", "dog/x.png", "鸟/图.png"]


@pytest.fixture
def folder(tmp_path):
    """Five images of three classes, told apart by their first pixel; names with spaces, commas, Chinese."""
    root = tmp_path / "images"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (number, 0, 0)).save(root / name)
    return root


def contents(source):
    """[(name, label, red)] of a source."""
    return [(source.name(i), int(source.labels[i]), int(source.pixels(i, 8)[0, 0, 0])) for i in range(len(source))]


FOLDER = [(name, label, i) for i, (name, label) in enumerate(zip(NAMES, [0, 0, 1, 1, 2], strict=True))]


def test_folder(folder):
    (folder / "ant").mkdir()
    (folder / "cat" / "notes.txt").write_text("")
    (folder / "cat" / ".hidden.png").write_text("")
    source = open_source(str(folder))
    assert contents(source) == [(name, label + 1, red) for name, label, red in FOLDER]
    assert source.classes == ["ant", "cat", "dog", "鸟"] and source.class_counts().tolist() == [0, 2, 2, 1]
    assert source.notes == [
        "left out, no images by their names: 1 file (.txt)",
        "1 of 4 classes have no image but keep their label: ant",
    ]


@pytest.mark.parametrize("made_as", ["folders", "tar of folders", "tar of tars"])
@pytest.mark.parametrize(
    ("names", "classes", "words"),
    [
        (range(12), [*range(12)], "folder 2 is label 2; torchvision's ImageFolder, .* gives it label 4"),
        (range(1, 12), [*range(1, 12)], "numbers are not 0..10: .* folder 1 is label 0"),
        (["7", "100", "20"], ["7", "20", "100"], "folder 7 is label 0"),
        (["00", "01", "10", "02"], ["00", "01", "02", "10"], "not 0..3: .* folder 10 is label 3"),
        (["1" + "0" * 30, "9"], ["9", "1" + "0" * 30], "folder 9 is label 0"),
        ([f"{i:02d}" for i in range(11)], [f"{i:02d}" for i in range(11)], None),
        (["-1", "10", "2"], ["-1", "10", "2"], "as text, .* folder 10 is label 1, before 2"),
        (["٣", "10", "2"], ["10", "2", "٣"], "as text, .* folder 10 is label 0, before 2"),
        (["c2", "c10"], ["c10", "c2"], "as text, .* folder c10 is label 0, before c2"),
        (["n02", "n10", "x1"], ["n02", "n10", "x1"], None),
    ],
)
def test_labels_of_numbered_classes_follow_the_numbers(names, classes, words, made_as, tmp_path):
    for name in names:
        (tmp_path / "images" / str(name)).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / str(name) / "x.png")
    source = open_source(str(tmp_path / "images"))
    if made_as != "folders":
        digest = source.digest()
        with tarfile.open(tmp_path / "all.tar", "w") as tar:
            for name in names:
                if made_as == "tar of folders":
                    tar.add(tmp_path / "images" / str(name), str(name))
                else:
                    image = (tmp_path / "images" / str(name) / "x.png").read_bytes()
                    tar.add(pack(tmp_path / f"{name}.tar", {"x.png": image}), f"{name}.tar")
        source = open_source(str(tmp_path / "all.tar"))
        assert source.digest() == digest
    assert source.classes == [str(name) for name in classes]
    assert [(source.name(i), i) for i in source.labels] == [(f"{name}/x.png", i) for i, name in enumerate(classes)]
    assert re.search(words, " ".join(source.notes)) if words else source.notes == []


def test_two_folders_of_one_number_are_refused(tmp_path):
    for name in ("1", "01", "2"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="class folders 01 and 1 are the same number; rename one"):
        open_source(str(tmp_path))


def test_links_are_followed_and_what_is_left_out_is_said(folder, tmp_path):
    (folder / "cat" / "part").symlink_to(folder / "dog")
    (folder / "ape").symlink_to(folder / "cat")
    (folder / "cat" / "one.png").symlink_to(folder / "dog" / "x.png")
    names = [open_source(str(folder)).name(i) for i in range(13)]
    cat = ["a b.png", "b,c.png", "one.png", "part/sub/ü.png", "part/x.png"]
    assert names == [f"{name}/{file}" for name in ("ape", "cat") for file in cat] + NAMES[2:]
    assert open_source(str(folder)).notes == []

    (folder / "dog" / "sub" / "up").symlink_to(folder)
    (folder / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "lost").symlink_to(tmp_path / "nowhere")
    (folder / "self").symlink_to(folder / "self")
    (folder / "again").symlink_to(folder)
    (folder / "dog" / "above").symlink_to(tmp_path)
    os.mkfifo(folder / "dog" / "pipe.png")
    Image.new("L", (8, 8)).save(folder / "loose.png")
    source = open_source(str(folder))
    assert [source.name(i) for i in range(len(source))] == names
    loose, lost = source.notes
    assert loose == "left out, in no class folder: 1 image (loose.png)"
    assert "left out, links that lead nowhere or back" in lost and "again, " in lost
    assert source.classes == ["ape", "cat", "dog", "鸟"]


def test_a_name_that_is_not_utf8(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", os.fsencode(tmp_path / "cat") + b"/\xff.png")
    ((name, _, red),) = contents(open_source(str(tmp_path)))
    assert red == 9 and encodable(name) == "cat/\\udcff.png"


def test_a_saved_listing_is_the_same_wherever_its_images_move(folder, tmp_path):
    source = open_source(str(folder))
    source.save(tmp_path / "list.npz")
    os.rename(folder, tmp_path / "moved")
    loaded = ImageSource.load(tmp_path / "list.npz", tmp_path / "moved")
    assert contents(loaded) == FOLDER and loaded.classes == source.classes
    assert loaded.digest() == source.digest()


def test_list_of_numbers(folder):
    (folder / "list.csv").write_text('\ufeffpath,label\ndog/x.png,3\ncat/b,c.png,0\n\n"cat/b,c.png", 1\n', "utf-8")
    source = open_source(list_file=str(folder / "list.csv"))
    assert contents(source) == [("dog/x.png", 3, 3), ("cat/b,c.png", 0, 1), ("cat/b,c.png", 1, 1)]
    assert source.classes == ["0", "1", "2", "3"] and "1 of 4 classes have no image" in source.notes[0]


def test_list_of_names_relative_to_data_path(folder, tmp_path):
    absolute = folder / "dog" / "x.png"
    (tmp_path / "list.txt").write_text(f"鸟/图.png,鸟 too\n{absolute},a dog\ncat/a b.png,a dog")
    source = open_source(str(folder), str(tmp_path / "list.txt"))
    assert contents(source) == [("鸟/图.png", 1, 4), (str(absolute), 0, 3), ("cat/a b.png", 0, 0)]
    assert source.classes == ["a dog", "鸟 too"]


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "no images in it"),
        (b"a.png,0\nb.png\n", "line 2: expected path,label, found 'b.png'"),
        (b"a.png,\n", "line 1: expected path,label"),
        (b"a.png,0\nb.png,cat\n", "label cat: labels are all names, or all numbers 0..999999"),
        (b"a.png,-1\n", "label -1: labels are all names, or all numbers"),
        (b"a.png,1.5\n", "label 1.5: "),
        (b"a.png,1000000\n", "label 1000000: "),
        (b"\xff\xfe,0\n", "cannot be read as text"),
    ],
)
def test_mistakes_in_a_list(text, message, tmp_path):
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(ValueError, match=f"list.txt: .*{message}"):
        open_source(list_file=str(tmp_path / "list.txt"))


# ---------------------------------------------------------------------------------------------------------------------
# Tar files
# ---------------------------------------------------------------------------------------------------------------------


def pack(path, files, **options):
    """A tar file of `{name: bytes}`."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def class_tars(folder, scratch):
    """{class.tar: bytes}, each with its images in reversed order."""
    tars = {}
    for name in sorted({name.split("/")[0] for name in NAMES}):
        members = {n.split("/", 1)[1]: (folder / n).read_bytes() for n in reversed(NAMES) if n.startswith(f"{name}/")}
        tars[f"{name}.tar"] = open(pack(scratch / f"{name}.tar", members), "rb").read()
    return tars


def train_tar(folder, scratch, **options):
    return pack(scratch / "train.tar", class_tars(folder, scratch), **options)


def folder_of_tars(folder, scratch):
    (scratch / "tars").mkdir()
    for name, data in class_tars(folder, scratch).items():
        (scratch / "tars" / name).write_bytes(data)
    return str(scratch / "tars")


def tar_of_folders(folder, scratch):
    with tarfile.open(scratch / "images.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder, "./images")
    return str(scratch / "images.tar")


@pytest.mark.parametrize("make", [train_tar, folder_of_tars, tar_of_folders])
def test_tar_files_are_the_folder_that_they_were_made_from(make, folder, tmp_path):
    before = sorted(os.listdir(tmp_path))
    source = open_source(make(folder, tmp_path))
    assert contents(source) == FOLDER and source.kind == "tar"
    assert source.digest() == open_source(str(folder)).digest()
    assert not {"cat", "dog", "鸟"} & (set(os.listdir(tmp_path)) - set(before))  # nothing was unpacked
    source.save(tmp_path / "list.npz")
    assert contents(ImageSource.load(tmp_path / "list.npz", source.root)) == FOLDER


def test_links_in_a_tar_file_are_told_of(folder, tmp_path):
    (folder / "cat" / "part").symlink_to(folder / "dog")
    os.link(folder / "cat" / "b,c.png", folder / "dog" / "z.png")
    source = open_source(tar_of_folders(folder, tmp_path))
    assert source.notes == [
        "left out, links in tar files and what is no plain file: 2 (./images/cat/part, ./images/dog/z.png)"
    ]


def test_a_list_may_name_the_images_of_a_tar_file(folder, tmp_path):
    flat = pack(tmp_path / "val.tar", {"v_1.JPEG": (folder / NAMES[1]).read_bytes(), "v_2.JPEG": b""})
    with pytest.raises(ValueError, match="val.tar: 2 images in no class folder; give their classes with --list"):
        open_source(flat)
    (tmp_path / "val.txt").write_text("v_1.JPEG,65\n")
    assert contents(open_source(flat, str(tmp_path / "val.txt"))) == [("v_1.JPEG", 65, 1)]
    (tmp_path / "val.txt").write_text("val/v_1.JPEG,65\n")
    with pytest.raises(
        ValueError, match="1 of its images are not in .*val.tar, the first is val/v_1.JPEG; .* v_1.JPEG"
    ):
        open_source(flat, str(tmp_path / "val.txt"))


def test_class_folders_beside_their_tar_files_are_read(folder):
    (folder / "cat.tar").write_bytes(b"")
    source = open_source(str(folder))
    assert contents(source) == FOLDER and "its 1 tar file is not" in source.notes[0]


def cut_short(path):
    os.truncate(path, os.path.getsize(path) - 12_000)


def damaged_header(path):
    with tarfile.open(path) as tar:
        offset = tar.getmember("dog.tar").offset
    with open(path, "r+b") as file:
        file.seek(offset + 148)
        file.write(b"!!!!!!!!")


def damaged_inside(path):
    with tarfile.open(path) as tar:
        offset = tar.getmember("dog.tar").offset_data
    with tarfile.open(fileobj=io.BytesIO(open(path, "rb").read()[offset:])) as tar:
        offset += tar.getmembers()[1].offset
    with open(path, "r+b") as file:
        file.seek(offset + 148)
        file.write(b"!!!!!!!!")


def not_a_tar(path):
    with open(path, "wb") as file:
        file.write(b"not a tar file" * 100)


@pytest.mark.parametrize("spoil", [cut_short, damaged_header, damaged_inside, not_a_tar])
def test_a_damaged_tar_file_does_not_pass_for_a_short_one(spoil, folder, tmp_path):
    path = train_tar(folder, tmp_path)
    spoil(path)
    with pytest.raises(ValueError, match="train.tar.*: .*damaged or cut short"):
        open_source(path)


def test_other_tar_files_are_refused(folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(folder, "images")
    with pytest.raises(ValueError, match="no plain tar file"):
        open_source(str(tmp_path / "x.tar.gz"))
    mixed = {**class_tars(folder, tmp_path), "other/x.png": b""}
    with pytest.raises(ValueError, match="tar files of classes and other images side by side"):
        open_source(pack(tmp_path / "mixed.tar", mixed))
    with pytest.raises(ValueError, match="no images found"):
        open_source(pack(tmp_path / "none.tar", {"a/readme.txt": b""}))
    path = train_tar(folder, tmp_path)
    open_source(path).save(tmp_path / "list.npz")
    with open(path, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match="are not those whose images were listed"):
        ImageSource.load(tmp_path / "list.npz", path)
