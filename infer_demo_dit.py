"""Draw images with a DiT or a Large-DiT.

    python infer_demo_dit.py                                        # the public DiT-XL/2: a golden retriever
    python infer_demo_dit.py --model_path DiT_pipeline --classes 207 "Siberian husky" --num_inference_steps 50
    python infer_demo_dit.py --model_path outputs/trainer/checkpoint-5000 --vae assets/digits_vae --classes 3 7

--model_path is a DiTPipeline folder (tools/convert_dit_to_ppdiffusers.py), its name on the hub, a training checkpoint
folder, whose averages are sampled, or a run's folder, whose newest checkpoint is taken. Without it: ./DiT_XL_2_256 if
that folder is there, else the public facebook/DiT-XL-2-256. One class gives one image, several a grid.

--backend inference samples by Paddle Inference, of which --dtype bfloat16 also runs on a CPU that has it. --model_path
may then also be a folder of tools/export_inference.py; any other is exported for this run, which takes a few seconds.
Such a folder is a program: it runs as code of whoever made it.
"""

from runtime.process import run_cli
from sampling.demo import DiTDemo, draw_dit

DEMO = DiTDemo(description=__doc__)


def main(argv=None):
    draw_dit(argv, DEMO)


if __name__ == "__main__":
    run_cli(main)
