"""Train the small classifier of digits whose last hidden layer is the feature network "digits".

It learns from clean digits, turned, sheared, scaled and moved a little, and from corrupted ones: noise, blur, a
mixture of two digits. The noisier or more blurred a digit is, the nearer is its target to "any digit"; a mixture's
target is that of its parts. So corrupted digits have features of their own. OUTPUT gets {name: array} as safetensors.

The classifier in assets/digits_classifier was made by
    python tools/prepare_digits.py --output digits
    python tools/train_digits_classifier.py --data_path digits/train --heldout digits/heldout --output model.safetensors

With --as_encoder it is a convolutional network, and OUTPUT a folder with a program of its last convolution, 128
features at each of 4 x 4 places: an encoder for `tools/extract_features.py --encoder OUTPUT --token_grid 4`.
"""

import itertools
import os

import _root  # noqa: F401 (the project's root, on sys.path)
import numpy as np

from config.checks import FLAG_SEED
from config.flags import CommandParser, check_paths
from evaluation.digits import SIDE, shrink
from features.images import find_images, load_pixels
from runtime.files import check_output, whole_file
from runtime.process import configure_runtime, run_cli
from runtime.programs import PROGRAMS
from runtime.progress import tqdm

configure_runtime()  # before Paddle is imported

SIZE = 32  # of the digits in pixels
HIDDEN = (128, 64)
CHANNELS = (32, 64, 128)  # of the convolutional one
COPIES, EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 24, 6, 128, 2e-3, 1e-4
TURN, STRETCH, SHEAR, MOVE = 12, 0.12, 0.1, 1.5  # largest: degrees, log of the scale, shear, pixels
CLEAN, NOISY, BLURRED, MIXED = 0.5, 0.2, 0.2, 0.1  # shares of the copies
MAX_NOISE, MAX_BLUR = 64, 2.0  # standard deviations, in grey levels and in pixels, where the target is "any digit"


def load_digits(root):
    """Returns grey images `(N, 32, 32)`, float32 in 0..255, and labels `(N,)` of an image folder by class."""
    samples, _ = find_images(root)
    images = np.stack([load_pixels(path, SIZE) for path, _ in samples])  # (N, 32, 32, 3)
    return images.mean(axis=-1, dtype="float32"), np.array([label for _, label in samples])


def move(image, rng):
    """Returns a digit `(H, W)` turned, sheared, scaled and moved a little, at random."""
    from scipy.ndimage import affine_transform

    angle = np.deg2rad(rng.uniform(-TURN, TURN))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    height, width = np.exp(rng.uniform(-STRETCH, STRETCH, 2))
    matrix = turn @ np.array([[height, rng.uniform(-SHEAR, SHEAR)], [0, width]])
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - matrix @ centre + rng.uniform(-MOVE, MOVE, 2)
    return affine_transform(image, matrix, offset, order=3)


def corrupt(images, targets, rng):
    """Returns images `(N, H, W)` and targets `(N, 10)` of which a part is noisy, blurred or mixed, at random."""
    from scipy.ndimage import gaussian_filter

    images, others = images.copy(), rng.permutation(len(images))
    mixed, mixed_targets = images[others], targets[others]
    targets = targets.copy()
    kinds = rng.choice(4, len(images), p=[CLEAN, NOISY, BLURRED, MIXED])
    for i, (kind, amount) in enumerate(zip(kinds, rng.uniform(size=len(images)), strict=True)):
        other = np.full_like(targets[i], 1 / targets.shape[1])
        if kind == 0:
            continue
        if kind == 1:
            images[i] += rng.normal(size=images[i].shape) * amount * MAX_NOISE
        elif kind == 2:
            images[i] = gaussian_filter(images[i], amount * MAX_BLUR)
        else:
            images[i] = (1 - amount) * images[i] + amount * mixed[i]
            other = mixed_targets[i]
        targets[i] = (1 - amount) * targets[i] + amount * other
    return images, targets


def as_seen(images):
    """Returns what the classifier sees of grey images `(N, H, W)` in 0..255, `(N, 256)`."""
    levels = images.clip(0, 255).round().astype("uint8")
    return shrink(np.repeat(levels[..., None], 3, axis=-1))


def make_samples(images, labels, rng):
    """Returns what to learn from: inputs `(M, 256)` and targets `(M, 10)`, float32, of the images and their copies."""
    one_hot = np.eye(10, dtype="float32")[labels]
    inputs, targets = [as_seen(images)], [one_hot]
    for _ in tqdm(range(COPIES), desc="copies"):
        moved, target = corrupt(np.stack([move(image, rng) for image in images]), one_hot, rng)
        inputs.append(as_seen(moved))
        targets.append(target)
    return np.concatenate(inputs), np.concatenate(targets)


def linear_layers():
    """Returns the layers of the classifier, and the function that they are, of inputs `(B, 256)`."""
    from paddle import nn

    sizes = (SIDE * SIDE, *HIDDEN, 10)
    layers = nn.LayerList([nn.Linear(*pair) for pair in itertools.pairwise(sizes)])

    def forward(x):
        for layer in layers[:-1]:
            x = nn.functional.relu(layer(x))
        return layers[-1](x)

    return layers, forward


def convolutions():
    """Returns the same of a convolutional classifier, its convolutions first."""
    from paddle import nn

    strides, parts = (1, 2, 2), []
    for (before, after), stride in zip(itertools.pairwise((1, *CHANNELS)), strides, strict=True):
        parts += [nn.ReLU(), nn.Conv2D(before, after, 3, stride, padding=1)]
    layers = nn.LayerList([nn.Sequential(*parts[1:]), nn.Linear(CHANNELS[-1], 10)])

    def forward(x):
        x = layers[0](x.reshape([-1, 1, SIDE, SIDE]))  # (B, 128, 4, 4)
        return layers[1](nn.functional.relu(x).mean([2, 3]))

    return layers, forward


def save_encoder(features, folder):
    """Saves convolutions of grey 16x16 images as a program of RGB images (N, 3, H, W) in [0, 1], of any size."""
    from paddle import nn

    from runtime.programs import save_program

    grey = nn.Conv2D(3, 1, 1, bias_attr=False)
    nn.initializer.Constant(1 / 3)(grey.weight)
    program = nn.Sequential(grey, nn.AdaptiveAvgPool2D(SIDE), features)
    save_program(program, [("images", [3, None, None], "float32")], os.path.join(folder, "model"))


def train(network, forward, inputs, targets, rng):
    """Trains a network, `forward` of its inputs, by AdamW with a cosine decay to zero."""
    import paddle

    steps = len(inputs) // BATCH_SIZE
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(LEARNING_RATE, EPOCHS * steps)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=network.parameters(), weight_decay=WEIGHT_DECAY)
    for _ in tqdm(range(EPOCHS), desc="epochs"):
        order = rng.permutation(len(inputs))
        for step in range(steps):
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            logits, target = forward(paddle.to_tensor(inputs[rows])), paddle.to_tensor(targets[rows])  # (B, 10) each
            paddle.nn.functional.cross_entropy(logits, target, soft_label=True).backward()
            optimizer.step()
            optimizer.clear_grad()
            schedule.step()


def main(argv: list | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--data_path", required=True, metavar="FOLDER", help="training digits, a folder by class")
    parser.add_argument(
        "--heldout", required=True, metavar="FOLDER", help="digits to measure the classifier on, a folder by class"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="safetensors file to write, or a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--as_encoder", action="store_true", help="train an encoder, which is a folder with a program")
    parser.add_argument("--seed", check=FLAG_SEED, default=0, help="of the copies and the first weights")
    args = parser.parse_args(argv)
    check_paths(args, "data_path", "heldout")
    if args.as_encoder:
        os.makedirs(args.output, exist_ok=True)
    output = os.path.join(args.output, PROGRAMS[0]) if args.as_encoder else args.output
    check_output(output, args.overwrite, "--output ")
    digits, heldout = load_digits(args.data_path), load_digits(args.heldout)

    import paddle

    from weights.files import save_safetensors

    rng = np.random.default_rng(args.seed)
    paddle.seed(args.seed)
    network, forward = convolutions() if args.as_encoder else linear_layers()
    train(network, forward, *make_samples(*digits, rng), rng)
    if args.as_encoder:
        save_encoder(network[0], args.output)
    else:
        with whole_file(args.output) as partial:
            save_safetensors({name: value.numpy() for name, value in network.state_dict().items()}, partial)
    for what, (images, labels) in (("training", digits), ("held-out", heldout)):
        with paddle.no_grad():
            found = forward(paddle.to_tensor(as_seen(images))).numpy().argmax(axis=1)
        print(f"{what} digits: {(found == labels).mean():.4f} right")
    print(f"The {'encoder' if args.as_encoder else 'classifier'} is in {args.output}")


if __name__ == "__main__":
    run_cli(main)
