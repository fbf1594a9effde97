"""vLLM: TidalDecode as the attention backend of decode steps; everything else stays vLLM's.

Read in this order: `options.py` (what ``--additional-config`` may say), `support.py` (what is refused,
and why), `memory.py` (what a selection layer works in), `step.py` (which rows of a batch decode, and
what a layer does with them), `group.py` (which layers are ours), `mixins.py` (how that meets a backend
of vLLM), `backend.py` (on top of FlashAttention).
"""

BACKEND = "tidaldecode.integrations.vllm.backend.TidalBackend"


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: make ``--attention-backend CUSTOM`` ours.

    Runs in every process of vLLM, also of users who chose another backend: it registers a name and
    imports nothing else. Idempotent.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
