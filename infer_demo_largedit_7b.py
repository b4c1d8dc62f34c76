"""Draw images with the Large-DiT of 7 billion parameters: infer_demo_dit.py with other defaults.

    python infer_demo_largedit_7b.py                          # the public Large-DiT-7B: a golden retriever
    python infer_demo_largedit_7b.py --model_path LargeDiT_pipeline --classes 207 "Siberian husky"

Without --model_path: ./LargeDiT_7B_2_256 if that folder is there, else the public Alpha-VLLM/Large-DiT-7B-256.
"""

from runtime.process import run_cli
from sampling.demo import DiTDemo, draw_dit

DEMO = DiTDemo(
    kind="LargeDiT_7B",
    local_folder="./LargeDiT_7B_2_256",
    public_name="Alpha-VLLM/Large-DiT-7B-256",
    gpu_dtype="bfloat16",
    description=__doc__,
)


def main(argv=None):
    draw_dit(argv, DEMO)


if __name__ == "__main__":
    run_cli(main)
