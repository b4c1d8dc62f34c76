"""Draw images with the Large-DiT of 3 billion parameters: infer_demo_dit.py with other defaults.

    python infer_demo_largedit_3b.py                          # the public Large-DiT-3B: a golden retriever
    python infer_demo_largedit_3b.py --model_path LargeDiT_pipeline --classes 207 "Siberian husky"

Without --model_path: ./LargeDiT_3B_2_256 if that folder is there, else the public Alpha-VLLM/Large-DiT-3B-256.
"""

from runtime.process import run_cli
from sampling.demo import DiTDemo, draw_dit

DEMO = DiTDemo(
    kind="LargeDiT_3B",
    local_folder="./LargeDiT_3B_2_256",
    public_name="Alpha-VLLM/Large-DiT-3B-256",
    seed=42,
    gpu_dtype="float16",
    description=__doc__,
)


def main(argv=None):
    draw_dit(argv, DEMO)


if __name__ == "__main__":
    run_cli(main)
