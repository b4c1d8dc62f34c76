"""Encode an image folder with a VAE into the feature layout that both training loops read.

FEATURES_PATH/NAME_features/<i>.npy  float32 [1, C, H/f, W/f], a posterior sample times the VAE's scaling_factor
FEATURES_PATH/NAME_labels/<i>.npy    int64 [1]
FEATURES_PATH/NAME_classes.json      {"id2label": {"0": <class folder>, ...}}

Classes are the subfolders of DATA_PATH in sorted order. Images are centre-cropped as ADM and DiT do for ImageNet.
The noise of image i depends on (seed, i) alone. Under paddle.distributed.launch the ranks share the images.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools.image_folder import find_images, load_image  # noqa: E402
from training.runtime import configure_runtime, init_distributed, resolve_device, run_cli  # noqa: E402

configure_runtime()  # before Paddle is imported


def encode(vae, images, noise):
    """Latents to train on, numpy [N, C, h, w]: (posterior mean + std * noise) * scaling_factor.

    images: float32 [N, 3, H, W] in [-1, 1]; noise: float32, in the latents' shape, standard normal.
    """
    import paddle

    with paddle.no_grad():
        posterior = vae.encode(paddle.to_tensor(images)).latent_dist
        latents = posterior.mean + posterior.std * paddle.to_tensor(noise)
        return (latents * vae.config.scaling_factor).astype("float32").numpy()


def load_batches(samples: list, indices: list, image_size: int, batch_size: int, num_workers: int):
    """Yield (indices [N], images [N, 3, S, S]); threads read the next batch while the caller works on this one."""
    import numpy as np

    with ThreadPoolExecutor(max(1, num_workers)) as pool:

        def start(first):
            chunk = indices[first : first + batch_size]
            return chunk, [pool.submit(load_image, samples[index][0], image_size) for index in chunk]

        upcoming = start(0)
        for first in range(0, len(indices), batch_size):
            chunk, images = upcoming
            upcoming = start(first + batch_size)
            try:
                yield chunk, np.stack([image.result() for image in images])
            except ValueError:
                pool.shutdown(cancel_futures=True)
                raise


def check_output(folders: list, classes_file: str) -> None:
    """ValueError if an extraction has already written here."""
    for path in folders:
        if os.path.isdir(path) and os.listdir(path) or os.path.isfile(path):
            raise ValueError(f"{path} already holds another extraction; choose another --features_path or --name")
    if os.path.exists(classes_file):
        raise ValueError(f"{classes_file} belongs to another extraction; choose another --features_path or --name")


def extract(args) -> None:
    samples, classes = find_images(args.data_path)
    for key in ("image_size", "batch_size"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key} {getattr(args, key)}: expected at least 1")
    name = args.name or f"imagenet{args.image_size}"
    features_dir = os.path.join(args.features_path, f"{name}_features")
    labels_dir = os.path.join(args.features_path, f"{name}_labels")
    classes_file = os.path.join(args.features_path, f"{name}_classes.json")
    check_output([features_dir, labels_dir], classes_file)

    import numpy as np
    import paddle
    from tqdm import tqdm

    from sampling.decoder import load_vae

    # Device, and this process's share of the images.
    paddle.set_device(resolve_device(args.device))
    rank, world = init_distributed()

    vae = load_vae(args.vae)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if args.image_size % factor:
        raise ValueError(f"--image_size {args.image_size}: expected a multiple of {factor}, the factor of {args.vae}")
    latent_shape = (vae.config.latent_channels, args.image_size // factor, args.image_size // factor)
    if world > 1:
        paddle.distributed.barrier()  # nobody writes before everybody has found the output empty

    os.makedirs(features_dir, exist_ok=True)
    os.makedirs(labels_dir, exist_ok=True)
    if rank == 0:
        with open(classes_file, "w", encoding="utf-8") as file:
            json.dump({"id2label": {str(i): label for i, label in enumerate(classes)}}, file, indent=2)
            file.write("\n")

    # Read, encode, write.
    indices = list(range(rank, len(samples), world))
    progress = tqdm(total=len(indices), desc="features", unit="image", disable=rank != 0)
    for chunk, images in load_batches(samples, indices, args.image_size, args.batch_size, args.num_workers):
        rngs = [np.random.default_rng((args.seed, index)) for index in chunk]
        noise = np.stack([rng.standard_normal(latent_shape, "float32") for rng in rngs])
        for index, latent in zip(chunk, encode(vae, images, noise), strict=True):
            np.save(os.path.join(features_dir, f"{index}.npy"), latent[None])  # (1, C, h, w)
            np.save(os.path.join(labels_dir, f"{index}.npy"), np.array([samples[index][1]], dtype="int64"))
        progress.update(len(chunk))
    progress.close()
    if rank == 0:
        print(f"{len(samples)} images of {len(classes)} classes: {features_dir}, {labels_dir}, {classes_file}")


def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", "--data", required=True, help="image folder, one subfolder per class")
    parser.add_argument("--features_path", "--output", required=True, help="folder that gets the features")
    parser.add_argument("--name", help="prefix of what is written (default imagenet<image_size>)")
    parser.add_argument("--image_size", type=int, default=256, help="side of the crops in pixels (default 256)")
    parser.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="folder or hub name of an AutoencoderKL")
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded at once (default 32)")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that read images (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the posterior samples (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, gpu, gpu:N or auto (default): a GPU if there is one")
    extract(parser.parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
