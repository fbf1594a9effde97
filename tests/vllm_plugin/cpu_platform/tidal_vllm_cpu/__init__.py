"""The official vLLM wheel on a machine without a GPU, for tests: a platform and a dense backend."""
