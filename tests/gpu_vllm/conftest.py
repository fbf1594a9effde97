"""The settings under which vLLM runs in the process of the tests; set before it is imported."""

import os

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
