"""From images to latents and back, and from a network to what others run: are the numbers right on this device?

`python -m verification.pipelines` records what the autoencoder makes of the images, in `features.npz` beside this file:
on a CPU, when images, autoencoder or extraction change what is stored.
"""

import os
from pathlib import Path

import numpy as np

from runtime.paddle_private import full_float32
from verification.gpus import need_bfloat16
from verification.tiny_models import ddim_latents, make_config, make_model, state_of, stock_latents
from verification.tiny_runs import ROOT
from verification.verdicts import Check, Skip, Wrong, within

RECORDED = Path(__file__).with_name("features.npz")
VAE = ROOT / "assets" / "colour_vae"
IMAGES, SIDE, CLASSES = 6, 64, 2
# Relative to the standard deviation of all latents. A CPU's processors differ in rounding alone; on a GPU convolutions
# may take TF32, which keeps 10 bits, an error of 1e-3 in each of some twenty layers. A wrong scale is off by more.
LATENTS = {"cpu": 1e-3, "gpu": 2e-2}
DECIBELS = {"cpu": 0.01, "gpu": 0.2}  # of the PSNR of what comes back
# Sampling in float32 both ways: rounding, which five guided steps multiply. On a GPU TF32 is switched off, but kernels
# of attention may take it all the same.
SAMPLED = {"cpu": 1e-4, "gpu": 1e-2}
HALF_PSNR = 30  # dB of images drawn in half precision against float32; those of another network have 10


def checks(settings):
    """Yields the checks of this group."""
    features = Features(settings)
    yield Check("images to latents", features.compare_latents)
    yield Check("latents to images", features.compare_images)
    yield Check("DiTPipeline of ppdiffusers", lambda: compare_stock(settings))
    programs = Programs(settings)
    yield Check("Paddle Inference, float32", programs.compare_latents)
    for dtype in ("bfloat16", "float16"):
        yield Check(f"Paddle Inference, {dtype}", lambda dtype=dtype: programs.compare_images(dtype))
    yield Check("FID's Inception", lambda: compare_inception(settings))


def kind_of(settings):
    """Returns "gpu" or "cpu"."""
    return "gpu" if settings.on_gpu else "cpu"


def relative_error(a, b):
    """Returns max|a - b| over the standard deviation of b."""
    return float(np.abs(np.asarray(a, "float64") - b).max() / np.std(b))


def psnr(a, b):
    """Returns the peak signal-to-noise ratio of uint8 images `(..., H, W, C)`, all of them as one picture, dB."""
    from evaluation import reconstruction

    pictures = (np.asarray(images).reshape(1, -1, *np.shape(images)[-2:]) for images in (a, b))
    return float(reconstruction.psnr(*pictures)[0])


def make_images():
    """Returns images `(6, 64, 64, 3)`, uint8: discs and stripes in two colours each."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    images = []
    for index in range(IMAGES):
        inside, outside = rng.integers(0, 256, (2, 3))
        row, column, size = rng.uniform(0.3, 0.7, 3)
        disc = (rows - row) ** 2 + (columns - column) ** 2 < (size / 2) ** 2
        stripes = np.sin(2 * np.pi * (3 * row * rows + 3 * column * columns)) > 0
        mask = (disc if index % CLASSES else stripes)[:, :, None]
        images.append(np.where(mask, inside, outside).astype("uint8"))
    return np.stack(images)


class Features:
    """The images' latents, extracted as a set on the device, and what they decode to."""

    def __init__(self, settings):
        self._settings, self._moments = settings, None

    def compare_latents(self):
        """Compares the posteriors' means and standard deviations with those recorded."""
        moments = self._extract()
        bound = LATENTS[kind_of(self._settings)]
        with np.load(RECORDED) as recorded:
            pairs = zip(("mean", "std"), np.split(moments, 2, axis=1), strict=True)
            return within({name: (relative_error(values, recorded[name]), bound) for name, values in pairs})

    def compare_images(self):
        """Compares the PSNR of the decoded means with the one recorded."""
        found = self.decoded_psnr()
        with np.load(RECORDED) as recorded:
            expected = float(recorded["psnr"])
        text, figures = within({"PSNR, dB": (abs(found - expected), DECIBELS[kind_of(self._settings)])})
        return f"PSNR {found:.2f} dB, recorded {expected:.2f}: {text}", {**figures, "psnr": found}

    def decoded_psnr(self):
        """Returns the PSNR of the images that the means decode to."""
        import paddle

        from features.autoencoder import LatentDecoder, load_vae

        mean = np.split(self._extract(), 2, axis=1)[0]
        return psnr(LatentDecoder(load_vae(str(VAE)))(paddle.to_tensor(np.ascontiguousarray(mean))), make_images())

    def _extract(self):
        """Returns means and standard deviations `(N, 2C, h, w)` in the order of the images."""
        if self._moments is None:
            self._moments = extract(Path(self._settings.folder), self._settings.device)
        return self._moments


def extract(folder, device):
    """Writes the images and extracts their features, as tools/extract_features.py --moments does; returns them."""
    from PIL import Image

    from features.autoencoder import LatentEncoder, downsampling, load_vae
    from features.dataset import FeatureDataset
    from features.extraction import Extraction, make_settings
    from features.layout import Layout
    from runtime.precision import Precision

    for index, image in enumerate(make_images()):  # listed by class, then by name
        place = folder / "images" / str(index * CLASSES // IMAGES)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")
    os.makedirs(folder / "features", exist_ok=True)
    layout, vae = Layout(str(folder / "features"), "discs"), load_vae(str(VAE))
    encoding = {"device": device.split(":")[0], "dtype": "float32", "batch_size": 4}
    options = {"format": "npy", "moments": True, "flip": False, "image_size": SIDE, "seed": 0, "background": None}
    extraction = Extraction(layout, make_settings(vae, str(VAE), layout.name, encoding, options), 0, 1)
    extraction.open(str(folder / "images"), None)
    extraction.run(LatentEncoder(vae, Precision(), seed=0, moments=True), num_workers=0, skip=False)
    shape = (vae.config.latent_channels, SIDE // downsampling(vae), SIDE // downsampling(vae))
    dataset = FeatureDataset(str(folder / "features"), sample_shape=shape, num_classes=CLASSES)
    rows = np.empty((IMAGES, *dataset.store.row_shape), "float32")
    dataset.store.read(np.arange(IMAGES), rows, None)
    return rows


def _tiny():
    from features.autoencoder import load_vae

    config = make_config()
    return config, make_model(config), load_vae(str(VAE))


def compare_stock(settings):
    """Compares what ppdiffusers draws from an exported folder with this project's own sampler."""
    from sampling.pipelines.export import export_pipeline

    bound = SAMPLED[kind_of(settings)]  # asks for the device first
    config, model, vae = _tiny()
    folder = Path(settings.folder) / "pipeline"
    export_pipeline(config, state_of(model), vae, folder)
    with full_float32():
        latents, noise = stock_latents(folder, 5, 2.0)
        expected = ddim_latents(config, model, noise, 5, 2.0)
    return within({"latents": (relative_error(latents, expected), bound)})


class Programs:
    """A tiny network's export for Paddle Inference, against the network itself."""

    def __init__(self, settings):
        self._settings, self._made = settings, None

    def compare_latents(self):
        """Compares the latents that the program draws in float32."""
        bound = SAMPLED[kind_of(self._settings)]  # asks for the device first
        expected, latents = self._expected(), self._draw("float32")
        return within({"latents": (relative_error(latents, expected), bound)})

    def compare_images(self, dtype):
        """Compares the images that the program draws in half precision; `Skip` where the device has none."""
        import paddle

        from sampling.pipelines.inference import check_dtype

        device = self._settings.device
        try:
            check_dtype(device, dtype)
        except ValueError as error:
            raise Skip(str(error)) from None
        if self._settings.on_gpu and dtype == "bfloat16":
            need_bfloat16()
        expected, latents = self._expected(), self._draw(dtype)
        images = [self._made[1].decode(paddle.to_tensor(each), "diffusers") for each in (latents, expected)]
        found = psnr(*images)
        text, figures = f"images {found:.1f} dB, at least {HALF_PSNR}", {"psnr": found, "bound": HALF_PSNR}
        if not found >= HALF_PSNR:
            raise Wrong(text, figures)
        return text, figures

    def _expected(self):
        with full_float32():
            return self._sample(self._export()[1])

    def _draw(self, dtype):
        from sampling.pipelines.inference import load_inference

        folder, _ = self._export()
        with full_float32():
            return self._sample(load_inference(str(folder), device=self._settings.device, dtype=dtype))

    def _export(self):
        """Returns the folder of the programs and the `Generator` that they were made of."""
        if self._made is None:
            from sampling.generator import from_weights
            from sampling.pipelines.inference import export_inference

            config, model, vae = _tiny()
            generator = from_weights(config, state_of(model), vae)
            folder = Path(self._settings.folder) / "programs"
            export_inference(generator, str(folder))
            self._made = folder, generator
        return self._made

    @staticmethod
    def _sample(generator):
        options = {"seed": 0, "num_inference_steps": 5, "guidance_scale": 2.0}
        return generator.sample([1, 2], **options, output="latents").numpy()


def compare_inception(settings):
    """Compares Inception's features of the images on a GPU with those on the CPU."""
    from evaluation.inception import Inception, find_weights

    try:
        path = find_weights()
    except ValueError:
        raise Skip("its weights are not on this machine; tools/evaluate.py says where to get them") from None
    if not settings.on_gpu:
        raise Skip("on a CPU there is nothing to compare with")
    import paddle

    found = Inception.from_file(path)(make_images())
    paddle.set_device("cpu")
    try:
        expected = Inception.from_file(path)(make_images())
    finally:
        paddle.set_device(settings.device)
    return within({name: (relative_error(found[name], expected[name]), 1e-3) for name in Inception.outputs})


def record():
    """Writes `features.npz`."""
    import tempfile

    from runtime.process import configure_runtime
    from verification.verdicts import Settings

    configure_runtime()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings("cpu", False, folder)
        mean, std = np.split(extract(Path(folder), settings.device), 2, axis=1)
        decoded = Features(Settings("cpu", False, f"{folder}/again")).decoded_psnr()
    np.savez_compressed(RECORDED, mean=mean, std=std, psnr=decoded)


if __name__ == "__main__":
    record()
