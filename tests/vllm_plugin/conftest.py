"""The settings under which the official wheel of vLLM runs on a CPU; set before it is imported."""

import os

os.environ.update(
    TIDAL_VLLM_CPU="1",
    VLLM_USE_V2_MODEL_RUNNER="0",  # it wants Triton
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
