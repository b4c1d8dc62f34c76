"""Convert a feature set between one pair of .npy files a sample and the packed format, either way.

OUTPUT gets NAME_packed/, or NAME_features/, NAME_labels/ (and NAME_features_flip/), and NAME_classes.json,
NAME_checksums.txt and NAME_manifest.json. An encoder's features are taken along. Every sample is read back and compared
bit for bit before the result appears under its name. The source's samples are only read. After a kill the same command
goes on where it was.

Packed as packed: --to packed on a packed set changes its dtype or the size of its shards.
"""

import _root  # noqa: F401 (the project's root, on sys.path)

from config.flags import CommandParser, add_set_flags
from config.options import POSITIVE_INT
from features.convert import convert_set
from runtime.process import counted, run_cli


def main(argv=None):
    parser = CommandParser(description=__doc__)
    add_set_flags(parser)
    parser.add_argument("--to", choices=("packed", "npy"), help="[the other one than the source's]")
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder for the result [FEATURE_PATH_packed or FEATURE_PATH_npy]"
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), help="of the stored latents [the source's]")
    parser.add_argument(
        "--shard_samples", check=POSITIVE_INT, help="samples a packed file, lost if killed in it [4 GiB of them]"
    )
    parser.add_argument("--num_workers", check=POSITIVE_INT, default=4, help="threads that read ahead")
    args = parser.parse_args(argv)
    options = vars(args)
    num_samples, paths, rounding_error = convert_set(resolution=options.pop("image_size") or 256, **options)
    print(f"{counted(num_samples, 'sample')}, compared bit for bit: {', '.join(paths)}")
    if rounding_error:
        print(f"note: stored as float16, the largest rounding error is {rounding_error:.2g}")


if __name__ == "__main__":
    run_cli(main)
